"""Which compiled kernel a problem selects: a change of the table or of the cost model shows here, to be accepted."""

from __future__ import annotations

import itertools

import pytest
from expecttest import assert_expected_inline

from deep_gemm_ops import _capi

pytestmark = pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library")

SHAPES = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]


def table(recipe: tuple[int, int, int], num_sms: int) -> str:
    lines = []
    for n, k in SHAPES:
        for m in (1, 16, 64, 128, 1024, 4096):
            lines.append(f"{m} {n} {k}: {_capi.select(m, n, k, recipe=recipe, num_sms=num_sms)['name']}")
    return "\n".join(lines)


def test_activations_by_weights() -> None:
    assert_expected_inline(
        table((1, 128, 128), 132),
        """\
1 2112 7168: sm90_fp8_1d2d_m8n64_swap_splitk2_kwg2
16 2112 7168: sm90_fp8_1d2d_m16n64_swap_splitk2_kwg2
64 2112 7168: sm90_fp8_1d2d_m64n32_splitk2_kwg2
128 2112 7168: sm90_fp8_1d2d_m64n32_kwg2
1024 2112 7168: sm90_fp8_1d2d_m192n96
4096 2112 7168: sm90_fp8_1d2d_m192n128
1 576 7168: sm90_fp8_1d2d_m8n64_swap_splitk8_kwg2
16 576 7168: sm90_fp8_1d2d_m16n64_swap_splitk8
64 576 7168: sm90_fp8_1d2d_m64n64_swap_splitk8
128 576 7168: sm90_fp8_1d2d_m64n64_splitk4
1024 576 7168: sm90_fp8_1d2d_m64n96
4096 576 7168: sm90_fp8_1d2d_m192n96
1 24576 1536: sm90_fp8_1d2d_m8n64_swap_kwg2
16 24576 1536: sm90_fp8_1d2d_m16n64_swap_kwg2
64 24576 1536: sm90_fp8_1d2d_m64n96
128 24576 1536: sm90_fp8_1d2d_m128n192
1024 24576 1536: sm90_fp8_1d2d_m256n128
4096 24576 1536: sm90_fp8_1d2d_m256n128
1 32768 512: sm90_fp8_1d2d_m8n128_swap
16 32768 512: sm90_fp8_1d2d_m16n128_swap
64 32768 512: sm90_fp8_1d2d_m64n128
128 32768 512: sm90_fp8_1d2d_m128n128
1024 32768 512: sm90_fp8_1d2d_m256n128
4096 32768 512: sm90_fp8_1d2d_m256n128_cols2
1 7168 16384: sm90_fp8_1d2d_m8n128_swap_splitk4
16 7168 16384: sm90_fp8_1d2d_m16n128_swap_splitk4
64 7168 16384: sm90_fp8_1d2d_m64n64_cols4_kwg2
128 7168 16384: sm90_fp8_1d2d_m128n64_cols4
1024 7168 16384: sm90_fp8_1d2d_m128n112
4096 7168 16384: sm90_fp8_1d2d_m256n128
1 4096 7168: sm90_fp8_1d2d_m8n64_swap_splitk2_kwg2
16 4096 7168: sm90_fp8_1d2d_m16n64_swap_splitk2_kwg2
64 4096 7168: sm90_fp8_1d2d_m64n32_kwg2
128 4096 7168: sm90_fp8_1d2d_m128n64_splitk2
1024 4096 7168: sm90_fp8_1d2d_m256n128
4096 4096 7168: sm90_fp8_1d2d_m256n128
1 7168 2048: sm90_fp8_1d2d_m8n64_swap_kwg2
16 7168 2048: sm90_fp8_1d2d_m16n64_swap_kwg2
64 7168 2048: sm90_fp8_1d2d_m64n64_cols4_kwg2
128 7168 2048: sm90_fp8_1d2d_m128n64_cols4
1024 7168 2048: sm90_fp8_1d2d_m256n128
4096 7168 2048: sm90_fp8_1d2d_m256n128""",
    )


