"""``python -m deep_gemm_ops.inspect``: views of the table, of a made-up library and of the real one if there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deep_gemm_ops import _capi, inspect
from deep_gemm_ops._library import library_path

ROWS = [
    {
        "index": 0,
        "name": "sm90_fp8_1d2d_m128n128",
        "arch": "sm_90a",
        "family": "fp8_gemm",
        "kernel": "fp8_gemmILi0E",
        "block_m": 128,
        "block_n": 128,
        "block_k": 128,
        "swap_ab": False,
        "cluster": "row_pair",
        "cluster_size": 2,
        "split_k": 1,
        "scaling": "1d2d",
        "gran_k": 128,
        "num_stages": 5,
        "shared_bytes": 199680,
        "num_threads": 384,
    },
]
ROWS.append(ROWS[0] | {"index": 1, "name": "sm90_fp8_1d2d_m16n64_swap", "kernel": "fp8_gemmILi1E", "swap_ab": True})
ROWS[1] |= {"block_m": 16, "block_n": 64, "cluster": "none", "cluster_size": 1}

LOGITS = {
    "index": 0,
    "name": "sm100_fp4_mqa_h64",
    "arch": "sm_100a",
    "family": "fp8_fp4_mqa_logits",
    "kernel": "logitsILi64E",
    "tile_keys": 128,
    "cols": 192,
    "parts": 1,
    "num_stages": 12,
    "shared_bytes": 100352,
    "num_threads": 416,
}

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z8fp8_gemmILi1EEv6Params:
  REG:34 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1280 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z8fp8_gemmILi0EEv6Params:
  REG:168 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:1280 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6logitsILi64EEv6Params:
  REG:112 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1280 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
\tcode for sm_90a
\t\tFunction : _Z8fp8_gemmILi0EEv6Params
\t.headerflags\t@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x2c0 ;                         /* 0x0000000000947947 */
        /*0020*/             @!UPT UIADD3 UR4, UR4, UR4, URZ ;         /* 0x0000000000947947 */
        /*0030*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;  /* 0x00 */
        /*0040*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;  /* 0x00 */
        /*0050*/                   STL [R1], R2 ;                      /* 0x00 */
"""


@pytest.fixture
def made_up(monkeypatch):
    def select(m, n, k, *, recipe, layout, float_output, num_sms, arch):
        if recipe is None or recipe[2] == 32:
            refused = {"cost_us": None, "reason": "another gran_k"}
            candidates = [{"index": row["index"], "name": row["name"], **refused} for row in ROWS]
            return {"row": -1, "name": "", "candidates": candidates}
        candidates = [
            {"index": 0, "name": ROWS[0]["name"], "cost_us": 45.0, "reason": None},
            {"index": 1, "name": ROWS[1]["name"], "cost_us": 36.0, "reason": None},
        ]
        return {"row": 1, "name": ROWS[1]["name"], "candidates": candidates}

    monkeypatch.setattr(_capi, "instances", lambda arch=None: [dict(row) for row in ROWS])
    monkeypatch.setattr(_capi, "mqa_instances", lambda: [dict(LOGITS)])
    monkeypatch.setattr(_capi, "select", select)
    monkeypatch.setattr(inspect, "library_path", lambda: Path("library.so"))
    monkeypatch.setattr(inspect, "_cuobjdump", lambda *a, disassemble=False: SASS if disassemble else RESOURCES)


def output(capsys, *arguments: str, code: int = 0) -> str:
    assert inspect.main(arguments) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_list(made_up, capsys):
    lines = output(capsys).splitlines()
    assert len(lines) == 4
    assert lines[0].split()[:4] == ["index", "name", "arch", "tile"]
    assert lines[1].split() == "0 sm90_fp8_1d2d_m128n128 sm_90a 128x128x128 row_pair 2 1d2d 128 5 199680 384".split()
    assert "16x64x128 swap" in lines[2]
    assert lines[3].split() == "- sm100_fp4_mqa_h64 sm_100a 128 keys x 192 none - - 12 100352 416".split()
    assert json.loads(output(capsys, "--json")) == [*ROWS, LOGITS]


