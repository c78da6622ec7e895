"""What the kernels for SM100 are made of: gates on SASS, and what their rows are for. See test_kernel_gates.py."""

from __future__ import annotations

import collections
import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

from deep_gemm_ops import _capi, mega_moe
from deep_gemm_ops.bench import roofline

from common import LAYOUTS, ROOT
from gemm_emulation import entries
from kernel_sass import kernel_sass

ROWS = _capi.instances("sm_100a")
NUM_SMS = 148  # of a B200

pytestmark = pytest.mark.skipif(not ROWS, reason="installed without kernels for sm_100a")
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])

Row = dict[str, Any]


def sass(kernel: str) -> tuple[dict[str, Any], list[str], collections.Counter[str]]:
    """Resources, instructions, and how often each full mnemonic occurs."""
    return kernel_sass(kernel, "sm_100a")


def count(mnemonics: collections.Counter[str], prefix: str) -> int:
    return sum(times for mnemonic, times in mnemonics.items() if mnemonic.startswith(prefix))


def test_a_kernel_for_each_row() -> None:
    indices = [int(re.search(r"sm100_gemmILi(\d+)E", entry).group(1)) for entry in entries("sm_100a")]
    assert sorted(indices) == list(range(len(ROWS)))
    assert len({row["name"] for row in ROWS}) == len(ROWS)
    assert [row["index"] for row in ROWS] == list(range(ROWS[0]["index"], ROWS[0]["index"] + len(ROWS)))


