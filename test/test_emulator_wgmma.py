import pytest

import ptx_emulator
from ptx_emulator.testing import expect, kernels

torch = pytest.importorskip("torch")
SEEDS = range(3)


def k_major(span, bug=0, **kw):
    a, b, out = torch.randn(64, span // 2).bfloat16(), torch.randn(64, span // 2).bfloat16(), torch.zeros(64, 64)
    maps = [ptx_emulator.tensor_map(t, "bf16", [span // 2, 64], swizzle=span) for t in (a, b)]
    kernels("wgmma").launch(f"gemm_k_majorILi{span}ELi{bug}E", 1, 128, [*maps, out], **kw)
    return a.double() @ b.double().T, out


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("seed", SEEDS)
def test_k_major(span, seed):
    ref, out = k_major(span, seed=seed)
    assert torch.allclose(out.double(), ref, atol=1e-4)


def test_mn_major():
    a, b, out = torch.randn(16, 64).bfloat16(), torch.randn(16, 64).bfloat16(), torch.zeros(64, 64)
    maps = [ptx_emulator.tensor_map(t, "bf16", [64, 16], swizzle=128) for t in (a, b)]
    kernels("wgmma").launch("gemm_mn_major", 1, 128, [*maps, out])
    assert torch.allclose(out.double(), a.double().T @ b.double(), atol=1e-4)


def fp8(rows, **options):
    a, b = (torch.randn(64, 32).to(torch.float8_e4m3fn) for _ in range(2))
    out = torch.zeros(64, 64)
    kernels("wgmma").launch("gemm_fp8_noswizzle", 1, 128, [a, b, out, rows], **options)
    return a.double() @ b.double().T, out


@pytest.mark.parametrize("hopper", [False, True])
def test_fp8(hopper):
    ref, out = fp8(64, hopper_sums=hopper)
    err = (out.double() - ref).abs().max()
    assert err < (0.1 if hopper else 1e-5)
    assert not hopper or err > 1e-4


@pytest.mark.parametrize("hopper", [False, True])
def test_rows_that_nothing_wrote(hopper):
    ref, out = fp8(43, nan_operands=True, hopper_sums=hopper)
    assert torch.allclose(out[:43].double(), ref[:43], atol=0.1)
    assert out[43:].isnan().all()
    expect("uninit_smem", fp8, 43, hopper_sums=hopper)


@pytest.mark.parametrize(
    "bug,kind", [(1, "proxy_fence"), (2, "wgmma_register"), (3, ("inflight_overwrite", "proxy_fence"))]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_bugs(bug, kind, seed):
    expect(kind, k_major, 128, bug, seed=seed)