def test_select(made_up, capsys):
    lines = output(capsys, "select", "16", "7168", "16384").splitlines()
    assert lines[0] == "M = 16, N = 7168, K = 16384, recipe [1, 128, 128], bfloat16 output, 132 SMs"
    assert lines[1].split() == "selected 1 36.00 us in the cost model sm90_fp8_1d2d_m16n64_swap".split()
    assert lines[2].split() == "beat 0 45.00 us +25.0% sm90_fp8_1d2d_m128n128".split()
    assert json.loads(output(capsys, "--json", "select", "16", "7168", "16384"))["row"] == 1


def test_select_when_no_row_fits(made_up, capsys):
    text = output(capsys, "select", "16", "7168", "16384", "--recipe", "1,1,32", "--float32", "--num-sms", "20")
    assert "float32 output, 20 SMs" in text
    assert "no compiled row supports it" in text
    assert text.count("refused") == 2
    assert "another gran_k" in text
    assert "K = 16384, BF16 tn, bfloat16 output" in output(capsys, "select", "16", "7168", "16384", "--bf16", "tn")


def test_row(made_up, capsys):
    text = output(capsys, "row", "0")
    assert "168 a thread at launch, 384 threads" in text
    assert "199680 bytes dynamic, 1024 static, 5 stages" in text
    assert "QGMMA                2  FP8 tensor core" in text
    assert "local store (spill)" in text
    assert "no spills" not in text
    text = output(capsys, "row", "0", "--sass")
    assert text.splitlines()[-1] == "STL [R1], R2"
    facts = json.loads(output(capsys, "--json", "row", "1"))
    assert facts["resources"]["function"] == "_Z8fp8_gemmILi1EEv6Params"
    assert facts["resources"]["reg"] == 34
    assert facts["opcodes"] == {"LDC": 1, "BRA": 1, "UIADD3": 1, "QGMMA": 2, "STL": 1}
    assert "sass" not in facts
    assert output(capsys, "row", ROWS[0]["name"]) == output(capsys, "row", "0")
    assert "112 a thread at launch, 416 threads" in output(capsys, "row", LOGITS["name"])


def test_a_row_that_does_not_exist(made_up, capsys):
    assert "row 7 does not exist, the table has rows 0 to 1 and names" in output(capsys, "row", "7", code=1)


def test_a_kernel_that_the_library_lacks(made_up, monkeypatch, capsys):
    monkeypatch.setattr(_capi, "instances", lambda arch=None: [ROWS[0] | {"kernel": "other"}])
    assert "no kernel with 'other'" in output(capsys, "row", "0", code=1)


def test_without_a_library(monkeypatch, capsys):
    monkeypatch.setattr(_capi, "instances", lambda arch=None: [])
    assert "no compiled library" in output(capsys, code=1)


def test_without_cuobjdump(monkeypatch):
    monkeypatch.setattr(inspect.os, "access", lambda path, mode: False)
    with pytest.raises(inspect.InspectError, match="pip install nvidia-cuda-cuobjdump"):
        inspect.find_tool("cuobjdump")


@pytest.mark.parametrize("arguments", [["select", "1", "2"], ["select", "-1", "2", "3"], ["row"], ["nonsense"]])
def test_bad_arguments(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as error:
        inspect.main(arguments)
    assert error.value.code == 2
    capsys.readouterr()


@pytest.mark.skipif(library_path() is None, reason="needs the compiled library")
def test_the_real_table(capsys):
    rows = json.loads(output(capsys, "--json"))
    gemms = [row for row in rows if "block_m" in row]
    assert [row["index"] for row in gemms] == list(range(len(gemms)))
    assert rows[len(gemms) :] == _capi.mqa_instances()
    assert len({row["name"] for row in rows}) == len(rows)
    for arch in {row["arch"] for row in rows}:
        assert "selected" in output(capsys, "select", "4096", "7168", "16384", "--arch", arch)
    try:
        inspect.find_tool("cuobjdump"), inspect.find_tool("nvdisasm")
    except inspect.InspectError as missing:
        pytest.skip(str(missing))
    text = output(capsys, "row", "0")
    assert "tensor core" in text
    assert "no spills" in text
