"""Comparison, cases, timing plans, and the benchmark's records, tables and verdicts. Needs no GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from deep_gemm_ops import _capi, prenorm_gemm, reference
from deep_gemm_ops.bench import cli, fp4, layers, mega_moe, mqa_logits, plot, products, report, suites
from deep_gemm_ops.testing import bench as timing
from deep_gemm_ops.testing import calc_diff, cases, compare, count_bytes, error_bar
from deep_gemm_ops.testing.cases import BENCH_M, BENCH_SHAPES, GemmCase, make_gemm_operands
from deep_gemm_ops.testing.numeric import assert_close, assert_equal

NAN, INF = math.nan, math.inf


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# compare


def test_compare_accepts_rounding_and_reports_it():
    want = normal(300, 500)
    result = compare(want.bfloat16(), want, tol=error_bar(torch.bfloat16))
    assert result.ok
    assert bool(result)
    assert 1e-3 < result.rel_error < 3e-3
    assert result.rel_error <= result.worst_tile_error < 4e-3


def test_compare_finds_one_wrong_tile_that_the_global_error_hides():
    want = normal(2048, 2048)
    got = want.clone()
    got[640:704, 1280:1344] *= 1.05
    result = compare(got, want, tol=4e-3)
    assert result.rel_error < 4e-3
    assert not result.ok
    assert result.worst_tile == (640, 1280)
    assert result.worst_tile_error == pytest.approx(0.05, rel=0.05)
    assert "a tile is wrong" in result.describe()


def test_compare_finds_the_tile_in_a_batch():
    want = normal(2, 3, 70, 130)
    got = want.clone()
    got[1, 2, 69, 129] += 100
    result = compare(got, want, tol=1e9, tile_tol=1e-6)
    assert result.worst_tile == (1, 2, 64, 128)
    assert result.max_abs_at == (1, 2, 69, 129)
    assert not result.ok


@pytest.mark.parametrize("where", ["actual", "expected"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_compare_wants_the_same_non_finite_places(where: str, value: float):
    got, want = normal(65, 65), normal(65, 65)
    {"actual": got, "expected": want}[where][64, 3] = value
    result = compare(got, want, tol=INF, tile_tol=INF)
    assert not result.ok
    assert result.mask_mismatches == 1
    assert result.mask_mismatch_at == (64, 3)
    got[64, 3] = want[64, 3] = value
    assert compare(got, want, tol=0).ok


def test_compare_tells_the_infinities_apart():
    assert not compare(torch.tensor([INF]), torch.tensor([-INF]), tol=INF).ok
    assert not compare(torch.tensor([INF]), torch.tensor([NAN]), tol=INF).ok


def test_compare_fails_on_nothing_but_nan_and_on_a_nan_tolerance():
    assert not compare(torch.full((4, 4), NAN), torch.ones(4, 4), tol=1.0).ok
    assert not compare(torch.ones(4, 4), torch.ones(4, 4), tol=NAN).ok


def test_compare_judges_small_rows_at_their_own_size():
    want = normal(128, 128)
    want[:64] *= 1e-8
    got = want.clone()
    got[:64] *= 1.5
    result = compare(got, want, tol=4e-3)
    assert not result.ok
    assert result.worst_tile[0] == 0
    assert result.worst_tile_error == pytest.approx(0.5, rel=0.2)


def test_compare_does_not_judge_a_tile_by_cancellation():
    want = normal(64, 128)
    want[:, 64:] *= 1e-3  # columns that are small for another reason than their tile
    want[63:, 64:] = 1e-12
    got = want.clone()
    got[63:, 64:] += 1e-7
    assert compare(got, want, tol=4e-3, tile=(1, 64)).ok


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_compare_survives_extreme_magnitudes(scale: float):
    want = normal(8, 8) * scale
    assert compare(want * (1 + 1e-6), want, tol=1e-5).ok
    assert not compare(want * 1.1, want, tol=1e-5).ok


def test_compare_of_zeros_empties_and_small_ranks():
    assert compare(torch.zeros(3, 3), torch.zeros(3, 3), tol=0).ok
    assert not compare(torch.ones(3, 3), torch.zeros(3, 3), tol=1).ok
    assert compare(torch.zeros(0, 3), torch.zeros(0, 3), tol=0).ok
    assert compare(torch.tensor(2.0), torch.tensor(2.0), tol=0).worst_tile == (0,)
    assert compare(torch.arange(70), torch.arange(70), tol=0).ok
    x = torch.arange(-8, 8).to(torch.float8_e4m3fn)
    assert compare(x, x.float(), tol=0).ok


def test_compare_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"actual has shape \[1, 4\], expected \[4, 4\]"):
        compare(torch.ones(1, 4), torch.ones(4, 4), tol=1)
    with pytest.raises(ValueError, match="tile is"):
        compare(torch.ones(4), torch.ones(4), tol=1, tile=(0, 4))


def test_assertions_print_the_line_that_repeats_them():
    with pytest.raises(AssertionError, match="reproduce with: pytest -k x"):
        assert_close(torch.ones(2), torch.zeros(2), tol=0.1, repro="pytest -k x")
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(torch.ones(2), torch.ones(2) + 1e-7)
    assert_equal(torch.tensor([0.0, NAN]), torch.tensor([-0.0, NAN]))


def test_calc_diff():
    x = normal(64, 64)
    assert calc_diff(x, x) == 0
    assert calc_diff(torch.zeros(4), torch.zeros(4)) == 0
    assert calc_diff(x, -x) == pytest.approx(2)
    y = x * 1.01
    assert calc_diff(x, y) == pytest.approx(float(1 - 2 * (x * y).sum() / (x * x + y * y).sum()), rel=1e-6)
    assert math.isnan(calc_diff(x, torch.full_like(x, NAN)))
    with pytest.raises(ValueError, match="y has shape"):
        calc_diff(x, x[:1])


def test_error_bars():
    assert error_bar(torch.bfloat16) == 4e-3
    assert [error_bar(torch.float32, family) for family in ("fp8", "bf16", "tf32")] == [1.5e-3, 1e-5, 1e-3]
    with pytest.raises(ValueError, match="out_dtype"):
        error_bar(torch.float16)
    with pytest.raises(ValueError, match="family"):
        error_bar(torch.float32, "int8")


# ---------------------------------------------------------------------------------------------------------------------
# Cases and plans


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("accumulate", ["", "full", "row"])
def test_operands_are_what_the_operators_take(layout: str, accumulate: str):
    case = GemmCase(48, 144, 256, layout=layout, accumulate=accumulate)
    x = make_gemm_operands(case)
    result = reference.fp8_gemm(*x, layout=layout, c=x.c, recipe=case.recipe)
    assert result.shape == (48, 144)
    again = make_gemm_operands(case)
    assert all(torch.equal(p.float(), q.float()) for p, q in zip(x.tensors(), again.tensors()))
    copy = x.clone()
    assert [t.stride() for t in copy.tensors()] == [t.stride() for t in x.tensors()]
    assert not {t.data_ptr() for t in copy.tensors()} & {t.data_ptr() for t in x.tensors()}
    assert eval(repr(case), {"GemmCase": GemmCase, "torch": torch}) == case


def test_count_bytes_looks_into_containers():
    x, y = torch.zeros(3, dtype=torch.float32), torch.zeros(5, dtype=torch.float8_e4m3fn)
    assert count_bytes(x, [y, (x, None)], {"a": y, "b": 3}, "text") == 12 + 5 + 12 + 5


def test_burst_plan():
    assert timing.burst_plan(1000.0, 1 << 20, 60 << 20) == (1, 1)
    calls, sets = timing.burst_plan(10.0, 40 << 20, 60 << 20, min_burst_us=200)
    assert calls == 20
    assert (sets - 1) * (40 << 20) >= 3 * (60 << 20)
    assert timing.burst_plan(0.0, 1, 60 << 20) == (64, 64)


def test_kernels_between_spins():
    spin = "void at::cuda::spin_kernel(long)"
    kernels = [(0, "reduce", 9.0), (1, spin, 5.0), (2, "gemm", 3.0), (3, "tail", 1.0), (4, spin, 5.0)]
    kernels += [(5, "reduce", 9.0), (6, spin, 5.0), (7, "gemm", 4.0), (9, spin, 5.0)]
    assert timing._times_between_spins(kernels[::-1], 2) == {"gemm": 7.0, "tail": 1.0}
    with pytest.raises(RuntimeError, match="recorded 4 spin kernels, expected 6"):
        timing._times_between_spins(kernels, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Records, with the device replaced by the CPU and the clock by a table

LIMITS = timing.DeviceLimits(name="Test GPU", num_sms=132, l2_bytes=1 << 16, fp8_tflops=1979.0, copy_gbps=4000.0)


class FakeClock:
    """Runs every contender once per operand set and reports made-up times."""

    def __init__(self, microseconds: dict[str, float]) -> None:
        self.microseconds = microseconds

    def time_interleaved(self, contenders, *, calls, sets, l2_bytes, repeats):
        for call in contenders.values():
            for i in range(sets):
                call(i)
        return {name: [self.microseconds.get(name, 50.0)] * repeats for name in contenders}


@pytest.fixture
def on_cpu(monkeypatch):
    rows = {"0": 10.0, "2": 8.0}
    clock = FakeClock({"deep_gemm_ops": 10.0, "deep_gemm": 12.0, "deep_gemm_pdl": 11.0, "copy": 9.0} | rows)
    monkeypatch.setattr(suites, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "time_interleaved", clock.time_interleaved)
    monkeypatch.setattr(timing, "host_time_per_call", lambda call: [call(0), 3.0][1])
    monkeypatch.setattr(suites, "_capi", lambda: None)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # its import fails
    return monkeypatch


def fake_deep_gemm(wrong: bool = False) -> types.ModuleType:
    module = types.ModuleType("deep_gemm")
    module.__version__ = "9.9"
    module.set_pdl = lambda enabled: None

    def fp8_gemm_nt(a, b, d, recipe=None, disable_ue8m0_cast=False):
        d.copy_(reference.fp8_gemm_nt(*a, *b, recipe=recipe) * (2 if wrong else 1))

    def tf32_hc_prenorm_gemm(a, b, d, sqr_sum, num_splits=None):
        for out, value in zip((d, sqr_sum), prenorm_gemm.reference(a, b)):
            out.copy_(value * (2 if wrong else 1))

    module.fp8_gemm_nt = fp8_gemm_nt
    module.tf32_hc_prenorm_gemm = tf32_hc_prenorm_gemm
    return module


def fake_capi(broken: int = -1) -> types.SimpleNamespace:
    state = {"forced": -1}

    @contextlib.contextmanager
    def force_instance(index: int):
        state["forced"] = index
        if index == broken:
            raise RuntimeError("row is broken")
        yield

    def select(m, n, k, *, recipe, float_output, num_sms, arch):
        assert (recipe, float_output, num_sms, arch) == ((1, 128, 128), False, 132, "sm_90a")
        candidates = [{"index": i, "name": f"row{i}", "cost_us": 10.0 + i, "reason": None} for i in range(3)]
        candidates.append({"index": 3, "name": "row3", "cost_us": None, "reason": "another gran_k"})
        return {"row": 0, "name": "row0", "candidates": candidates}

    return types.SimpleNamespace(available=lambda: True, select=select, force_instance=force_instance)


def test_gemm_record_without_references(on_cpu):
    record = suites.gemm_record(16, 128, 256, limits=LIMITS, repeats=3, references=False)
    assert set(record["times"]) == {"deep_gemm_ops"}
    assert record["failed"] == {}
    assert record["errors"]["deep_gemm_ops"] < 4e-3
    assert record["bytes"] == 16 * 256 + 16 * 2 * 4 + 128 * 256 + 2 * 4 + 16 * 128 * 2
    json.dumps(record)


def test_gemm_record_with_references(on_cpu):
    on_cpu.setitem(sys.modules, "deep_gemm", fake_deep_gemm())
    on_cpu.setattr(suites, "_capi", fake_capi)
    record = suites.gemm_record(16, 128, 256, limits=LIMITS, repeats=3)
    # scaled_mm's blockwise scales exist on CUDA alone: there it is a failure that is noted, not raised.
    assert {"deep_gemm_ops", "deep_gemm", "deep_gemm_pdl"} <= set(record["times"])
    assert set(record["times"]) | set(record["failed"]) == {"deep_gemm_ops", "scaled_mm", "deep_gemm", "deep_gemm_pdl"}
    assert record["row"] == {"index": 0, "name": "row0"}
    assert report.fastest_reference(record) == ("deep_gemm_pdl", 11.0) or "scaled_mm" in record["times"]
    assert report.speedup(record, "deep_gemm") == pytest.approx(1.2)


def test_gemm_record_never_times_a_wrong_result(on_cpu):
    on_cpu.setitem(sys.modules, "deep_gemm", fake_deep_gemm(wrong=True))
    record = suites.gemm_record(16, 128, 256, limits=LIMITS, repeats=3)
    assert "wrong result" in record["failed"]["deep_gemm"]
    assert "deep_gemm" not in record["times"]


def test_gemm_record_1d1d_float32(on_cpu):
    record = suites.gemm_record(
        16, 128, 256, limits=LIMITS, scaling="1d1d", out_dtype=torch.float32, repeats=3, references=False
    )
    assert record["out_dtype"] == "float32"
    assert record["errors"]["deep_gemm_ops"] < 1.5e-3


@pytest.mark.parametrize("experts", [0, 3])
def test_layer_record(on_cpu, experts):
    record = layers.layer_record(40, 32, 64, experts, limits=LIMITS, repeats=3)
    assert record["failed"] == {}
    assert set(record["times"]) == {"deep_gemm_ops", "bf16"}
    assert 0.01 < record["errors"]["deep_gemm_ops"] < 0.1
    assert record["flops"] == 6 * 40 * 32 * 64 * (3 if experts else 1)
    line = report.layer_line(record)
    assert line.split()[:4] == ["40", "32", "64", str(experts or "-")]
    assert "| BF16" in line
    assert report.layer_line(record) in report.text({"layers": [record], "device": {}})
    assert f"| {experts or '-'} |" in report.markdown({"layers": [record], "device": {}})
    json.dumps(record)


def test_layer_record_never_times_a_wrong_gradient(on_cpu):
    from deep_gemm_ops.nn import _linear

    original = _linear.weight_gradient
    on_cpu.setattr(_linear, "weight_gradient", lambda *arguments: 1.2 * original(*arguments))
    record = layers.layer_record(40, 32, 64, 0, limits=LIMITS, repeats=3)
    assert "a gradient differs from BF16's by 0.2" in record["failed"]["deep_gemm_ops"]
    assert set(record["times"]) == {"bf16"}
    (line,) = report.failures({"layers": [record]})
    assert line.startswith("layer 40 32 64: a gradient differs")


def test_rows_record_times_supported_rows_and_names_broken_ones(on_cpu):
    on_cpu.setattr(suites, "_capi", lambda: fake_capi(broken=1))
    record = suites.rows_record(16, 128, 256, limits=LIMITS, repeats=3)
    assert [row["index"] for row in record["rows"]] == [0, 2]
    assert record["failed"] == {"1": "RuntimeError: row is broken"}
    quality = report.selection_quality(record)
    assert quality["best"]["index"] == 2
    assert quality["loss"] == pytest.approx(0.25)
    run = {"rows": [record]}
    assert "loss 25.0%" in report.rows_text(run)
    assert report.failures(run) == ["M=16 N=128 K=256 row 1: RuntimeError: row is broken"]


def test_cast_records_are_checked_to_the_bit(on_cpu):
    records = list(suites.cast_records(130, 272, limits=LIMITS, repeats=3))
    assert [record["op"] for record in records] == [
        "per_token_cast_to_fp8",
        "per_token_cast_to_fp8 packed UE8M0",
        "per_channel_cast_to_fp8",
        "per_block_cast_to_fp8",
        "transpose_fp8",
        "per_token_cast_to_fp4",
        "swiglu_cast_to_fp8",
        "swiglu_cast_to_fp8 clamp 10",
        "swiglu_backward",
        "per_token_cast_to_fp8_with_transpose",
        "per_block_cast_to_fp8_with_transpose",
        "per_channel_cast_to_fp8_transposed",
        "per_block_cast_to_fp8_transposed",
        "k_grouped_per_channel_cast_to_fp8",
        "k_grouped_per_channel_cast_to_fp8_k_major",
    ]
    for record in records:
        assert record["failed"] == {}
        assert set(record["times"]) == {"deep_gemm_ops", "copy"}
    assert records[0]["bytes"] == 130 * 272 * 3 + 130 * 3 * 4
    values, scales = reference.per_token_cast_to_fp8(normal(2, 128).float())
    suites.check_equal((values, scales), (values.clone(), scales.clone()))
    with pytest.raises(RuntimeError, match="scales differ from the reference in 2 of 2 places"):
        suites.check_equal((values, scales), (values, scales * 2))
    with pytest.raises(RuntimeError, match="values differ"):
        suites.check_equal(values, (-values.float()).to(values.dtype))


@pytest.mark.parametrize("wrong", [False, True])
def test_prenorm_record(on_cpu, wrong: bool):
    on_cpu.setitem(sys.modules, "deep_gemm", fake_deep_gemm(wrong))
    record = suites.prenorm_record(70, 24, 272, limits=LIMITS, repeats=3)
    assert set(record["times"]) == {"deep_gemm_ops", "torch_tf32", "copy"} | (set() if wrong else {"deep_gemm"})
    assert ("wrong result" in record["failed"].get("deep_gemm", "")) == wrong
    assert record["bytes"] == 70 * 272 * 2 + 24 * 272 * 4 + 70 * 25 * 4
    assert set(suites.prenorm_record(8, 3, 64, limits=LIMITS, references=False)["times"]) == {"deep_gemm_ops", "copy"}
    run = {"device": vars(LIMITS), "prenorm": [record | {"failed": {"deep_gemm_ops": "wrong result"}}]}
    assert report.failures(run) == ["pre-norm M=70 N=24 K=272: wrong result"]
    assert "pre-norm, M" in report.text(run)
    assert "| 70 | 24 | 272 |" in report.markdown(run)


def test_host_records(on_cpu):
    on_cpu.setitem(sys.modules, "deep_gemm", fake_deep_gemm())
    names = [record["name"] for record in suites.host_records()]
    assert names[:2] == ["deep_gemm_ops.fp8_gemm_nt", "deep_gemm_ops.per_token_cast_to_fp8"]
    assert "reference deep_gemm" in names
    on_cpu.setattr(suites, "_ours", lambda *arguments: 1 / 0)
    run = {"host": suites.host_records(references=False)}
    why = "ZeroDivisionError: division by zero"
    assert report.failures(run) == [f"host time of torch.ops fp8_gemm_nt.out, recipe=: {why}"]
    assert report.goals(run)[-1]["met"] is None
    assert "ZeroDivisionError" in report.text(run)
    report.markdown(run)


def test_mqa_records(on_cpu):
    """Ours and the public package over small problems of each kind; a wrong result is not timed."""
    on_cpu.setattr(
        mqa_logits, "DENSE", [mqa_logits.Dense(8, 24, 16, split=True), mqa_logits.Dense(6, 30, compressed=True)]
    )
    on_cpu.setattr(mqa_logits, "PAGED", [mqa_logits.Paged(3, 2, 90, 32)])
    module = fake_deep_gemm()
    module.get_num_sms = lambda: 132
    module.get_paged_mqa_logits_metadata = torch.ops.deep_gemm.get_paged_mqa_logits_metadata

    def dense(q, kv, weights, start, end, **options):
        return torch.ops.deep_gemm.fp8_mqa_logits(q, *kv, weights, start, end, **options)

    module.fp8_mqa_logits = dense
    module.fp8_paged_mqa_logits = lambda *inputs, **options: torch.ops.deep_gemm.fp8_paged_mqa_logits(*inputs) * 2
    on_cpu.setitem(sys.modules, "deep_gemm", module)
    records = list(mqa_logits.mqa_records(LIMITS, repeats=3))
    assert [sorted(record["times"]) for record in records] == [["deep_gemm", "deep_gemm_ops"]] * 2 + [["deep_gemm_ops"]]
    assert records[0]["flops"] == 2 * 16 * 128 * sum([4, 5, 6, 7][i % 4] - 4 + [4, 16][i // 4] for i in range(8))
    assert records[2]["failed"]["deep_gemm"].startswith("wrong result")
    run = {"mqa": records, "device": {"copy_gbps": 4000.0}}
    assert report.failures(run) == []
    text = report.text(run)
    assert "S 8, S_kv 24, H 16, split" in text and "geometric mean over DeepGEMM 1.20x" in text
    records[0]["failed"]["deep_gemm_ops"] = "wrong result: off"
    assert report.failures(run) == ["S 8, S_kv 24, H 16, split, deep_gemm_ops: wrong result: off"]


def test_mqa_records_of_fp4(on_cpu):
    """The public package gets pairs, and FP4 as int8."""
    on_cpu.setattr(mqa_logits, "DENSE", [mqa_logits.Dense(6, 30, 16, fp4=True)])
    on_cpu.setattr(mqa_logits, "PAGED", [mqa_logits.Paged(3, 2, 90, 32, fp4=True)])
    module, ops = fake_deep_gemm(), torch.ops.deep_gemm
    module.get_num_sms = lambda: 132
    module.get_paged_mqa_logits_metadata = ops.get_paged_mqa_logits_metadata

    def dense(q, kv, *others, **options):
        assert q[0].dtype == kv[0].dtype == torch.int8
        return ops.fp8_fp4_mqa_logits(*q, *kv, *others, **options)

    module.fp8_fp4_mqa_logits = dense
    module.fp8_fp4_paged_mqa_logits = lambda q, *others, **options: ops.fp8_fp4_paged_mqa_logits(*q, *others, **options)
    on_cpu.setitem(sys.modules, "deep_gemm", module)
    records = list(mqa_logits.mqa_records(LIMITS, repeats=3))
    assert [sorted(record["times"]) for record in records] == [["deep_gemm", "deep_gemm_ops"]] * 2
    assert records[0]["flops"] == 2 * 16 * 128 * sum(range(24, 30))
    assert "paged, B 3, next_n 2, L 90, H 32, FP4" in report.text({"mqa": records, "device": {"copy_gbps": 4000.0}})


def test_mega_records(on_cpu):
    """In one operator and in many, with the same result; a wrong one is reported."""
    for name, value in (("LOCAL_EXPERTS", 4), ("EXPERTS", 16), ("TOPK", 3)):
        on_cpu.setattr(mega_moe, name, value)
    on_cpu.setattr(mega_moe, "LAYERS", [mega_moe.Layer(n, 128, 256, fp4) for fp4 in (False, True) for n in (1, 9)])
    records = list(mega_moe.mega_records(LIMITS, repeats=3))
    assert [sorted(record["times"]) for record in records] == [["deep_gemm_ops", "deep_gemm_ops operators"]] * 4
    assert [record["op"] for record in records] == ["fp8_mega_moe"] * 2 + ["fp8_fp4_mega_moe"] * 2
    assert records[0]["flops"] == 2 * 3 * 256 * 128 and not any(record["failed"] for record in records)
    run = {"mega_moe": records, "device": {"copy_gbps": 4000.0}}
    assert "9 tokens, 4 of 16 x 128 x 256" in report.text(run) and report.failures(run) == []
    if _capi.available():
        on_cpu.setattr(mega_moe, "TUNING", mega_moe.TUNING[-1:])
        record = next(mega_moe.tuning_records(LIMITS, repeats=1))
        assert list(record["times"]) == ["deep_gemm_ops", "lag 7, prefetch_bytes 0"] and not record["failed"]
    on_cpu.setattr(mega_moe._Problem, "expected", lambda self: self.by_operators(0) + 1)
    (record, *_) = mega_moe.mega_records(LIMITS, repeats=3, references=False)
    assert record["failed"]["deep_gemm_ops"].startswith("wrong result")


def test_mega_moe_over_ranks(monkeypatch, tmp_path: Path, capsys):
    """On one rank, on the CPU, where the collectives have one, too. All contenders agree, or are not timed."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    from deep_gemm_ops.bench import mega_moe_ranks

    monkeypatch.setenv("MASTER_PORT", "0")
    sizes = ["--hidden", "256", "--intermediate", "128", "--local-experts", "4", "--topk", "3", "--repeats", "1"]
    arguments = ["--cpu", *sizes, "--json", str(tmp_path / "run.json"), "--tokens"]
    mega_moe_ranks.main([*arguments, "1", "9"])
    records = json.loads((tmp_path / "run.json").read_text())["records"]
    assert [f"{record['weights']} {record['tokens']}" for record in records] == ["FP8 1", "FP8 9", "FP4 1", "FP4 9"]
    for record in records:
        assert sorted(record["times"]) == ["exact", "graph", "kernel", "kernel, own experts", "layer"]
        assert (record["rows"], record["link_bytes"], record["failed"]) == (3 * record["tokens"], 0, {})
    assert "| FP4 | 9 |" in capsys.readouterr().out
    plain = mega_moe_ranks.reference_layer
    monkeypatch.setattr(mega_moe_ranks, "reference_layer", lambda *arguments: plain(*arguments) + 1)
    mega_moe_ranks.main([*arguments, "1", "--weights", "FP8"])
    assert "exact: wrong result on some rank" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "run.json").read_text())["records"]
    assert record["times"] == {} and len(record["failed"]) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def gemm(m: int, n: int, k: int, **microseconds: float) -> dict:
    times = {name: {"median": us, "min": us, "max": us} for name, us in microseconds.items()}
    return {"m": m, "n": n, "k": k, "bytes": m * k + n * k + 2 * m * n, "times": times, "failed": {}, "errors": {}}