def test_weight_gradients() -> None:
    lines = []
    for m, n, k in [(2112, 7168, 4096), (7168, 2048, 4096), (4096, 7168, 100), (64, 64, 32768)]:
        for recipe in [(1, 1, 128), (1, 1, 32)]:
            choice = _capi.select(m, n, k, recipe=recipe, float_output=True, num_sms=132)["name"]
            lines.append(f"{m} {n} {k} {recipe}: {choice}")
    assert_expected_inline(
        "\n".join(lines),
        """\
2112 7168 4096 (1, 1, 128): sm90_fp8_1d1d_m256n128_cols2
2112 7168 4096 (1, 1, 32): sm90_fp8_1d1d_m128n128_gran32
7168 2048 4096 (1, 1, 128): sm90_fp8_1d1d_m128n128
7168 2048 4096 (1, 1, 32): sm90_fp8_1d1d_m128n128_gran32
4096 7168 100 (1, 1, 128): sm90_fp8_1d1d_m256n128_cols2
4096 7168 100 (1, 1, 32): sm90_fp8_1d1d_m128n128_gran32
64 64 32768 (1, 1, 128): sm90_fp8_1d1d_m64n64_splitk4
64 64 32768 (1, 1, 32): sm90_fp8_1d1d_m64n64_gran32""",
    )


def test_groups_along_k() -> None:
    """Weight gradients of experts, and sums over a batch."""
    lines = []
    for groups, m, n, k in [(8, 2048, 7168, 32768), (8, 4096, 7168, 32768), (32, 512, 512, 8192), (256, 256, 64, 4096)]:
        for recipe in [(1, 1, 128), None]:
            choice = _capi.select(
                m, n, k, recipe=recipe, layout="tn", float_output=True, grouping="k_grouped", num_groups=groups
            )
            lines.append(f"{groups} groups, {m} {n} {k}: {choice['name']}")
    for groups, m, n, k in [(64, 128, 512, 128), (8, 4096, 4096, 1024), (512, 64, 128, 64), (4, 512, 512, 4096)]:
        choice = _capi.select(m, n, k, recipe=None, grouping="summed", num_groups=groups)
        lines.append(f"sum of {groups}, {m} {n} {k}: {choice['name']}")
    assert_expected_inline(
        "\n".join(lines),
        """\
8 groups, 2048 7168 32768: sm90_fp8_1d1d_m256n128_kgrouped_cols2
8 groups, 2048 7168 32768: sm90_bf16_tn_m128n256_kgrouped_rows2
8 groups, 4096 7168 32768: sm90_fp8_1d1d_m256n128_kgrouped_cols2
8 groups, 4096 7168 32768: sm90_bf16_tn_m128n256_kgrouped_rows2
32 groups, 512 512 8192: sm90_fp8_1d1d_m256n128_kgrouped
32 groups, 512 512 8192: sm90_bf16_tn_m128n256_kgrouped
256 groups, 256 64 4096: sm90_fp8_1d1d_m256n128_kgrouped
256 groups, 256 64 4096: sm90_bf16_tn_m128n128_kgrouped
sum of 64, 128 512 128: sm90_bf16_nt_m64n128_summed_splitk8
sum of 8, 4096 4096 1024: sm90_bf16_nt_m128n256_summed
sum of 512, 64 128 64: sm90_bf16_nt_m64n128_summed_splitk8
sum of 4, 512 512 4096: sm90_bf16_nt_m64n128_summed_splitk8""",
    )


