"""Helpers of the emulator's own tests."""

import functools
from pathlib import Path

import pytest

from . import Module, PtxError, compile_cuda, nvcc_path

KERNELS = Path(__file__).resolve().parent / "kernels"


@functools.cache
def kernel_ptx(name: str, arch: str = "90a") -> str:
    """The PTX of kernels/<name>.cu, compiled once per process."""
    if nvcc_path() is None:
        pytest.skip("nvcc not found")
    return compile_cuda(KERNELS / f"{name}.cu", arch, include=[KERNELS])


@functools.cache
def kernels(name: str, arch: str = "90a") -> Module:
    """The module of kernels/<name>.cu."""
    return Module(kernel_ptx(name, arch))


def expect(kind, f, *args, **kw) -> str:
    """Runs f and checks that the emulator reports a violation of this kind (or of one of a tuple of kinds)."""
    kinds = (kind,) if isinstance(kind, str) else kind
    with pytest.raises(PtxError) as e:
        f(*args, **kw)
    assert e.value.kind in kinds, str(e.value)
    return str(e.value)
