import numpy as np
import pytest

from ptx_emulator.testing import expect, kernels

SEEDS = range(4)


@pytest.mark.parametrize("n", [1, 31, 1000])
def test_vadd(n):
    a, b = np.random.randn(2, n).astype(np.float32)
    c = np.zeros(n, np.float32)
    kernels("basic").launch("vadd", -(-n // 256), 256, [a, b, c, n]) if n != 31 else kernels("basic").launch(
        "vadd", 1, 31, [a, b, c, n]
    )
    assert np.array_equal(c, a + b)


def test_divergent_loops():
    out = np.zeros(200, np.int32)
    kernels("basic").launch("collatz", 2, 128, [out, 200])

    def steps(x):
        s = 0
        while x > 1:
            x, s = (3 * x + 1 if x & 1 else x // 2), s + 1
        return s

    assert out.tolist() == [steps(i) for i in range(200)]


def test_block_reduce():
    a, out = np.random.randn(1024).astype(np.float32), np.zeros(1, np.float32)
    kernels("basic").launch("block_reduce", 2, 512, [a, out])
    assert abs(out[0] - a.sum()) < 1e-3


def test_warp_ops():
    out = np.zeros(192, np.uint32)
    kernels("basic").launch("warp_ops", 1, 32, [out])
    lanes = np.arange(32)
    assert (out[:32] == sum(1 << i for i in range(0, 32, 3))).all()
    assert out[32:64].tolist() == [sum(1 << j for j in range(32) if j // 5 == i // 5) for i in range(32)]
    assert (out[64:96] == 496).all()
    assert out[96:128].tolist() == [max(i - 3, 0) if i >= 3 else i for i in range(32)]
    assert out[129] == 0xAAAAAAAA or out[129] & 2
    assert (out[160:192] == np.where(lanes < 16, 15, 31)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_of_one_warp_make_progress(seed):
    out = np.zeros(1, np.int32)
    kernels("basic").launch("lane_handoff", 1, 32, [out], seed=seed)
    assert out[0] == 42


@pytest.mark.parametrize("seed", SEEDS)
def test_ctas_are_co_resident(seed):
    flag, out = np.zeros(1, np.int32), np.zeros(16, np.int32)
    kernels("basic").launch("cta_chain", 16, 32, [flag, out], seed=seed)
    assert out.tolist() == list(range(15, -1, -1))


def test_calls_and_printf():
    out = np.zeros(32, np.int32)
    st = kernels("basic").launch("calls", 1, 32, [out])
    expected = []
    for v in range(32):
        acc = 0
        for _ in range(3):
            acc, v = acc + v, 2 * v + 1
        expected.append(v + acc)
    assert out.tolist() == expected
    assert st.output == "value 31 of calls 1.25\n"


def test_named_barriers():
    for seed in SEEDS:
        out = np.zeros(64, np.int32)
        kernels("basic").launch("named_barriers", 1, 128, [out], seed=seed)
        assert out.tolist() == [3 * i for i in range(64)]


def test_conversions():
    torch = pytest.importorskip("torch")
    x = torch.cat(
        [torch.randn(1000) * s for s in (1e-8, 1e-3, 1, 300, 1e6)]
        + [torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504, 65520, 448, 464, 480])]
    )
    n = x.numel()
    bf, hf, f8, i = (np.zeros(n, t) for t in (np.uint16, np.uint16, np.uint16, np.int32))
    kernels("basic").launch("conversions", -(-n // 128), 128, [x, bf, hf, f8, i, n])
    assert np.array_equal(bf, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(hf, x.half().view(torch.int16).numpy().view(np.uint16))
    sat = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(f8 & 255, sat)
    assert np.array_equal(f8 >> 8, x.clamp(-57344, 57344).to(torch.float8_e5m2).view(torch.uint8).numpy())
    ref = np.clip(np.rint(x.double().numpy()), -(2**31), 2**31 - 1).astype(np.int64)
    assert np.array_equal(i, ref)


@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async(seed):
    a, b = np.random.randn(128, 4).astype(np.float32), np.zeros((128, 4), np.float32)
    kernels("basic").launch("cp_async_copy", 1, 128, [a, b], seed=seed)
    assert np.array_equal(b, a[::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_distributed_shared_memory(seed):
    out = np.zeros(256, np.int32)
    kernels("basic").launch("dsmem_rotate", 8, 32, [out], seed=seed)
    assert out.tolist() == [((c % 4 + 1) % 4) * 100 + t for c in range(8) for t in range(32)]


def test_ldmatrix_stmatrix_round_trip():
    a = np.random.randint(0, 2**32, 128, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    kernels("basic").launch("ldst_matrix", 1, 32, [a, out])
    assert np.array_equal(a, out)


def test_mma_sync():
    torch = pytest.importorskip("torch")
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    d = torch.zeros(16, 8)
    kernels("basic").launch("mma_bf16", 1, 32, [a, b, d])
    assert torch.allclose(d.double(), a.double() @ b.double().T, atol=1e-5)


def test_global_out_of_bounds():
    a, b, c = np.ones((3, 1000), np.float32)
    a, b, c = a.copy(), b.copy(), c.copy()
    text = expect("global_bounds", kernels("basic").launch, "vadd_oob", 4, 256, [a, b, c, 1000])
    assert "lane 8" in text and "vadd_oob" in text


def test_shared_memory_checks():
    out = np.zeros(32, np.int32)
    kernels("basic").launch("bug_smem_oob", 1, 32, [out, 0])
    expect("smem_bounds", kernels("basic").launch, "bug_smem_oob", 1, 32, [out, 1])
    expect("uninit_smem", kernels("basic").launch, "bug_uninit_smem", 1, 32, [out])


def test_misaligned():
    expect(
        "misaligned",
        kernels("basic").launch,
        "bug_misaligned",
        1,
        32,
        [np.zeros(256, np.uint8), np.zeros(32, np.int32)],
    )


def test_deadlock_and_budget():
    text = expect("deadlock", kernels("basic").launch, "bug_divergent_barrier", 1, 64, [np.zeros(64, np.int32)])
    assert "barrier 1 (32 of 64 threads)" in text
    expect("budget", kernels("basic").launch, "bug_endless", 1, 32, [np.zeros(1, np.int32)], budget=100000)


def test_mixed_arithmetic():
    n, m64 = 600, 2**64 - 1
    a = np.random.randint(0, 2**63, n, dtype=np.uint64) * np.uint64(2) + np.random.randint(0, 2, n).astype(np.uint64)
    out = np.zeros(n, np.uint64)
    kernels("basic").launch("mixed", -(-n // 96), 96, [a, out, n])

    def ref(t):
        x, y = int(a[t]), int(a[(t + 1) % n]) | 1
        lo, hi = x & 0xFFFFFFFF, y & 0xFFFFFFFF
        local = [(x >> 8 * i) & 255 for i in range(8)]
        k = t % 12
        if k == 4:
            s = (x >> 59) & 31
            return ((hi << 32 | lo) << s >> 32) & 0xFFFFFFFF
        if k == 5:
            return sum(((hi << 32 | lo) >> 8 * ((0x3715 >> 4 * i) & 7) & 255) << 8 * i for i in range(4))
        if k == 10:
            f = np.float32(np.float64(np.float32(x >> 40)) / np.float64(np.float32(y >> 44) + np.float32(1)))
            exact = np.float64(np.float32(x >> 40)) / np.float64(np.float32(y >> 44) + np.float32(1))
            return int((f if f <= exact else np.nextafter(f, np.float32(0))).view(np.uint32))
        return [
            x // y,
            x % y,
            x * y >> 64,
            x * y & m64,
            0,
            0,
            bin(x).count("1") * 100 + 64 - (y >> 7).bit_length(),
            int(f"{x:064b}"[::-1], 2),
            local[x & 7] + local[(x >> 3) & 7],
            ((x - (x >> 63 << 64)) >> (y & 63)) & m64,
            0,
            min(x, y) ^ (x << (y & 63)) & m64,
        ][k]

    bad = [t for t in range(n) if int(out[t]) != ref(t)]
    assert not bad, [(t % 12, hex(int(out[t])), hex(ref(t))) for t in bad[:4]]