def test_bf16() -> None:
    lines = []
    for n, k in [(2112, 7168), (24576, 1536), (4096, 7168)]:
        for m, layout in [(1, "nt"), (16, "nn"), (64, "nt"), (128, "tn"), (1024, "nt"), (4096, "nn"), (8192, "tt")]:
            choice = _capi.select(m, n, k, recipe=None, layout=layout, num_sms=132)["name"]
            lines.append(f"{m} {n} {k} {layout}: {choice}")
    assert_expected_inline(
        "\n".join(lines),
        """\
1 2112 7168 nt: sm90_bf16_nt_m8n64_swap_splitk2
16 2112 7168 nn: sm90_bf16_nn_m16n64_swap_splitk4
64 2112 7168 nt: sm90_bf16_nt_m64n32
128 2112 7168 tn: sm90_bf16_tn_m64n64
1024 2112 7168 nt: sm90_bf16_nt_m128n144
4096 2112 7168 nn: sm90_bf16_nn_m128n192
8192 2112 7168 tt: sm90_bf16_tt_m128n128
1 24576 1536 nt: sm90_bf16_nt_m8n64_swap
16 24576 1536 nn: sm90_bf16_nn_m16n64_swap
64 24576 1536 nt: sm90_bf16_nt_m64n64
128 24576 1536 tn: sm90_bf16_tn_m128n192
1024 24576 1536 nt: sm90_bf16_nt_m128n256_rows2
4096 24576 1536 nn: sm90_bf16_nn_m128n256_rows2
8192 24576 1536 tt: sm90_bf16_tt_m128n256_rows2
1 4096 7168 nt: sm90_bf16_nt_m8n64_swap_splitk2
16 4096 7168 nn: sm90_bf16_nn_m16n64_swap
64 4096 7168 nt: sm90_bf16_nt_m64n32
128 4096 7168 tn: sm90_bf16_tn_m64n64
1024 4096 7168 nt: sm90_bf16_nt_m128n256_rows2
4096 4096 7168 nn: sm90_bf16_nn_m128n256_rows2
8192 4096 7168 tt: sm90_bf16_tt_m128n256_rows2""",
    )


def grouped(cases: list[dict]) -> str:
    lines = []
    for n, k in [(6144, 7168), (7168, 3072), (4096, 2048)]:
        for case in cases:
            choice = _capi.select(n=n, k=k, grouping="m_grouped", num_sms=132, **case)["name"]
            lines.append(f"{case['num_groups']} groups, {case.get('expected_m') or case['m']} {n} {k}: {choice}")
    return "\n".join(lines)


def test_experts_one_after_the_other() -> None:
    cases = [
        {"m": groups * rows, "num_groups": groups, "group_layout": layout}
        for groups, rows in [(4, 8192), (8, 4096), (64, 100)]
        for layout in ("indices", "offsets")
    ]
    assert_expected_inline(
        grouped(cases),
        """\
4 groups, 32768 6144 7168: sm90_fp8_1d2d_m128n192_mgrouped
4 groups, 32768 6144 7168: sm90_fp8_1d2d_m256n128_mgrouped
8 groups, 32768 6144 7168: sm90_fp8_1d2d_m128n192_mgrouped
8 groups, 32768 6144 7168: sm90_fp8_1d2d_m256n128_mgrouped
64 groups, 6400 6144 7168: sm90_fp8_1d2d_m128n192_mgrouped
64 groups, 6400 6144 7168: sm90_fp8_1d2d_m128n192_mgrouped
4 groups, 32768 7168 3072: sm90_fp8_1d2d_m128n192_mgrouped
4 groups, 32768 7168 3072: sm90_fp8_1d2d_m256n128_mgrouped
8 groups, 32768 7168 3072: sm90_fp8_1d2d_m128n192_mgrouped
8 groups, 32768 7168 3072: sm90_fp8_1d2d_m256n128_mgrouped
64 groups, 6400 7168 3072: sm90_fp8_1d2d_m128n192_mgrouped
64 groups, 6400 7168 3072: sm90_fp8_1d2d_m128n192_mgrouped
4 groups, 32768 4096 2048: sm90_fp8_1d2d_m128n192_mgrouped
4 groups, 32768 4096 2048: sm90_fp8_1d2d_m256n128_mgrouped
8 groups, 32768 4096 2048: sm90_fp8_1d2d_m128n192_mgrouped
8 groups, 32768 4096 2048: sm90_fp8_1d2d_m256n128_mgrouped
64 groups, 6400 4096 2048: sm90_fp8_1d2d_m128n192_mgrouped
64 groups, 6400 4096 2048: sm90_fp8_1d2d_m128n192_mgrouped""",
    )


