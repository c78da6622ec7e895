"""What only a GPU shows: every compiled row, determinism, graphs, streams, several devices, real sizes."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import _capi, reference

from common import (
    FP8,
    LAYOUTS,
    ROOT,
    GemmCase,
    assert_close,
    cuda_condition,
    error_bar,
    generator,
    random_gemm_case,
    same_bits,
)
from grouped import BF16Case

FUZZ_CASES = int(os.environ.get("DG_FUZZ_CASES", "150"))


@pytest.fixture(autouse=True)
def _cuda(cuda: str) -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def rows() -> list[dict[str, Any]]:
    """Those that the FP8 operators below can be forced to use."""
    return [row for row in _capi.instances() if row["family"] == "fp8_gemm" and row["grouping"] == "dense"]


def runnable(row: dict[str, Any]) -> bool:
    """Whether this GPU is the one that the row is compiled for."""
    return not cuda_condition() and f"sm_{torch.cuda.get_device_capability()[0]}0" in row["arch"]


def row_recipes(row: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Recipes that a row's scaling mode serves."""
    gran_k = row["gran_k"]
    return [(1, 128, gran_k), (128, 128, gran_k)] if row["scaling"] == "1d2d" else [(1, 1, gran_k), (128, 1, gran_k)]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_every_row(row: dict[str, Any]) -> None:
    """Each compiled kernel, on sizes that are ragged in every direction, poisoned around the result."""
    if not runnable(row):
        pytest.skip(f"this GPU is no {row['arch']}")
    block_m, block_n = row["block_m"], row["block_n"]
    sizes = [
        (1, 128, 512),
        (block_m, block_n, 1024),
        (block_m + 1, block_n + 1, 1040),
        (3 * block_m - 5, 2 * block_n + 37, 720),
        (17, 3 * block_n + 3, 2064),
    ]
    ran, refused = 0, []
    for (m, n, k), recipe in [(size, recipe) for size in sizes for recipe in row_recipes(row)]:
        for data, out_dtype, c in [
            ("integer", "bfloat16", ""),
            ("integer", "float32", "bias"),
            ("normal", "bfloat16", "alias"),
            ("normal", "float32", ""),
        ]:
            case = GemmCase(
                m,
                n,
                k,
                "nt",
                recipe,
                True,
                c=c,
                out_dtype=out_dtype,
                data=data,
                out=True,
                device="cuda",
                row=row["index"],
            )
            try:
                case.run()
                ran += 1
            except RuntimeError as error:  # a row may decline a problem, with its reason, never compute it wrongly
                refused.append(f"{case.repro}: {str(error).splitlines()[0]}")
    assert ran > 0, "\n".join(refused)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", _capi.instances("sm_100a"), ids=lambda row: row["name"])
def test_every_row_of_sm100(row: dict[str, Any], layout: str) -> None:
    """Each kernel in each layout, on ragged sizes, poisoned around the result; FP8 scales of both granularities."""
    if not runnable(row):
        pytest.skip(f"this GPU is no {row['arch']}")
    m, n = 2 * row["block_m"] + 5, 2 * row["block_n"] + 9
    ran, refused = 0, []
    for k, (out_dtype, c), data in itertools.product(
        (100, 1040), [("bfloat16", ""), ("float32", "bias"), ("bfloat16", "alias")], ("integer", "normal")
    ):
        options = {"out_dtype": out_dtype, "c": c, "data": data, "out": True, "device": "cuda", "row": row["index"]}
        cases: list[Any] = [BF16Case(m, n, k, layout, **options)]
        if row["scaling"] == "ue8m0":
            recipes = [(1, 128, 128), (1, 1, 32)]
            cases = [GemmCase(m, n, k, layout, recipe, True, "packed", **options) for recipe in recipes]
        for case in cases:
            try:
                case.run()
                ran += 1
            except RuntimeError as error:  # a row may decline a layout, with its reason, never compute it wrongly
                refused.append(str(error).splitlines()[0])
    assert ran > 0 or all("too few columns for an MN-major operand" in reason for reason in refused), refused


def test_rows_are_listed_once() -> None:
    names = [row["name"] for row in rows()]
    assert len(names) == len(set(names))
    assert [row["index"] for row in rows()] == list(range(len(names)))