def full_run(ours: float = 1.0) -> dict:
    run = {"date": "2026-11-24", "device": vars(LIMITS) | {}, "software": {"PyTorch": "2.11.0"}, "method": "Medians."}
    run["gemm"] = []
    for m in BENCH_M:
        for n, k in BENCH_SHAPES:
            floor = max(n * k / 4000e3, 2e-6 * m * n * k / 1979)
            run["gemm"].append(
                gemm(m, n, k, deep_gemm_ops=1.1 * floor * ours, scaled_mm=1.5 * floor, deep_gemm=1.3 * floor)
            )
    run["casts"] = [
        {"op": "per_token_cast_to_fp8", "rows": 4096, "cols": 7168, "bytes": 88080384, "failed": {}}
        | {"times": {"deep_gemm_ops": {"median": 24.0 * ours}, "copy": {"median": 22.0}}}
    ]
    run["prenorm"] = [
        {"m": 8192, "n": 24, "k": 7168, "bytes": 118925312, "failed": {}}
        | {"times": {"deep_gemm_ops": {"median": 32.0 * ours}, "copy": {"median": 30.0}, "deep_gemm": {"median": 40.0}}}
    ]
    run["host"] = [{"name": "deep_gemm_ops.fp8_gemm_nt", "us": 5.0 * ours}, {"name": "reference deep_gemm", "us": 21.0}]
    return run