def test_experts_with_masks() -> None:
    cases = [
        {"m": 4096, "num_groups": groups, "group_layout": "masked", "expected_m": rows}
        for groups, rows in [(32, 192), (6, 1024), (32, 20), (6, 20), (256, 1)]
    ]
    assert_expected_inline(
        grouped(cases),
        """\
32 groups, 192 6144 7168: sm90_fp8_1d2d_m256n128_mgrouped
6 groups, 1024 6144 7168: sm90_fp8_1d2d_m256n128_mgrouped
32 groups, 20 6144 7168: sm90_fp8_1d2d_m32n128_mgrouped_swap
6 groups, 20 6144 7168: sm90_fp8_1d2d_m32n64_mgrouped_swap_kwg2
256 groups, 1 6144 7168: sm90_fp8_1d2d_m8n64_mgrouped_swap_kwg2
32 groups, 192 7168 3072: sm90_fp8_1d2d_m256n128_mgrouped
6 groups, 1024 7168 3072: sm90_fp8_1d2d_m192n128_mgrouped
32 groups, 20 7168 3072: sm90_fp8_1d2d_m32n128_mgrouped_swap
6 groups, 20 7168 3072: sm90_fp8_1d2d_m32n128_mgrouped_swap
256 groups, 1 7168 3072: sm90_fp8_1d2d_m16n128_mgrouped_swap
32 groups, 192 4096 2048: sm90_fp8_1d2d_m256n128_mgrouped
6 groups, 1024 4096 2048: sm90_fp8_1d2d_m256n128_mgrouped
32 groups, 20 4096 2048: sm90_fp8_1d2d_m32n128_mgrouped_swap
6 groups, 20 4096 2048: sm90_fp8_1d2d_m128n192_mgrouped
256 groups, 1 4096 2048: sm90_fp8_1d2d_m16n128_mgrouped_swap""",
    )


def test_batches() -> None:
    lines = []
    for n, k, recipe in [(128, 512, (1, 128, 128)), (512, 128, (1, 128, 128)), (128, 4096, (1, 1, 128))]:
        for m in (1, 16, 64, 128, 4096):
            choice = _capi.select(m, n, k, recipe=recipe, num_sms=132, grouping="batched", num_groups=128)["name"]
            lines.append(f"{m} {n} {k}: {choice}")
    assert_expected_inline(
        "\n".join(lines),
        """\
1 128 512: sm90_fp8_1d2d_m64n128_batched
16 128 512: sm90_fp8_1d2d_m64n128_batched
64 128 512: sm90_fp8_1d2d_m64n128_batched
128 128 512: sm90_fp8_1d2d_m128n128_batched
4096 128 512: sm90_fp8_1d2d_m256n128_batched
1 512 128: sm90_fp8_1d2d_m64n128_batched
16 512 128: sm90_fp8_1d2d_m64n128_batched
64 512 128: sm90_fp8_1d2d_m64n128_batched
128 512 128: sm90_fp8_1d2d_m128n128_batched
4096 512 128: sm90_fp8_1d2d_m256n128_batched
1 128 4096: sm90_fp8_1d1d_m64n64_batched
16 128 4096: sm90_fp8_1d1d_m64n64_batched
64 128 4096: sm90_fp8_1d1d_m64n64_batched
128 128 4096: sm90_fp8_1d1d_m128n128_batched
4096 128 4096: sm90_fp8_1d1d_m128n128_batched""",
    )