@pytest.mark.parametrize("seed", range(FUZZ_CASES))
def test_fuzz_with_larger_sizes(seed: int) -> None:
    random_gemm_case(10_000 + seed, "cuda", max_mn=1500, max_k=4000).run()


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 7168, 16384),
        (16, 4096, 7168),
        (64, 2112, 7168),
        (128, 576, 7168),
        (129, 24576, 1536),
        (1000, 32768, 512),
        (4096, 7168, 2048),
    ],
)
def test_model_shapes(m: int, n: int, k: int) -> None:
    """Sizes of real layers, against float32 products on the GPU (float64 would dominate the run)."""
    random = generator(m)
    x = torch.randn(m, k, generator=random).bfloat16().cuda()
    w = torch.randn(n, k, generator=random).bfloat16().cuda()
    a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
    b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w)
    expected = reference.dequantize(a, sfa, 1, 128) @ reference.dequantize(b, sfb, 128, 128).t()
    for out_dtype in (torch.bfloat16, torch.float32):
        result = deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb, out_dtype=out_dtype)
        repro = f"test/test_cuda.py::test_model_shapes[{m}-{n}-{k}]"
        assert_close(result, expected, tol=error_bar(out_dtype), tile=(128, 128), repro=repro)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 7168), (64, 576, 7168), (128, 2112, 16384), (300, 1000, 4000)])
def test_same_bits_every_time(m: int, n: int, k: int) -> None:
    """Also where K is split over several blocks, and with other work in between."""
    for out_dtype in ("bfloat16", "float32"):
        arguments, keywords, _, _ = GemmCase(
            m, n, k, c="bias", out_dtype=out_dtype, scales="random", device="cuda"
        ).build()
        results = []
        for _ in range(8):
            results.append(torch.ops.deep_gemm.fp8_gemm_nt(*arguments, **keywords))
            torch.empty(1 << 24, device="cuda").fill_(math.nan)
        assert all(same_bits(results[0], result) for result in results[1:])


def test_capture_and_replay() -> None:
    """A graph replays casts and products of every layout on new contents of the same memory."""
    m, n, k = 130, 272, 400
    x, w = torch.empty(m, k, device="cuda").bfloat16(), torch.empty(n, k, device="cuda").bfloat16()

    def step() -> list[torch.Tensor]:
        a, sfa = deep_gemm_ops.per_token_cast_to_fp8(x)
        b, sfb = deep_gemm_ops.per_block_cast_to_fp8(w)
        at, sfat = deep_gemm_ops.per_channel_cast_to_fp8(x.t().contiguous())
        bt, sfbt = deep_gemm_ops.per_channel_cast_to_fp8(w.t().contiguous(), use_packed_ue8m0=True)
        results = [
            deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb),
            deep_gemm_ops.fp8_gemm_nn(a, sfa, bt, sfbt, out_dtype=torch.float32),
            deep_gemm_ops.fp8_gemm_tn(at, sfat, bt, sfbt),
            deep_gemm_ops.fp8_gemm_tt(at, sfat, b, sfb),
        ]
        results.append(deep_gemm_ops.fp8_gemm_nt(a, sfa, b, sfb, c=results[0], out=results[0].clone()))
        return results

    x.normal_()
    w.normal_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        w.normal_()
        for result in captured:
            result.fill_(math.nan)
        graph.replay()
        for actual, expected in zip(captured, step()):
            assert same_bits(actual, expected), seed