def test_figures():
    record = gemm(4096, 7168, 16384, deep_gemm_ops=600.0)
    f = report.figures(record, vars(LIMITS))
    assert f["tflops"] == pytest.approx(2 * 4096 * 7168 * 16384 / 600e-6 * 1e-12)
    assert f["peak_share"] == pytest.approx(f["tflops"] / 1979)
    assert f["gbps"] == pytest.approx(record["bytes"] / 600e-6 * 1e-9)
    assert f["weights_share"] == pytest.approx(7168 * 16384 / 600e-6 * 1e-9 / 4000)


def test_goals_met_missed_and_unmeasured():
    assert all(goal["met"] is True for goal in report.goals(full_run()))
    missed = [goal["goal"] for goal in report.goals(full_run(ours=1.4)) if goal["met"] is False]
    assert len(missed) == 10
    nothing = report.goals({"device": vars(LIMITS)})
    assert all(goal["met"] is None for goal in nothing)
    # One shape without a reference leaves the mean unmeasured rather than flattered.
    run = full_run()
    run["gemm"][0]["times"] = {"deep_gemm_ops": {"median": 1.0}}
    unmeasured = [goal["goal"] for goal in report.goals(run) if goal["met"] is None]
    assert unmeasured == ["M = 1, geometric mean over the fastest reference"]


