"""Helpers of the emulator's own tests; importing this needs pytest."""

import functools
from pathlib import Path

import pytest

from . import Module, PtxError, Stats, compile_cuda, nvcc_path, tensor_map

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


def module(body: str, params: str = ".param .u64 out", decls: str = "", target: str = "sm_90a") -> Module:
    """A module of one entry `k` with this body."""
    head = f".version 9.0\n.target {target}\n.address_size 64\n"
    return Module(f"{head}{decls}.visible .entry k({params})\n{{\n{body}\nret;\n}}\n")


def expect(kind, f, *args, **kw) -> str:
    """Runs f and checks that the emulator reports a violation of this kind (or of one of a tuple of kinds)."""
    kinds = (kind,) if isinstance(kind, str) else kind
    with pytest.raises(PtxError) as e:
        f(*args, **kw)
    assert e.value.kind in kinds, str(e.value)
    return str(e.value)


def run_pipeline(mod: Module, scaled: int = 0, blocks: int = 6, **options: int) -> Stats:
    """Runs pipeline<scaled> of kernels/pipeline.cu on `blocks` blocks of K and compares its result with torch."""
    torch = pytest.importorskip("torch")
    a, b, out = torch.randn(128, blocks * 64).bfloat16(), torch.randn(64, blocks * 64).bfloat16(), torch.zeros(128, 64)
    maps = [tensor_map(t, "bf16", [64, 64], swizzle=128) for t in (a, b)]
    stats = mod.launch(f"pipelineILb{scaled}E", 2, 160, [*maps, out, blocks, 0.5], **options)
    ref = torch.zeros(128, 64, dtype=torch.float64)
    for k in range(blocks):
        s = slice(k * 64, k * 64 + 64)
        ref = ref * (0.5 if scaled else 1) + a[:, s].double() @ b[:, s].double().T
    assert torch.allclose(out.double(), ref, atol=1e-3)
    return stats