def test_a_tile_holds_rows_of_one_group() -> None:
    """Where the layout names the group of each row, only tiles that divide the alignment are taken."""
    for alignment in (16, 48, 64, 128, 192, 256):
        choice = _capi.select(
            9000, 512, 512, grouping="m_grouped", group_layout="indices", num_groups=4, group_alignment=alignment
        )
        rows = {row["index"]: row["block_m"] for row in _capi.instances()}
        taken = {rows[row["index"]] for row in choice["candidates"] if row["cost_us"] is not None}
        assert taken and all(alignment % block_m == 0 for block_m in taken)


def test_the_choice_is_the_cheapest_row_that_fits() -> None:
    for recipe in [(1, 128, 128), (1, 1, 128), (1, 1, 32), (128, 128, 128), (128, 1, 32)]:
        for m, n, k in [(1, 7, 16), (128, 2112, 7168), (4096, 7168, 2048), (513, 4097, 1040)]:
            for float_output in (False, True):
                choice = _capi.select(m, n, k, recipe=recipe, float_output=float_output)
                fitting = {row["index"]: row["cost_us"] for row in choice["candidates"] if row["cost_us"] is not None}
                declined = [row for row in choice["candidates"] if row["cost_us"] is None]
                assert len(choice["candidates"]) == len(_capi.instances())
                assert all(row["reason"] for row in declined)
                assert choice["row"] == min(fitting, key=lambda index: (fitting[index], index)), (m, n, k, recipe)
                assert choice["name"] == _capi.instances()[choice["row"]]["name"]


def test_costs_stay_sane_far_from_what_was_measured() -> None:
    for recipe in [(1, 128, 128), (1, 1, 128), (1, 1, 32)]:
        for m, n, k in [(1, 1, 16), (1, 129280, 7168), (100_000, 24576, 28672), (7, 40, 200_000), (100_000, 8, 128)]:
            for num_sms in (2, 7, 66, 132):
                choice = _capi.select(m, n, k, recipe=recipe, num_sms=num_sms)
                costs = [row["cost_us"] for row in choice["candidates"] if row["cost_us"] is not None]
                assert costs and all(0 < cost < 1e9 for cost in costs), (m, n, k, recipe, num_sms)
                chosen = next(row["cost_us"] for row in choice["candidates"] if row["index"] == choice["row"])
                peak_us = 2 * m * n * k / (num_sms * 1.98e3 * 8192)  # all tensor cores, always
                assert chosen >= peak_us, (m, n, k, recipe, num_sms)


def test_every_row_is_selected_somewhere_or_can_be_forced() -> None:
    """No row is dead: each supports some problem."""
    alive = set()
    fp8_or_bf16 = itertools.product([(1, 128, 128), (1, 1, 128), (1, 1, 32), None], ["nt", "nn", "tn", "tt"], [{}])
    packed = [{"fp4": "b", "packed_sfb": packed} for packed in (False, True)]
    packed.append({"fp4": "b", "packed_sfb": True, "bf16_tokens": True})
    fp8_fp4 = itertools.product([(1, 1, 128), (1, 1, 32)], ["nt"], packed)
    for (recipe, layout, fp4), grouping, (m, n, k) in itertools.product(
        [*fp8_or_bf16, *fp8_fp4],
        _capi.GROUPINGS,
        [(1, 256, 4096), (128, 2112, 7168), (4096, 7168, 2048)],
    ):
        candidates = _capi.select(
            m,
            n,
            k,
            recipe=recipe,
            layout=layout,
            grouping=grouping,
            group_layout="offsets" if grouping == "m_grouped" else "none",
            **fp4,
        )["candidates"]
        alive |= {row["index"] for row in candidates if row["cost_us"] is not None}
    assert alive == {row["index"] for row in _capi.instances()}