def test_text_and_markdown():
    run = full_run()
    text = report.text(run)
    assert "Test GPU, 132 SMs, copy 4000 GB/s" in text
    assert text.count("geometric mean, M = ") == 5
    assert "NOT met" not in text
    markdown = report.markdown(run)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {len(line.split("|")) for line in rows[: 2 + 5 * 8]}
    assert len(widths) == 1
    assert "| **4096** | geometric mean |" in markdown
    assert "**1.18**" in markdown
    run["gemm"][3]["failed"]["deep_gemm_ops"] = "wrong result"
    del run["gemm"][3]["times"]["deep_gemm_ops"]
    assert "FAILED M=1 N=32768 K=512: wrong result" in report.text(run)
    report.markdown(run)


def test_plot_is_well_formed():
    for run in (full_run(), {"gemm": []}, {"gemm": [gemm(1, 2, 3, deep_gemm_ops=1.0)]}):
        root = ElementTree.fromstring(plot.svg(run))
        assert root.tag.endswith("svg")
    bars = [e for e in ElementTree.fromstring(plot.svg(full_run())).iter() if e.tag.endswith("title")]
    assert len(bars) == 2 * len(BENCH_M) * len(BENCH_SHAPES)


def test_replace_between_markers():
    document = "a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nz\n"
    result = report.replace_between_markers(document, "new\n")
    assert result == "a\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nz\n"
    assert report.replace_between_markers(result, "new") == result
    with pytest.raises(ValueError, match="bench:begin"):
        report.replace_between_markers("none", "new")


