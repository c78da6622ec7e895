"""A functional PTX emulator: runs nvcc's PTX on the CPU and checks it. See README.md."""

from .api import (
    DTYPE,
    SWIZZLE,
    Launch,
    Module,
    PtxError,
    Stats,
    TensorMap,
    encode_tiled,
    encode_tiled_function,
    last_error,
    run,
    tensor_map,
)
from .build import compile_cuda, library_path, nvcc_path

__all__ = [
    "DTYPE",
    "SWIZZLE",
    "Launch",
    "Module",
    "PtxError",
    "Stats",
    "TensorMap",
    "compile_cuda",
    "encode_tiled",
    "encode_tiled_function",
    "last_error",
    "library_path",
    "nvcc_path",
    "run",
    "tensor_map",
]
