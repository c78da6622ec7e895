"""A row added to the table is compiled, dispatched, listed, selected and tested with no other edit.

Shown on a copy of the sources, its table cut down to one row and the new one so that it builds in seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from expecttest import assert_expected_inline

from deep_gemm_ops import _capi

from common import ROOT

pytestmark = pytest.mark.skipif(not _capi.available(), reason="installed without the compiled library")

TABLE = "src/sm90/gemm_instances.h"
FIRST_ROW = "{64, 64, 1, 1, 1, false, kScaling1D2D, 128}"
# Multicast and split K at once, which no row of the table has.
NEW_ROW = "{64, 64, 2, 1, 2, false, kScaling1D2D, 128}"
NEW_NAME = "sm90_fp8_1d2d_m64n64_rows2_splitk2"


def run(command: Sequence[str | Path], folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "python"), "OMP_NUM_THREADS": "1", **environ},
    )


def set_table(folder: Path, *rows: str) -> None:
    """Makes these the rows of the table."""
    path = folder / TABLE
    head, tail = re.fullmatch(r"(.*kGemmRows\[\] = \{\n).*?(\};.*)", path.read_text(), re.DOTALL).groups()
    path.write_text(head + "".join(f"    {row},\n" for row in rows) + tail)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return run(command, folder, DG_CUDA_ARCHS="90a", DG_NUM_SHARDS="2", DG_BUILD_DIR=str(folder / "build"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, and a library built from them with NEW_ROW added to the table."""
    folder = tmp_path_factory.mktemp("deep_gemm_ops")
    for name in ("cmake", "python", "src", "test", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    set_table(folder, FIRST_ROW, NEW_ROW)
    result = build(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_a_new_row_is_listed_and_selected(copy: Path) -> None:
    code = """
import json
from deep_gemm_ops import _capi
selection = _capi.select(100, 100, 1000)
print(json.dumps([_capi.instances(), selection["candidates"]]))
"""
    result = run([sys.executable, "-c", code], copy)
    assert result.returncode == 0, result.stderr
    rows, candidates = json.loads(result.stdout)
    assert [row["name"] for row in rows] == ["sm90_fp8_1d2d_m64n64", NEW_NAME]
    assert (rows[1]["row_ctas"], rows[1]["split_k"], rows[1]["cluster_size"]) == (2, 2, 4)
    assert [candidate["name"] for candidate in candidates] == [row["name"] for row in rows]
    assert candidates[1]["cost_us"] > 0


def test_a_new_row_is_inspected(copy: Path) -> None:
    result = run([sys.executable, "-m", "deep_gemm_ops.inspect", "row", "1"], copy)
    assert result.returncode == 0, result.stderr
    assert NEW_NAME in result.stdout and "QGMMA" in result.stdout and "no spills" in result.stdout


def test_a_new_row_is_tested(copy: Path) -> None:
    """The tests over the table find it, dispatch it through the host code, and it is right."""
    files = ["test/test_gemm_emulated.py", "test/test_kernel_gates.py"]
    # The mutants of one row take longer than all of this.
    result = run([sys.executable, "-m", "pytest", "-q", *files, "-k", f"{NEW_NAME} and not synchronisation"], copy)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(re.search(r"(\d+) passed", result.stdout).group(1))
    assert passed > 25, result.stdout


def test_an_invalid_row_fails_the_build(copy: Path) -> None:
    """With one sentence and the row's index, not with what the compiler thinks of the kernel."""
    table = (copy / TABLE).read_text()
    set_table(copy, FIRST_ROW, NEW_ROW, "{64, 72, 1, 1, 5, false, kScaling1D2D, 128}")
    result = build(copy)
    (copy / TABLE).write_text(table)
    assert result.returncode != 0
    (message,) = re.findall(r"gemm_shard\.cu\(\d+\): error: (.*)", result.stdout)
    assert_expected_inline(
        message,
        """\
static assertion failed with "src/sm90/gemm_instances.h has a row that cannot be compiled: see invalid_reason() in gemm_traits.h\"""",  # noqa: E501
    )
    assert "kRowIndex=2" in result.stdout, result.stdout


INVALID = [
    "{96, 64, 1, 1, 1, false, kScaling1D2D, 128}",
    "{320, 64, 1, 1, 1, false, kScaling1D2D, 128}",
    "{256, 192, 1, 1, 1, false, kScaling1D2D, 128}",
    "{64, 20, 1, 1, 1, false, kScaling1D2D, 128}",
    "{64, 64, 1, 1, 1, false, kScaling1D2D, 64}",
    "{64, 64, 1, 1, 1, false, kScaling1D2D, 32}",
    "{64, 64, 2, 2, 1, false, kScaling1D2D, 128}",
    "{64, 64, 2, 1, 8, false, kScaling1D2D, 128}",
    "{64, 24, 2, 1, 1, true, kScaling1D2D, 128}",
    "{64, 64, 1, 1, 3, false, kScaling1D2D, 128}",
    "{256, 64, 1, 1, 2, false, kScaling1D2D, 128}",
    "{64, 24, 1, 1, 1, false, kScaling1D2D, 128}",
    "{128, 256, 1, 1, 1, false, kNoScaling, 0}",
    "{128, 128, 1, 1, 1, false, kScaling1D1D, 128, OperandType::kFP8, Grouping::kDense, true}",
    "{256, 256, 1, 1, 1, false, kNoScaling, 0, kBF16}",
    "{64, 128, 1, 2, 1, false, kNoScaling, 0, kBF16, Grouping::kDense, true}",
    "{64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, Grouping::kDense, true}",
    "{64, 16, 1, 1, 1, true, kUE8M0Scaling, 32}",
    "{64, 16, 1, 1, 1, false, kUE8M0Scaling, 32, kFP8FP4}",
    "{256, 16, 1, 1, 1, true, kUE8M0Scaling, 32, kFP8FP4}",
    "{64, 16, 2, 1, 1, true, kUE8M0Scaling, 32, kFP8FP4}",
    "{64, 16, 1, 1, 1, true, kScaling1D1D, 128, kFP8FP4}",
    "{192, 128, 1, 1, 1, true, kUE8M0Scaling, 128, kFP8FP4}",
]


def test_reasons_against_rows(tmp_path: Path) -> None:
    rows = "".join(f"    print({row});\n" for row in INVALID)
    (tmp_path / "reasons.cpp").write_text(f"""
#include <cstdio>
#include "sm90/gemm_traits.h"
using namespace deep_gemm;
constexpr OperandType kBF16 = OperandType::kBF16, kFP8FP4 = OperandType::kFP8FP4;
static void print(GemmRow row) {{
    const char* reason = sm90::invalid_reason(row);
    std::puts(reason == nullptr ? "valid" : reason);
}}
int main() {{
{rows}}}
""")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", f"-I{ROOT / 'src'}", "reasons.cpp", "-o", "reasons"]
    result = run(command, tmp_path)
    assert result.returncode == 0, result.stderr
    reasons = run([tmp_path / "reasons"], tmp_path).stdout.splitlines()
    assert_expected_inline(
        "\n".join(f"{row}: {reason}" for row, reason in zip(INVALID, reasons)),
        """\
{96, 64, 1, 1, 1, false, kScaling1D2D, 128}: block_rows must be 64, 128, 192 or 256
{320, 64, 1, 1, 1, false, kScaling1D2D, 128}: block_rows must be 64, 128, 192 or 256
{256, 192, 1, 1, 1, false, kScaling1D2D, 128}: too few registers
{64, 20, 1, 1, 1, false, kScaling1D2D, 128}: block_cols must be a multiple of 8 from 8 to 192, or 256 with BF16
{64, 64, 1, 1, 1, false, kScaling1D2D, 64}: gran_k must be 128 or 32
{64, 64, 1, 1, 1, false, kScaling1D2D, 32}: gran_k 32 needs 1D1D or UE8M0 scaling
{64, 64, 2, 2, 1, false, kScaling1D2D, 128}: a cluster shares one operand, not both
{64, 64, 2, 1, 8, false, kScaling1D2D, 128}: a cluster has 8 CTAs at most
{64, 24, 2, 1, 1, true, kScaling1D2D, 128}: a shared column panel is loaded in parts of 8 columns or more
{64, 64, 1, 1, 3, false, kScaling1D2D, 128}: split K must divide the columns evenly, 8 at a time
{256, 64, 1, 1, 2, false, kScaling1D2D, 128}: split K takes one part of 64 rows per warpgroup
{64, 24, 1, 1, 1, false, kScaling1D2D, 128}: stores need 16 columns at a time
{128, 256, 1, 1, 1, false, kNoScaling, 0}: block_cols must be a multiple of 8 from 8 to 192, or 256 with BF16
{128, 128, 1, 1, 1, false, kScaling1D1D, 128, OperandType::kFP8, Grouping::kDense, true}: FP8 operands are K-major
{256, 256, 1, 1, 1, false, kNoScaling, 0, kBF16}: too few registers
{64, 128, 1, 2, 1, false, kNoScaling, 0, kBF16, Grouping::kDense, true}: MN-major rows come 64 at a time
{64, 16, 1, 1, 1, true, kNoScaling, 0, kBF16, Grouping::kDense, true}: MN-major columns come 64 at a time
{64, 16, 1, 1, 1, true, kUE8M0Scaling, 32}: UE8M0 scaling is for FP4 rows
{64, 16, 1, 1, 1, false, kUE8M0Scaling, 32, kFP8FP4}: FP4 operands are swapped, with one part of 64 rows per warpgroup
{256, 16, 1, 1, 1, true, kUE8M0Scaling, 32, kFP8FP4}: FP4 operands are swapped, with one part of 64 rows per warpgroup
{64, 16, 2, 1, 1, true, kUE8M0Scaling, 32, kFP8FP4}: FP4 rows share no panels
{64, 16, 1, 1, 1, true, kScaling1D1D, 128, kFP8FP4}: FP32 scales of FP4 rows are per 32 of K
{192, 128, 1, 1, 1, true, kUE8M0Scaling, 128, kFP8FP4}: too few registers""",
    )