def test_a_graph_keeps_its_knobs() -> None:
    """Changing a knob between capture and replay changes nothing in the graph, and breaks nothing."""
    arguments, keywords, expected, _ = GemmCase(128, 2112, 4096, device="cuda").build()
    torch.ops.deep_gemm.fp8_gemm_nt(*arguments, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.ops.deep_gemm.fp8_gemm_nt(*arguments, **keywords)
    before = deep_gemm_ops.get_pdl(), deep_gemm_ops.get_mk_alignment_for_contiguous_layout()
    try:
        graph.replay()
        first = result.clone()
        deep_gemm_ops.set_num_sms(16)
        deep_gemm_ops.set_pdl(not before[0])
        deep_gemm_ops.set_mk_alignment_for_contiguous_layout(64)
        result.fill_(math.nan)
        graph.replay()
        assert same_bits(result, first)
    finally:
        deep_gemm_ops.set_num_sms(0)
        deep_gemm_ops.set_pdl(before[0])
        deep_gemm_ops.set_mk_alignment_for_contiguous_layout(before[1])
    assert_close(first, expected, tol=error_bar(torch.bfloat16))


@pytest.mark.parametrize("num_sms", [1, 7, 64, 10_000])
@pytest.mark.parametrize("pdl", [False, True])
def test_knobs_do_not_change_values(num_sms: int, pdl: bool) -> None:
    before = deep_gemm_ops.get_pdl()
    try:
        deep_gemm_ops.set_num_sms(num_sms)
        deep_gemm_ops.set_pdl(pdl)
        for m, n, k in [(1, 576, 2048), (130, 700, 1040), (513, 1025, 272)]:
            GemmCase(m, n, k, data="integer", c="full", device="cuda").run()
    finally:
        deep_gemm_ops.set_num_sms(0)
        deep_gemm_ops.set_pdl(before)


def test_dependent_launches_back_to_back() -> None:
    """Each product reads what the kernel before it wrote: a missing dependency shows as a wrong value."""
    one = torch.ones(64, 2, device="cuda")
    eye = torch.eye(256, device="cuda").to(FP8)
    for _ in range(200):
        x = torch.randint(-3, 4, (64, 256), device="cuda").float()
        total = torch.zeros(64, 256, device="cuda")
        for _ in range(4):
            deep_gemm_ops.fp8_gemm_nt(x.to(FP8), one, eye, torch.ones(2, 2, device="cuda"), c=total, out=total)
        assert torch.equal(total, 4 * x)


def test_the_current_stream_is_used() -> None:
    """Work waits for the stream it is on, and for no other."""
    case = GemmCase(130, 272, 400, device="cuda")
    (a, sfa, b, sfb), _, expected, _ = case.build()
    torch.ops.deep_gemm.fp8_gemm_nt(a, sfa, b, sfb)  # loading a kernel for the first time may wait for the device
    late = torch.zeros_like(a)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(a)
        result = torch.ops.deep_gemm.fp8_gemm_nt(late, sfa, b, sfb)
    assert not side.query(), "the call waited for the device"
    side.synchronize()
    assert_close(result, expected, tol=error_bar(torch.bfloat16), repro=case.repro)


def test_nothing_waits_for_the_device() -> None:
    arguments, keywords, _, _ = GemmCase(130, 272, 400, scales="packed", pass_recipe=True, device="cuda").build()
    x = torch.randn(130, 272, device="cuda").bfloat16()
    ks = torch.tensor([128, 256], dtype=torch.int32, device="cuda")
    sf = torch.ones(3, 40, device="cuda")
    calls = [
        *[
            lambda kind=kind: getattr(deep_gemm_ops, f"{kind}_cast_to_fp8")(x)
            for kind in ("per_token", "per_channel", "per_block")
        ],
        lambda: torch.ops.deep_gemm.fp8_gemm_nt(*arguments, **keywords),
        lambda: deep_gemm_ops.get_mn_major_tma_aligned_tensor(sf),
        lambda: deep_gemm_ops.get_mn_major_tma_aligned_packed_ue8m0_tensor(sf),
        lambda: deep_gemm_ops.get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf, ks),
    ]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(50_000_000)
    for call in calls:
        call()
    assert not torch.cuda.current_stream().query(), "a call waited for the device"


def test_memory_comes_from_pytorch() -> None:
    """No allocation outside PyTorch's caching allocator."""
    arguments, keywords, _, _ = GemmCase(64, 576, 7168, "tn", (1, 1, 128), device="cuda").build()
    op = torch.ops.deep_gemm.fp8_gemm_tn
    op(*arguments, **keywords)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    for _ in range(20):
        op(*arguments, **keywords)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() == before


def test_two_devices(two_cuda_devices: tuple[str, str]) -> None:
    """Each call runs on the device of its tensors, whichever is current."""
    for current in (0, 1):
        with torch.cuda.device(current):
            for device in two_cuda_devices:
                for layout in LAYOUTS:
                    result = GemmCase(100, 272, 400, layout, device=device).run()
                    assert result.device == torch.device(device)
                values, scales = deep_gemm_ops.per_token_cast_to_fp8(torch.ones(5, 130, device=device))
                assert values.device == scales.device == torch.device(device)


def test_results_equal_the_cpu_reference() -> None:
    """The two implementations agree on exact data bit for bit, through casts, layouts and products."""
    for seed in range(20):
        case = random_gemm_case(seed, "cpu")
        case = GemmCase(
            **{**case.__dict__, "data": "integer", "scales": "float32", "out": False, "c": "", "device": "cpu"}
        )
        on_gpu = GemmCase(**{**case.__dict__, "device": "cuda"})
        assert same_bits(case.run(), on_gpu.run()), on_gpu.repro


def test_configurations_are_printed_once() -> None:
    code = (
        "import torch, deep_gemm_ops as d\n"
        "x = torch.ones(64, 512, device='cuda').to(torch.float8_e4m3fn)\n"
        "s = torch.ones(64, 4, device='cuda')\n"
        "for _ in range(3): d.fp8_gemm_nt(x, s, x, s)\n"
    )
    environment = {**os.environ, "DG_PRINT_CONFIGS": "1", "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("deep_gemm: M = 64, N = 64")]
    assert len(lines) == 1, run.stdout + run.stderr
