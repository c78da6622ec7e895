"""Runs a row of the GEMM table under the PTX emulator, through the library's own host code.

The library selects nothing here: it fills the kernel's parameters for a forced row, encodes the tensor maps with the
emulator's encoder instead of the driver's, and hands the launch to a callback, which runs the kernel's PTX as it was
compiled into the library.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ptx_emulator
import torch

from deep_gemm_ops import _capi
from deep_gemm_ops._library import library_path

BFLOAT16, FLOAT32 = 0, 1


class _Scales(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride_mn", ctypes.c_int64),
        ("stride_k", ctypes.c_int64),
        ("gran_mn", ctypes.c_int),
    ]


class _Problem(ctypes.Structure):
    """GemmProblem of src/host/gemm_problem.h."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("b_stride", ctypes.c_int64),
        ("sfa", _Scales),
        ("sfb", _Scales),
        ("gran_k", ctypes.c_int),
        ("d", ctypes.c_void_p),
        ("d_stride", ctypes.c_int64),
        ("d_type", ctypes.c_int),
        ("c", ctypes.c_void_p),
        ("c_stride", ctypes.c_int64),
    ]


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def library_ptx() -> str:
    """All PTX for sm_90a that the library holds."""
    override = os.environ.get("DG_TEST_PTX")
    if override:
        return Path(override).read_text()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [find_cuobjdump(), "-arch", "sm_90a", "-xptx", "all", str(library_path())],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        return "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.ptx")))


def find_cuobjdump() -> str:
    """On PATH, or from the wheel nvidia-cuda-cuobjdump."""
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    for folder in sys.path:
        candidate = Path(folder) / "nvidia" / "cu13" / "bin" / "cuobjdump"
        if candidate.exists():
            return str(candidate)
    raise FileNotFoundError("cuobjdump is missing: pip install nvidia-cuda-cuobjdump")


@functools.cache
def _modules() -> dict[str, tuple[ptx_emulator.Module, str]]:
    """Kernel name fragment -> (module, entry). Each translation unit's PTX is a module of its own."""
    text = library_ptx()
    units = [".version" + part for part in text.split(".version")[1:]]
    modules = [ptx_emulator.Module(unit) for unit in units if "sm90_fp8_gemm" in unit]
    found = {}
    for row in _capi.instances():
        for module in modules:
            entries = [entry for entry in module.entries if row["kernel"] in entry]
            if entries:
                found[row["kernel"]] = (module, entries[0])
    return found


def span(x: torch.Tensor | None) -> list[tuple[int, int]]:
    if x is None or x.numel() == 0:
        return []
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return [(x.data_ptr(), extent * x.element_size())]


def run_row(
    row: int,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    d: torch.Tensor,
    *,
    gran: tuple[int, int, int],
    c: torch.Tensor | None = None,
    num_sms: int = 132,
    **options: int,
) -> ptx_emulator.Stats:
    """D = A B^T (+ C) on one row of the table; float32 scales ``[MN / gran, K / gran_k]`` of any strides."""
    problem = _Problem(
        m=a.shape[0],
        n=b.shape[0],
        k=a.shape[1],
        a=a.data_ptr(),
        b=b.data_ptr(),
        a_stride=a.stride(0),
        b_stride=b.stride(0),
        sfa=_Scales(sfa.data_ptr(), sfa.stride(0), sfa.stride(1), gran[0]),
        sfb=_Scales(sfb.data_ptr(), sfb.stride(0), sfb.stride(1), gran[1]),
        gran_k=gran[2],
        d=d.data_ptr(),
        d_stride=d.stride(0),
        d_type=FLOAT32 if d.dtype == torch.float32 else BFLOAT16,
        c=c.data_ptr() if c is not None else None,
        c_stride=0 if c is None or c.dim() == 1 else c.stride(0),
    )
    buffers = [(*region, name) for name, x in dict(a=a, sfa=sfa, b=b, sfb=sfb, d=d, c=c).items() for region in span(x)]
    result: list[ptx_emulator.Stats] = []
    failure: list[BaseException] = []

    def launch(kernel, grid, block, cluster, shared_bytes, params, params_bytes):
        try:
            module, entry = _modules()[kernel.decode()]
            stats = module.launch(
                entry,
                grid=grid,
                block=block,
                cluster=(cluster, 1, 1),
                smem=shared_bytes,
                args=[ctypes.string_at(params, params_bytes)],
                buffers=buffers,
                num_sms=num_sms,
                **options,
            )
            result.append(stats)
            return 0
        except BaseException as error:  # an exception cannot cross the C frames in between
            failure.append(error)
            return 1

    lib = _capi.library()
    error = ctypes.create_string_buffer(4096)
    status = lib.dg_run_fp8_gemm(
        ctypes.byref(problem),
        row,
        num_sms,
        ctypes.c_void_p(ptx_emulator.encode_tiled_function()),
        _LAUNCH(launch),
        error,
        ctypes.c_size_t(len(error)),
    )
    if failure:
        raise failure[0]
    if status != 0:
        raise RuntimeError(error.value.decode())
    return result[0]