def test_readme_table_script(tmp_path: Path):
    path = Path(__file__).parent.parent / "bench" / "make_table.py"
    spec = importlib.util.spec_from_file_location("make_table", path)
    make_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_table)
    (tmp_path / "run.json").write_text(json.dumps(full_run()))
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- bench:begin -->\n<!-- bench:end -->\n")
    arguments = [str(tmp_path / "run.json"), "--readme", str(readme), "--plot", str(tmp_path / "bench.svg")]
    assert make_table.main([*arguments, "--check"]) == 1
    assert make_table.main(arguments) == 0
    assert "| 4096 | 7168 | 16384 |" in readme.read_text()
    assert make_table.main([*arguments, "--check"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_is_one_plain_message(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sees no CUDA device" in captured.err


def test_cpu_smoke_and_output_files(tmp_path: Path, capsys):
    files = [tmp_path / "deep" / name for name in ("run.json", "run.md", "run.svg")]
    arguments = ["--cpu", "--json", str(files[0]), "--markdown", str(files[1]), "--plot", str(files[2])]
    assert cli.main(arguments) == 0
    assert "CPU reference" in capsys.readouterr().out
    assert all(path.is_file() for path in files)
    assert "NaN" not in files[0].read_text()
    assert cli.main(["--from-json", str(files[0])]) == 0
    assert cli.main(["--from-json", str(tmp_path / "missing.json")]) == 2


def small_products(monkeypatch) -> None:
    """The same products at sizes that a CPU can do."""
    monkeypatch.setattr(products, "CONTIGUOUS", ((2, 128),))
    monkeypatch.setattr(products, "CONTIGUOUS_SHAPES", ((128, 256),))
    monkeypatch.setattr(products, "MASKED", ((3, 20),))
    monkeypatch.setattr(products, "MASKED_MAX", 64)
    monkeypatch.setattr(products, "K_GROUPED", ((128, 64, 48),))
    monkeypatch.setattr(products, "BATCHED", ((16, 2, 128, 64),))
    monkeypatch.setattr(products, "BENCH_SHAPES", ((64, 128),))


def test_products(on_cpu):
    small_products(on_cpu)
    records = [products.product_record(problem, limits=LIMITS, repeats=3) for problem in products.problems()]
    assert {record["op"] for record in records} == {
        *[f"m_grouped_{kind}_gemm_nt_{form}" for kind in ("fp8", "bf16") for form in ("contiguous", "masked")],
        *[f"k_grouped_{kind}_gemm_tn_contiguous" for kind in ("fp8", "bf16")],
        "bf16_gemm_nt",
        "einsum",
        "fp8_einsum",
    }
    for record in records:
        ours = [name for name in record["failed"] if name.startswith("deep_gemm_ops")]
        assert not ours, record
        assert record["times"]["deep_gemm_ops"]["median"] == 10.0
    run = {"products": records}
    assert report.failures(run) == []
    contiguous = [record for record in records if record["op"] == "m_grouped_fp8_gemm_nt_contiguous"]
    line = report.product_line(contiguous[0])
    assert_expected_inline(
        "\n".join([*line.split(" | "), *report.product_means({"products": contiguous})]),
        """\
m_grouped_fp8_gemm_nt_contiguous   2 x 128, N 128, K 256                    10.00 us      2 TFLOPS
psum 50.00 5.00x
offsets 50.00 5.00x
  m_grouped_fp8_gemm_nt_contiguous   deep_gemm_ops psum       5.000x of 1
  m_grouped_fp8_gemm_nt_contiguous   deep_gemm_ops offsets    5.000x of 1""",
    )


def test_fp4_products(on_cpu):
    on_cpu.setattr(fp4, "BENCH_M", (3,))
    on_cpu.setattr(fp4, "BENCH_SHAPES", ((136, 256),))
    on_cpu.setattr(fp4, "CONTIGUOUS", ((2, 128),))
    on_cpu.setattr(fp4, "MASKED", ((3, 20),))
    on_cpu.setattr(fp4, "MASKED_MAX", 32)
    on_cpu.setattr(fp4, "MASKED_SHAPES", ((130, 384),))
    records = [products.product_record(problem, limits=LIMITS, repeats=3) for problem in fp4.problems()]
    grouped = ["m_grouped_fp8_fp4_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_masked"]
    assert [record["op"] for record in records] == ["fp8_fp4_gemm_nt, M 3", *grouped]
    # The weights in FP4, FP8 and BF16 are the same numbers, so all contenders have passed the check.
    assert [sorted(record["times"]) for record in records] == [
        ["deep_gemm_ops", "deep_gemm_ops per 32", "fp8_gemm_nt", "torch.matmul"],
        ["deep_gemm_ops", "deep_gemm_ops per 32", "m_grouped_fp8_gemm_nt_contiguous"],
        ["deep_gemm_ops", "deep_gemm_ops per 32", "m_grouped_fp8_gemm_nt_masked"],
    ]
    assert not any(record["failed"] for record in records)
    assert records[0]["bytes"] < 3 * 256 + 136 * (128 + 8) + 3 * 136 * 2 + 4096


def test_wrong_products_are_not_timed(on_cpu):
    small_products(on_cpu)
    problem = next(products.problems())
    call = problem.ours["deep_gemm_ops psum"]
    problem.ours["deep_gemm_ops psum"] = lambda p: call(p) * 2
    record = products.product_record(problem, limits=LIMITS, repeats=3)
    assert "deep_gemm_ops psum" not in record["times"]
    (line,) = report.failures({"products": [record]})
    assert line.startswith("m_grouped_fp8_gemm_nt_contiguous 2 x 128, N 128, K 256 deep_gemm_ops psum: wrong result")


def test_measure_runs_every_suite_and_saves_as_it_goes(on_cpu, tmp_path: Path, capsys):
    on_cpu.setattr(suites, "_capi", fake_capi)
    on_cpu.setattr(timing, "device_limits", lambda: LIMITS)
    on_cpu.setattr(torch.cuda, "is_available", lambda: True)
    on_cpu.setattr(cases, "BENCH_CASTS", ((8, 128),))
    path = tmp_path / "run.json"
    on_cpu.setattr(cases, "BENCH_PRENORM", ((8, 24, 128),))
    arguments = ["--suite", "gemm,casts,host,rows,prenorm", "--shapes", "128x256,136x384", "--m", "3,16", "--quick"]
    assert cli.main([*arguments, "--no-references", "--json", str(path)]) == 0
    run = json.loads(path.read_text())
    problems = [(3, 128, 256), (3, 136, 384), (16, 128, 256), (16, 136, 384)]
    assert [(r["m"], r["n"], r["k"]) for r in run["gemm"]] == problems
    assert len(run["rows"]) == 4
    assert len(run["casts"]) == len(suites.CASTS)
    assert len(run["host"]) == 5
    assert len(run["prenorm"]) == 1
    assert run["device"]["name"] == "Test GPU"
    assert "selected   0" in capsys.readouterr().out


def test_a_device_fault_ends_the_run_and_keeps_what_was_measured(on_cpu, tmp_path: Path, capsys):
    def faulting(*problem, **options):
        if problem[0] == 16:
            raise suites.DeviceFault("M=16 N=128 K=256 deep_gemm_ops: an illegal memory access")
        return gemm(*problem, deep_gemm_ops=1.0)

    on_cpu.setattr(suites, "gemm_record", faulting)
    on_cpu.setattr(timing, "device_limits", lambda: LIMITS)
    on_cpu.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "run.json"
    assert cli.main(["--shapes", "128x256", "--m", "3,16,64", "--json", str(path)]) == 1
    run = json.loads(path.read_text())
    assert [record["m"] for record in run["gemm"]] == [3]
    assert "the device faulted, what follows was not measured: M=16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", ["--shapes 12", "--shapes 0x4", "--m a", "--m 0", "--suite x", "--repeats 0", "--scaling 2d"]
)
def test_bad_arguments(arguments: str, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments.split())
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
