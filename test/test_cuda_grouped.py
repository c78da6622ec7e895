"""What only a GPU shows of grouped, BF16, batched and split-head products: every compiled row, graphs, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import deep_gemm_ops
from deep_gemm_ops import _capi

from common import LAYOUTS, assert_close, ceil_div, cuda_condition, error_bar, generator, same_bits
from fp4 import Fp4Case
from gemm_emulation import k_multiple
from grouped import BF16Case, Case, EinsumCase, HeadsCase, KGroupedCase, MaskedCase, MGroupedCase, mk_alignment


@pytest.fixture(autouse=True)
def _cuda(cuda: str) -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def rows() -> list[dict[str, Any]]:
    """All but those of dense FP8 products, which test_cuda runs."""
    return [row for row in _capi.instances() if row["family"] != "fp8_gemm" or row["grouping"] != "dense"]


def runnable(row: dict[str, Any]) -> bool:
    return not cuda_condition() and f"sm_{torch.cuda.get_device_capability()[0]}0" in row["arch"]


def cases_of(row: dict[str, Any]) -> Iterator[Case]:
    """Problems for a row, ragged in every direction."""
    block_m, block_n = row["block_m"], row["block_n"]
    type_ = row["family"].removesuffix("_gemm").replace("bf16_fp4", "fp8_fp4")  # tokens become BF16 on the way
    common: dict[str, Any] = {"device": "cuda", "row": row["index"], "type": type_}
    if type_ != "bf16" and row["grouping"] != "k_grouped":
        common |= {"recipe": (1, 128 if row["scaling"] == "1d2d" else 1, row["gran_k"]), "pass_recipe": True}
    if row["scaling"] == "ue8m0":
        common |= {"scales": "packed", "recipe": (1, 1, row["gran_k"], 32)}
    for n, k, data, out_dtype in [
        (block_n, 512, "normal", "bfloat16"),
        (2 * block_n + 40, 1040, "integer", "float32"),
        (block_n + 8, 720, "integer", "bfloat16"),
    ]:
        options = {**common, "data": data, "out_dtype": out_dtype}
        k = ceil_div(k, k_multiple(row)) * k_multiple(row)
        if row["grouping"] == "dense" and type_ == "fp8_fp4":
            del options["type"]
            for m in (1, block_m, 3 * block_m - 5):
                yield Fp4Case(m, n, k, c="bias", out=True, **options)
        elif row["grouping"] == "dense":
            layout = ("t" if row["a_mn_major"] else "n") + ("n" if row["b_mn_major"] else "t")
            for m in (1, block_m, 3 * block_m - 5):
                yield BF16Case(m, n, k, layout, c="bias", out=True, **options)
        elif row["grouping"] == "m_grouped":
            order = "nn" if row["b_mn_major"] else "nt"
            for sizes in [(block_m, 0, 1, 2 * block_m + 3), (5, 3 * block_m - 1, 0)]:
                for layout in ("indices", "psum", "offsets"):
                    for out in (False, True):
                        yield MGroupedCase(sizes, n, k, order, layout=layout, tail=70, out=out, **options)
                if order == "nt":
                    yield MaskedCase(sizes, max(sizes) + 3, n, k, out=True, **options)
        elif row["grouping"] == "k_grouped":
            for sizes in [(128, 0, 1, 300), (k, 33)]:
                for layout in ("sizes", "psum", "offsets"):
                    yield KGroupedCase(sizes, block_m + 8, n, layout=layout, c="alias", **options)
        elif row["grouping"] == "batched":
            expr = "bhd,hdr->bhr" if row["b_mn_major"] else "bhr,hdr->bhd"
            for m in (1, block_m + 1):
                sizes = (m, k, 3, n) if row["b_mn_major"] else (m, n, 3, k)
                yield EinsumCase(expr, sizes, c="full", out=True, **options)
        else:
            yield EinsumCase("bmk,bnk->mn", (5, k, block_m + 1, n), c="full", out=True, **options)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["name"])
def test_every_row(row: dict[str, Any]) -> None:
    if not runnable(row):
        pytest.skip(f"this GPU is no {row['arch']}")
    ran, refused = 0, []
    for case in cases_of(row):
        try:
            case.run()
            ran += 1
        except RuntimeError as error:  # a row may decline a problem, with its reason, never compute it wrongly
            refused.append(f"{case.repro}: {str(error).splitlines()[0]}")
    assert ran > 0, "\n".join(refused)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, which has run before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("type_", ["fp8", "bf16"])
def test_masked_counts_change_between_replays(type_: str) -> None:
    groups, m_max = 6, 192
    case = MaskedCase((m_max,) * groups, m_max, 520, 1040, type_, out=True, data="integer", device="cuda")
    built = case.build()
    *operands, masked_m, _ = built.arguments
    out, op = built.keywords["out"], getattr(torch.ops.deep_gemm, case.op)
    graph, _ = captured(lambda: op.out(*operands, masked_m, 20, out=out))
    for counts in [(0, 1, m_max, 7, 64, 65), (0,) * 6, (m_max,) * 6, (20,) * 6, (0, 0, 0, 0, 0, 1)]:
        masked_m.copy_(torch.tensor(counts, dtype=torch.int32))
        built.buffer.fill_(math.nan)
        graph.replay()
        live = torch.arange(m_max) < torch.tensor(counts)[:, None]
        expected = torch.where(live[:, :, None], built.expected, math.nan).to(out.dtype)
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("type_", ["fp8", "bf16"])
def test_group_sizes_change_between_replays(type_: str) -> None:
    """All layouts of m-grouped and k-grouped products, all rows of padding included (-1 under replay)."""
    for layout in ("indices", "psum", "offsets"):
        case = MGroupedCase((200, 256, 56), 264, 528, "nt", type_, layout, data="integer", device="cuda")
        built = case.build()
        *operands, groups = built.arguments
        op = getattr(torch.ops.deep_gemm, case.op)
        graph, result = captured(lambda op=op, operands=operands, groups=groups, layout=layout: op(
            *operands, groups, layout=layout
        ))  # fmt: skip
        original = groups.clone()
        for contents in (original, torch.full_like(original, -1), original):
            groups.copy_(contents)
            result.fill_(math.nan)
            graph.replay()
            assert same_bits(result, op(*operands, groups, layout=layout)), layout
            if contents is not original:
                assert bool((result == 0).all())
    case = KGroupedCase((200, 256, 56), 136, 264, type=type_, data="integer", sf_tail=3, device="cuda")
    *operands, ks = case.build().arguments
    op = getattr(torch.ops.deep_gemm, case.op)
    graph, result = captured(lambda: op(*operands, ks))
    for sizes in [(0, 512, 0), (128, 128, 256), (0, 0, 0), (1, 2, 509)]:
        ks.copy_(torch.tensor(sizes, dtype=torch.int32))
        result.fill_(math.nan)
        graph.replay()
        assert same_bits(result, op(*operands, ks)), sizes


@pytest.mark.parametrize("type_", ["fp8", "bf16"])
def test_a_graph_keeps_its_alignment(type_: str) -> None:
    """An alignment that is changed between capture and replay changes nothing, and corrupts nothing."""
    for layout in ("indices", "psum"):
        case = MGroupedCase((100, 0, 130, 5), 264, 528, "nt", type_, layout, out=True, device="cuda")
        built = case.build()
        op, out = getattr(torch.ops.deep_gemm, case.op), built.keywords["out"]
        graph, _ = captured(lambda op=op, built=built: op.out(*built.arguments, **built.keywords))
        graph.replay()
        first = built.buffer.clone()
        for alignment in (8, 64, 256):
            with mk_alignment(alignment):
                built.buffer.fill_(math.nan)
                graph.replay()
                torch.testing.assert_close(built.buffer, first, rtol=0, atol=0, equal_nan=True)
        live = built.written[:, 0]
        assert_close(out.cpu()[live], built.expected[live], tol=error_bar(out.dtype, type_))


def test_hostile_layouts_under_replay() -> None:
    """Whatever a layout turns into after capture, memory around the result stays as it was."""
    hostile = [-1, 2**31 - 1, -(2**31), 300, 7]
    for type_ in ("fp8", "bf16"):
        cases: list[tuple[Case, int]] = [
            *[(MGroupedCase((60, 10, 30), 264, 528, "nt", type_, layout, out=True, device="cuda"), -1)
              for layout in ("indices", "psum", "offsets")],
            (MaskedCase((3, 0, 40), 40, 264, 528, type_, out=True, device="cuda"), -2),
            *[(KGroupedCase((128, 0, 256), 40, 264, "tn", type_, layout, out=True, device="cuda"), -1)
              for layout in ("sizes", "psum", "offsets")],
        ]  # fmt: skip
        for case, position in cases:
            built = case.build()
            groups, op = built.arguments[position], getattr(torch.ops.deep_gemm, case.op)
            graph, _ = captured(lambda op=op, built=built: op.out(*built.arguments, **built.keywords))
            built.buffer.fill_(math.nan)
            outside = torch.ones_like(built.buffer, dtype=torch.bool)
            inside = [slice(0, size) for size in built.keywords["out"].shape]
            inside[-1] = slice(2, built.keywords["out"].shape[-1] + 2)
            outside[tuple(inside)] = False
            for shift in range(len(hostile)):
                values = [hostile[(i + shift) % len(hostile)] for i in range(groups.numel())]
                groups.copy_(torch.tensor(values, dtype=torch.int64).to(torch.int32))
                graph.replay()
                torch.cuda.synchronize()
                assert bool(built.buffer[outside].isnan().all()), case.repro


# ---------------------------------------------------------------------------------------------------------------------
# Determinism, streams, sizes


def large_cases() -> list[Case]:
    return [
        MGroupedCase((1000, 0, 513, 3), 1032, 2064, layout="offsets", device="cuda"),
        MGroupedCase((1000, 0, 513, 3), 1032, 2064, "nn", "bf16", "psum", device="cuda"),
        MaskedCase((192, 0, 20, 1), 192, 1032, 2064, out=True, device="cuda"),
        MaskedCase((192, 0, 20, 1), 192, 1032, 2064, "bf16", out=True, device="cuda"),
        KGroupedCase((1000, 0, 513, 3), 520, 1032, device="cuda"),
        KGroupedCase((1024, 0, 512), 520, 1032, "nt", device="cuda"),
        KGroupedCase((1000, 0, 513, 3), 520, 1032, "padded", device="cuda"),
        KGroupedCase((1000, 0, 513, 3), 520, 1032, type="bf16", device="cuda"),
        EinsumCase("bmk,bnk->mn", (37, 512, 200, 264), device="cuda"),
        EinsumCase("bhr,hdr->bhd", (130, 264, 16, 528), device="cuda"),
        EinsumCase("bhd,hdr->bhr", (130, 264, 16, 528), device="cuda"),
        *[EinsumCase(expr, (130, 272, 8, 528), "fp8", device="cuda") for expr in ("bhr,hdr->bhd", "bhd,hdr->bhr")],
        EinsumCase("bhd,bhr->hdr", (130, 272, 8, 528), "fp8", (1, 1, 128), device="cuda"),
        *[BF16Case(1000, 1032, 2064, layout, c="bias", device="cuda") for layout in LAYOUTS],
        HeadsCase(513, 8, (128, 64, 128), 2064, device="cuda"),
    ]


@pytest.mark.parametrize("case", large_cases(), ids=lambda case: f"{case.op}-{getattr(case, 'expr', '')}")
def test_same_bits_every_time(case: Case) -> None:
    """Also beside other work and on fewer SMs."""
    first = case.run()
    for num_sms in (0, 0, 17):
        deep_gemm_ops.set_num_sms(num_sms)
        try:
            torch.empty(1 << 24, device="cuda").fill_(math.nan)
            again = case.run()
        finally:
            deep_gemm_ops.set_num_sms(0)
        assert num_sms or same_bits(first, again), case.repro


def test_nothing_waits_for_the_device() -> None:
    calls = []
    for case in large_cases():
        built = case.build()
        op = getattr(torch.ops.deep_gemm, case.op)
        op = op.out if built.buffer is not None else op.default
        calls.append(lambda op=op, built=built: op(*built.arguments, **built.keywords))
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


@pytest.mark.parametrize(("groups", "rows"), [(4, 8192), (8, 4096)])
def test_experts_of_real_sizes(groups: int, rows: int) -> None:
    """Against float32 products on the GPU, a matrix for each expert."""
    n, k = 4096, 2048
    x = torch.randn(groups * rows, k, generator=generator(0)).bfloat16().cuda()
    w = torch.randn(groups, n, k, generator=generator(1)).bfloat16().cuda()
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device="cuda") * rows
    bf16 = deep_gemm_ops.m_grouped_bf16_gemm_nt_contiguous(x, w, ends, layout="offsets")
    gradient = deep_gemm_ops.k_grouped_bf16_gemm_tn_contiguous(bf16, x, ends, layout="offsets")
    for group in range(groups):
        part = slice(group * rows, (group + 1) * rows)
        expected = x[part].float() @ w[group].float().t()
        assert_close(bf16[part], expected, tol=error_bar(torch.bfloat16), tile=(128, 128))
        expected = bf16[part].float().t() @ x[part].float()
        assert_close(gradient[group], expected, tol=1e-3, tile=(128, 128))  # the oracle is float32, too