@every_row
def test_tensor_core_instructions(row: Row) -> None:
    """Four of one kind for a stage of 128 bytes of K; scales copied to tensor memory where there are any."""
    _, _, mnemonics = sass(row["kernel"])
    pair = ".2CTA" if row["row_ctas"] == 2 else ""
    scaled = row["scaling"] == "ue8m0"
    assert {name: times for name, times in mnemonics.items() if "MMA" in name} == {
        ("UTCQMMA" if scaled else "UTCHMMA") + pair: 4
    }
    columns = row["block_m"] if row["swap_ab"] else row["block_n"]
    copies = 1 + -(-columns // 128) if scaled else 0  # rows', and those of each 128 columns
    assert count(mnemonics, "UTCCP") == copies
    assert count(mnemonics, "UTCBAR") == (3 if scaled else 2)  # a stage, its scales, an accumulator


@every_row
def test_no_local_memory(row: Row) -> None:
    resources, _, mnemonics = sass(row["kernel"])
    assert (resources["stack"], resources["local"]) == (0, 0)
    assert count(mnemonics, "LDL") == count(mnemonics, "STL") == 0
    assert resources["reg"] * row["num_threads"] <= 65536


@every_row
def test_bulk_copies(row: Row) -> None:
    """A pair's loads signal one CTA; results leave through TMA, but for swapped operands, whose registers are rows."""
    _, _, mnemonics = sass(row["kernel"])
    # The group is a third coordinate where each has its own operand, or result.
    load = "UTMALDG.2D" if row["grouping"] in ("dense", "k_grouped") else "UTMALDG.3D"
    store = "UTMASTG.2D" if row["grouping"] in ("dense", "summed") else "UTMASTG.3D"
    assert (count(mnemonics, f"{load}.2CTA") > 0) == (row["row_ctas"] == 2)
    assert (count(mnemonics, store) > 0) == (not row["swap_ab"])
    assert count(mnemonics, "UTMALDG.2D" if load == "UTMALDG.3D" else "UTMALDG.3D") == 0
    # One loop for each type of D, which is unrolled where the columns go to several CTAs.
    columns = row["block_m"] if row["swap_ab"] else row["block_n"]
    assert count(mnemonics, "LDTM") == 2 * (max(columns // 32, 1) if row["split_k"] > 1 else 1)


# FP4's rows differ from FP8's where the number of heads does not matter.
MQA_ROWS = [row for row in _capi.mqa_instances() if row["arch"] == "sm_100a" and (not row["fp4"] or row["heads"] == 64)]


@pytest.mark.parametrize("row", MQA_ROWS, ids=lambda row: row["name"])
def test_mqa_logits(row: Row) -> None:
    """One instruction in a loop over the head dimension; two loops over columns, of which each reads 32 ahead."""
    resources, _, mnemonics = sass(row["kernel"])
    assert (resources["stack"], resources["local"]) == (0, 0)
    assert count(mnemonics, "LDL") == count(mnemonics, "STL") == 0
    assert resources["reg"] * row["num_threads"] <= 65536
    assert (count(mnemonics, "UTCQMMA"), count(mnemonics, "UTCOMMA")) == ((0, 1) if row["fp4"] else (1, 0))
    assert count(mnemonics, "UTCCP") == (3 if row["fp4"] else 0)  # scales of 128 keys and up to 256 columns
    assert count(mnemonics, "UTCBAR") == 3  # a stage, queries, an accumulator
    assert count(mnemonics, "LDTM") == 6
    assert (count(mnemonics, "UTMALDG.3D") > 0) == row["paged"]


@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("mma_type", ["bf16xbf16", "fp8xfp4"])
def test_mega_moe(mma_type: str, block_tokens: int) -> None:
    """One loop for both linears: four instructions for each part of a stage, and copies of the scales of all."""
    scaled, parts = mma_type == "fp8xfp4", 2 if block_tokens == 128 else 1
    name = f"sm100_mega_moeILi{block_tokens}ELi{mega_moe.MMA_TYPES.index(mma_type)}E"
    resources, _, mnemonics = sass(name)
    assert (resources["stack"], resources["local"]) == (0, 0)
    assert count(mnemonics, "LDL") == count(mnemonics, "STL") == 0
    assert resources["reg"] * 384 <= 65536
    instructions = {name: times for name, times in mnemonics.items() if "MMA" in name}
    assert instructions == {"UTCQMMA" if scaled else "UTCHMMA": 4 * parts}
    assert count(mnemonics, "UTCCP") == (1 + parts if scaled else 0)
    assert count(mnemonics, "UTCBAR") == 1 + parts  # a stage, each part's accumulator
    assert count(mnemonics, "LDTM.16dp256bit") == 4  # both halves of a warp's lanes, of either linear
    assert count(mnemonics, "UTMALDG.2D") == (4 if scaled else 2)


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def test_each_row_is_selected_somewhere() -> None:
    alive = selected_groups()
    sizes = itertools.product((1, 16, 32, 48, 64, 128, 256, 1024, 4096, 8192), (576, 2112, 7168, 24576, 32768))
    for (m, n), k, recipe in itertools.product(sizes, (128, 512, 1536, 7168, 16384), ((1, 128, 128), None)):
        choice = _capi.select(m, n, k, recipe=recipe, arch="sm_100a", num_sms=NUM_SMS)
        alive.add(choice["row"])
        assert [candidate["index"] for candidate in choice["candidates"]] == [row["index"] for row in ROWS]
    assert alive == {row["index"] for row in ROWS}


def selected_groups() -> set[int]:
    """Rows that problems of groups select."""
    alive = set()
    sizes = itertools.product((4, 16, 32, 64, 128, 256, 1024, 4096), (576, 4096, 7168), (512, 2048, 7168), (1, 8, 64))
    for (m, n, k, groups), recipe in itertools.product(sizes, ((1, 1, 128), None)):
        common = {"recipe": recipe, "arch": "sm_100a", "num_sms": NUM_SMS, "num_groups": groups}
        for group_layout, rows in (("indices", m * groups), ("offsets", m * groups), ("masked", m)):
            groups_of = {"grouping": "m_grouped", "group_layout": group_layout, "expected_m": m}
            alive.add(_capi.select(rows, n, k, **groups_of, **common)["row"])
        alive.add(_capi.select(m, n, k, grouping="batched", **common)["row"])
        k_groups = {"grouping": "k_grouped", "group_layout": "sizes", "layout": "nt" if recipe else "tn"}
        alive.add(_capi.select(m, n, k * groups, float_output=True, **k_groups, **common)["row"])
        if recipe is None:
            alive.add(_capi.select(m, n, k, grouping="summed", **common)["row"])
    return alive


def test_every_problem_has_a_row() -> None:
    for m, layout, fp4 in itertools.product((1, 17, 100, 5000), LAYOUTS, ("", "a", "b", "ab")):
        if ("a" in fp4 and layout[0] == "t") or ("b" in fp4 and layout[1] == "n"):
            continue
        for recipe in ((1, 1, 32), (1, 128, 128), None) if not fp4 else ((1, 1, 32),):
            choice = _capi.select(m, 100, 256, recipe=recipe, layout=layout, fp4=fp4, arch="sm_100a", num_sms=NUM_SMS)
            assert choice["row"] >= 0, (m, layout, fp4, recipe)


def test_roofline_of_the_docs() -> None:
    """docs/sm100.md shows what `python -m deep_gemm_ops.bench.roofline` prints."""
    page = (ROOT / "docs" / "sm100.md").read_text()
    assert roofline.table(roofline.problems()) in page
    assert roofline.mega_moe_table() in page
    assert roofline.logits_table() in page


def test_roofline() -> None:
    """By hand, for 256 x 192 tiles of a pair: 16 x 22 of them, 56 stages of 128 x (128 + 96) bytes in each CTA."""
    r = roofline.roofline(4096, 4096, 7168)
    assert r.row == "sm100_mx_m256n192_pair"
    assert r.operations == 2 * 4096 * 4096 * 7168
    assert r.memory_bytes == 2 * 4096 * 7168 * (1 + 1 / 128) + 2 * 4096 * 4096
    assert r.fill_bytes == 16 * 22 * 2 * 56 * (128 * (128 + 96) + (128 + 192))
    assert r.tensor_memory_bytes == 16 * 22 * 2 * (8 * 128 * 192 + 56 * 4 * (128 + 192))
    assert r.bound[0] == "L2 to SM" and r.bound[1] == r.fill_us > r.operations_us > r.memory_us


def test_roofline_of_mega_moe() -> None:
    """By hand, BF16: 32 experts of 64 tokens, in 16 and 28 tiles of 112 and 32 stages of 128 x (256 + 128) bytes."""
    r = roofline.mega_moe_roofline(64, "bf16")
    assert (r.row, r.operations) == ("256 x 128", 32 * 64 * 6 * 7168 * 2048)
    assert r.fill_bytes == 32 * (16 * 112 + 28 * 32) * 128 * (256 + 128)
    assert r.memory_bytes == 32 * (3 * 7168 * 2048 * 2 + 64 * (2 * (3 * 7168 + 2 * 2048) + 4 * 7168))


def test_roofline_of_logits() -> None:
    """By hand, four tokens of 64 heads of 128 for each of 256 sequences: FP4 scores three and one of them."""
    r = roofline.logits_roofline(4, 8192, 64, 128, "fp4", 256)
    keys = 256 * 8192
    assert (r.row, r.operations) == ("sm100_fp4_paged_mqa_h64", 2 * keys * 4 * 64 * 128)
    assert r.memory_bytes == keys * (64 + 4 + 4 * 4) + 256 * 4 * 64 * (64 + 4 + 4)
    assert r.fill_bytes == keys * 2 * (64 + 4) and r.tensor_memory_bytes == keys * 256 * 8
    assert r.times["FP32"] == 2 * r.times["operations"] == keys * 256 * 2 / 128 / (1855 * 148)


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the table

INVALID = [
    "scaled_row(16, 1, false)",
    "scaled_row(24, 1, true)",
    "scaled_row(16, 2, true)",
    "scaled_row(48, 1, true)",
    "scaled_row(128, 4, false)",
    "scaled_row(256, 2, false)",
    "bf16_row(288, 2, false)",
    "bf16_row(64, 1, false, 2)",
    "bf16_row(64, 2, true, 2)",
    "bf16_row(64, 1, true, 16)",
    "bf16_row(16, 1, true, 8)",
    "bf16_row(96, 1, true, 2)",
    "GemmRow{64, 64, 1, 1, 1, false, kUE8M0Scaling, 0}",
    "GemmRow{128, 64, 1, 1, 1, false, kUE8M0Scaling, 0}",
]


def test_reasons_against_rows(tmp_path: Path) -> None:
    rows = "".join(f"    print({row});\n" for row in INVALID)
    (tmp_path / "reasons.cpp").write_text(f"""
#include <cstdio>
#include "sm100/gemm_instances.h"
#include "sm100/gemm_traits.h"
using namespace deep_gemm;
using namespace deep_gemm::sm100;
static void print(GemmRow row) {{
    const char* reason = invalid_reason(row);
    std::puts(reason == nullptr ? "valid" : reason);
}}
int main() {{
{rows}}}
""")
    command = [os.environ.get("CXX", "c++"), "-std=c++20", f"-I{ROOT / 'src'}", "reasons.cpp", "-o", "reasons"]
    subprocess.run(command, check=True, cwd=tmp_path)
    reasons = subprocess.run([tmp_path / "reasons"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert_expected_inline(
        "\n".join(f"{row}: {reason}" for row, reason in zip(INVALID, reasons)),
        """\
scaled_row(16, 1, false): stores need 32 columns at a time
scaled_row(24, 1, true): block_cols must be a multiple of 16 (of 32 with pairs) from 16 to 256
scaled_row(16, 2, true): block_cols must be a multiple of 16 (of 32 with pairs) from 16 to 256
scaled_row(48, 1, true): the epilogue reads 32 columns at a time
scaled_row(128, 4, false): row_ctas must be 1, or 2 for instructions of a pair of CTAs
scaled_row(256, 2, false): two accumulators and the scales do not fit into tensor memory
bf16_row(288, 2, false): block_cols must be a multiple of 16 (of 32 with pairs) from 16 to 256
bf16_row(64, 1, false, 2): split K takes single CTAs and swapped operands
bf16_row(64, 2, true, 2): split K takes single CTAs and swapped operands
bf16_row(64, 1, true, 16): a cluster has 8 CTAs at most
bf16_row(16, 1, true, 8): split K must divide the columns, 4 at a time
bf16_row(96, 1, true, 2): split K: a slice of columns must divide 32
GemmRow{64, 64, 1, 1, 1, false, kUE8M0Scaling, 0}: arch must be 100
GemmRow{128, 64, 1, 1, 1, false, kUE8M0Scaling, 0}: arch must be 100""",
    )
