"""FP8 GEMM kernels for Hopper, compiled ahead of time, as PyTorch operators in ``torch.ops.deep_gemm``."""

from . import _library

__version__ = "0.1.0"

_library.load()
