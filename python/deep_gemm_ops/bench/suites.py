"""What is measured: GEMM, casts, host time, and every compiled row. Each function returns records for ``report``."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import deep_gemm_ops

from .. import fused_casts, prenorm_gemm, reference
from ..scaled_mm import to_scaled_mm_scales
from ..testing import bench as timing
from ..testing.cases import GemmCase, GemmOperands, make_gemm_operands
from ..testing.numeric import compare, error_bar
from .report import OURS

__all__ = ["cast_records", "environment", "gemm_record", "host_records", "prenorm_record", "rows_record"]

DEVICE = "cuda"
RECIPES = {"1d2d": (1, 128, 128), "1d1d": (1, 1, 128)}
CASTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("per_token_cast_to_fp8", {}),
    ("per_token_cast_to_fp8", {"use_packed_ue8m0": True}),
    ("per_channel_cast_to_fp8", {}),
    ("per_block_cast_to_fp8", {}),
    ("transpose_fp8", {}),
    ("per_token_cast_to_fp4", {}),
    ("swiglu_cast_to_fp8", {}),
    ("swiglu_cast_to_fp8", {"clamp": 10.0}),
    ("swiglu_backward", {}),
    ("per_token_cast_to_fp8_with_transpose", {}),
    ("per_block_cast_to_fp8_with_transpose", {}),
    ("per_channel_cast_to_fp8_transposed", {}),
    ("per_block_cast_to_fp8_transposed", {}),
    ("k_grouped_per_channel_cast_to_fp8", {}),
    ("k_grouped_per_channel_cast_to_fp8_k_major", {}),
)
K_GROUPS = 8  # of K-grouped casts, all but equal
METHOD = (
    "Bursts of back-to-back calls over operand sets that do not fit the L2, enqueued while the stream is held, the L2 "
    "evicted before each burst; contenders in turns, medians. Times include the gap between two kernels. Results are "
    "checked against float64 before they are timed."
)


class Contender(NamedTuple):
    call: Callable[[int], Any]  # runs operand set i
    result: Callable[[], torch.Tensor]  # what set 0 gave


def environment(limits: timing.DeviceLimits | None) -> dict[str, Any]:
    """The fields of a run that say where and how it was measured."""
    software = {
        "driver": _driver_version() if limits else None,
        "CUDA": torch.version.cuda,
        "PyTorch": torch.__version__,
        "deep_gemm_ops": deep_gemm_ops.__version__,
    }
    public = _public_deep_gemm()
    if limits and public is not None:
        software["DeepGEMM"] = getattr(public, "__version__", "unknown")
    device = dataclasses.asdict(limits) if limits else {"name": "CPU reference"}
    return {"date": time.strftime("%Y-%m-%d"), "device": device, "software": software, "method": METHOD}


def _driver_version() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return result.stdout.split("\n")[0].strip() or None if result.returncode == 0 else None


def _public_deep_gemm() -> Any | None:
    try:
        import deep_gemm
    except Exception:  # not installed, or installed for another PyTorch: its import fails in many ways
        return None
    return deep_gemm


# ---------------------------------------------------------------------------------------------------------------------
# GEMM


def _ours(sets: Sequence[GemmOperands], outs: Sequence[torch.Tensor], recipe: Sequence[int]) -> Contender:
    op = torch.ops.deep_gemm.fp8_gemm_nt.out

    def call(i: int) -> None:
        x = sets[i]
        op(x.a, x.sfa, x.b, x.sfb, recipe=recipe, out=outs[i])

    return Contender(call, lambda: outs[0])


def _scaled_mm(sets: Sequence[GemmOperands], out_dtype: torch.dtype, recipe: Sequence[int]) -> Contender:
    functional = torch.nn.functional
    kinds = functional.ScalingType
    kind_b = kinds.BlockWise128x128 if recipe[1] == 128 else kinds.BlockWise1x128

    scales = [(to_scaled_mm_scales(x.sfa, 1), to_scaled_mm_scales(x.sfb, recipe[1])) for x in sets]

    def call(i: int) -> torch.Tensor:
        x, (sfa, sfb) = sets[i], scales[i]
        return functional.scaled_mm(x.a, x.b.t(), sfa, kinds.BlockWise1x128, sfb, kind_b, output_dtype=out_dtype)

    return Contender(call, lambda: call(0))


def _deep_gemm(
    public: Any, sets: Sequence[GemmOperands], outs: Sequence[torch.Tensor], recipe: Sequence[int], pdl: bool
) -> Contender:
    pairs = [((x.a, x.sfa), (x.b, x.sfb.contiguous() if recipe[1] == 128 else x.sfb)) for x in sets]

    def call(i: int) -> None:
        public.set_pdl(pdl)
        public.fp8_gemm_nt(*pairs[i], outs[i], recipe=tuple(recipe), disable_ue8m0_cast=True)

    return Contender(call, lambda: outs[0])


def _builders(
    sets: Sequence[GemmOperands], outs: Sequence[torch.Tensor], case: GemmCase, references: bool
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    yield OURS, lambda: _ours(sets, outs, case.recipe)
    if not references:
        return
    if hasattr(torch.nn.functional, "scaled_mm"):
        yield "scaled_mm", lambda: _scaled_mm(sets, case.out_dtype, case.recipe)
    public = _public_deep_gemm()
    if public is not None and hasattr(public, "fp8_gemm_nt"):
        yield "deep_gemm", lambda: _deep_gemm(public, sets, outs, case.recipe, False)
        if hasattr(public, "set_pdl"):
            yield "deep_gemm_pdl", lambda: _deep_gemm(public, sets, outs, case.recipe, True)


class _Problem(NamedTuple):
    case: GemmCase
    sets: list[GemmOperands]
    outs: list[torch.Tensor]
    expected: torch.Tensor  # float64
    calls: int
    num_bytes: int


def _problem(case: GemmCase, limits: timing.DeviceLimits, min_burst_us: float) -> _Problem:
    if limits.major == 10:  # scales have to be powers of two there
        case = dataclasses.replace(case, use_ue8m0=True)
    first = make_gemm_operands(case, DEVICE)
    out = torch.empty(case.m, case.n, dtype=case.out_dtype, device=DEVICE)
    num_bytes = timing.count_bytes(first.tensors(), out)
    # A launch and its ramp cost about 2 us however small the problem is.
    floor_us = 2.0 + max(case.flops / limits.fp8_tflops * 1e-6, num_bytes / limits.copy_gbps * 1e-3)
    calls, count = timing.burst_plan(floor_us, num_bytes, limits.l2_bytes, min_burst_us=min_burst_us)
    sets = [first] + [first.clone() for _ in range(count - 1)]
    outs = [out] + [torch.empty_like(out) for _ in range(count - 1)]
    expected = reference.fp8_gemm(*first, recipe=case.recipe, out_dtype=torch.float64, exact=True)
    return _Problem(case, sets, outs, expected, calls, num_bytes)


def _checked(problem: _Problem, contender: Contender) -> tuple[float, str]:
    """Relative error of set 0 and what is wrong with it ("" when it is right)."""
    problem.outs[0].fill_(torch.nan)
    contender.call(0)
    result = compare(contender.result(), problem.expected, tol=error_bar(problem.case.out_dtype))
    return result.rel_error, "" if result.ok else f"wrong result: {result.describe()}"


def gemm_record(
    m: int,
    n: int,
    k: int,
    *,
    limits: timing.DeviceLimits,
    scaling: str = "1d2d",
    out_dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    references: bool = True,
    kernel_times: bool = False,
    min_burst_us: float = 200.0,
) -> dict[str, Any]:
    """Check and time one GEMM beside its references; with ``kernel_times`` also by the profiler."""
    case = GemmCase(m, n, k, recipe=RECIPES[scaling], out_dtype=out_dtype)
    problem = _problem(case, limits, min_burst_us)
    record: dict[str, Any] = {"m": m, "n": n, "k": k, "scaling": scaling, "out_dtype": str(out_dtype).split(".")[-1]}
    record |= {"bytes": problem.num_bytes, "calls": problem.calls, "sets": len(problem.sets)}
    record |= {"times": {}, "failed": {}, "errors": {}, "row": _selected_row(case, limits)}
    contenders: dict[str, Contender] = {}
    for name, build in _builders(problem.sets, problem.outs, case, references):
        try:
            contender = build()
            error, wrong = _checked(problem, contender)
        except Exception as why:
            record["failed"][name] = _note(f"M={m} N={n} K={k} {name}", why)
            continue
        record["errors"][name] = error
        if wrong:
            record["failed"][name] = wrong
        else:
            contenders[name] = contender
    record["times"] = _timed({name: c.call for name, c in contenders.items()}, problem, limits, repeats)
    if kernel_times:
        record["kernel_us"] = {}
        for name, contender in contenders.items():
            try:
                seconds = timing.bench_kineto(lambda c=contender: c.call(0), None, num_tests=10)
            except RuntimeError as why:
                record["failed"][f"{name} kernel time"] = _one_line(why)
            else:
                record["kernel_us"][name] = seconds * 1e6
    return record


def _timed(
    calls: dict[str, Callable[[int], Any]], problem: _Problem, limits: timing.DeviceLimits, repeats: int
) -> dict[str, dict[str, float]]:
    samples = timing.time_interleaved(
        calls, calls=problem.calls, sets=len(problem.sets), l2_bytes=limits.l2_bytes, repeats=repeats
    )
    return {name: summary(values) for name, values in samples.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class DeviceFault(RuntimeError):
    """A kernel faulted: this process can use the device no more."""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _note(who: str, error: Exception) -> str:
    """The failure as one line; raises DeviceFault when the device did not survive it."""
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceFault(f"{who}: {_one_line(error)}") from error
    return _one_line(error)


def _capi() -> Any | None:
    try:
        from .. import _capi as capi
    except (ImportError, OSError):
        return None
    return capi if capi.available() else None


def _select(capi: Any, case: GemmCase, limits: timing.DeviceLimits) -> dict[str, Any]:
    options = {"float_output": case.out_dtype == torch.float32, "num_sms": limits.num_sms}
    arch = "sm_100a" if limits.major == 10 else "sm_90a"
    return capi.select(case.m, case.n, case.k, recipe=case.recipe, arch=arch, **options)


def _selected_row(case: GemmCase, limits: timing.DeviceLimits) -> dict[str, Any] | None:
    capi = _capi()
    if capi is None:
        return None
    chosen = _select(capi, case, limits)
    return {"index": chosen["row"], "name": chosen["name"]} if chosen["row"] >= 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def rows_record(
    m: int,
    n: int,
    k: int,
    *,
    limits: timing.DeviceLimits,
    scaling: str = "1d2d",
    out_dtype: torch.dtype = torch.bfloat16,
    repeats: int = 7,
    min_burst_us: float = 120.0,
) -> dict[str, Any]:
    """Check and time every compiled row that supports one GEMM, each forced in turn."""
    capi = _capi()
    if capi is None:
        raise RuntimeError("the row sweep needs the shared library, which this installation lacks")
    case = GemmCase(m, n, k, recipe=RECIPES[scaling], out_dtype=out_dtype)
    problem = _problem(case, limits, min_burst_us)
    chosen = _select(capi, case, limits)
    record: dict[str, Any] = {"m": m, "n": n, "k": k, "scaling": scaling, "bytes": problem.num_bytes}
    record |= {"selected": chosen["row"], "rows": [], "failed": {}}
    ours = _ours(problem.sets, problem.outs, case.recipe)
    calls: dict[str, Callable[[int], Any]] = {}
    candidates: dict[str, dict[str, Any]] = {}
    for candidate in chosen["candidates"]:
        index = candidate["index"]
        if candidate.get("reason"):
            continue

        def call(i: int, index: int = index) -> None:
            with capi.force_instance(index):
                ours.call(i)

        try:
            _, wrong = _checked(problem, Contender(call, ours.result))
        except Exception as why:
            wrong = _note(f"M={m} N={n} K={k} row {index}", why)
        if wrong:
            record["failed"][str(index)] = wrong
        else:
            calls[str(index)] = call
            candidates[str(index)] = candidate
    for name, times in _timed(calls, problem, limits, repeats).items():
        fields = {field: candidates[name][field] for field in ("index", "name", "cost_us")}
        record["rows"].append(fields | {"us": times["median"]})
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Casts

_CAST_OUTS = ("out", "out_sf", "out_t", "out_t_sf")
_SWIGLU_BACKWARD_OUTS = ("out", "out_weighted", "out_row_weights")


def cast_records(rows: int, cols: int, *, limits: timing.DeviceLimits, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """Check (to the bit) and time each cast of a BF16 ``[rows, cols]`` beside a copy that moves as many bytes."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(rows, cols, device=DEVICE, generator=generator).to(torch.bfloat16)
    for op, options in CASTS:
        inputs = cast_inputs(op, x)
        record: dict[str, Any] = {"op": cast_label(op, options), "rows": rows, "cols": cols, "times": {}, "failed": {}}
        overload = getattr(torch.ops.deep_gemm, op)
        expected = cast_reference(op)(*inputs, **options)
        record["bytes"] = timing.count_bytes(inputs, expected)
        floor_us = 2.0 + record["bytes"] / limits.copy_gbps * 1e-3
        calls, count = timing.burst_plan(floor_us, record["bytes"], limits.l2_bytes)
        sources = [inputs] + [tuple(tensor.clone() for tensor in inputs) for _ in range(count - 1)]
        contenders: dict[str, Callable[[int], Any]] = {}
        try:
            outs = [overload(*s, **options) for s in sources]
            check_equal(outs[0], expected)
            contenders[OURS] = _cast_call(overload.out, op, sources, outs, options)
        except Exception as why:
            record["failed"][OURS] = _note(f"{record['op']} {rows}x{cols}", why)
        half = record["bytes"] // 2
        buffers = [torch.empty(2, half, dtype=torch.uint8, device=DEVICE).fill_(1) for _ in range(count)]
        contenders["copy"] = lambda i, buffers=buffers: buffers[i][0].copy_(buffers[i][1])
        samples = timing.time_interleaved(
            contenders, calls=calls, sets=count, l2_bytes=limits.l2_bytes, repeats=repeats
        )
        record["times"] = {name: summary(values) for name, values in samples.items()}
        yield record


def cast_inputs(op: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that a cast takes where ``x`` is the matrix to quantise."""
    if op == "transpose_fp8":
        return (reference.per_token_cast_to_fp8(x)[0],)
    if op == "swiglu_backward":
        return x, x[:, x.shape[1] // 2 :].contiguous()
    if op.startswith("k_grouped"):
        ends = torch.arange(1, K_GROUPS + 1) * x.shape[0] // K_GROUPS
        return x, ends.diff(prepend=torch.zeros(1)).to(torch.int32).to(x.device)
    return (x,)


def cast_reference(op: str) -> Callable[..., Any]:
    """The specification of a cast."""
    return getattr(fused_casts, f"reference_{op}", None) or getattr(reference, op)


def cast_label(op: str, options: dict[str, Any]) -> str:
    clamp = options.get("clamp")
    label = op if clamp is None else f"{op} clamp {clamp:g}"
    return label + (" packed UE8M0" if options.get("use_packed_ue8m0") else "")


def _cast_call(
    overload: Any, op: str, sources: Sequence[tuple[torch.Tensor, ...]], outs: Sequence[Any], options: dict[str, Any]
) -> Any:
    names = _SWIGLU_BACKWARD_OUTS if op == "swiglu_backward" else _CAST_OUTS
    keywords = [dict(zip(names, (out,) if isinstance(out, torch.Tensor) else out)) | options for out in outs]
    return lambda i: overload(*sources[i], **keywords[i])


def check_equal(actual: Any, expected: Any) -> None:
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected)
    for name, (got, want) in zip(("values", "scales", "transposed values", "transposed scales"), pairs):
        if got.element_size() == 1:
            got, want = got.view(torch.uint8), want.view(torch.uint8)
        if not torch.equal(got, want):
            wrong = int((got != want).sum())
            raise RuntimeError(f"{name} differ from the reference in {wrong} of {got.numel()} places")


# ---------------------------------------------------------------------------------------------------------------------
# Pre-norm


def prenorm_record(
    m: int, n: int, k: int, *, limits: timing.DeviceLimits, repeats: int = 20, references: bool = True
) -> dict[str, Any]:
    """Check and time ``tf32_hc_prenorm_gemm`` beside the public one, PyTorch, and a copy that moves as many bytes."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    a = torch.randn(m, k, device=DEVICE, generator=generator).to(torch.bfloat16)
    b = torch.randn(n, k, device=DEVICE, generator=generator)
    outs = [(torch.empty(m, n, device=DEVICE), torch.empty(m, device=DEVICE))]
    record: dict[str, Any] = {"m": m, "n": n, "k": k, "bytes": timing.count_bytes(a, b, outs)}
    record |= {"times": {}, "failed": {}, "errors": {}}
    floor_us = 2.0 + record["bytes"] / limits.copy_gbps * 1e-3
    calls, count = timing.burst_plan(floor_us, record["bytes"], limits.l2_bytes)
    sets = [(a, b)] + [(a.clone(), b.clone()) for _ in range(count - 1)]
    outs += [(torch.empty_like(outs[0][0]), torch.empty_like(outs[0][1])) for _ in range(count - 1)]
    expected = prenorm_gemm.reference(a, b, dtype=torch.float64)

    def ours(i: int) -> None:
        torch.ops.deep_gemm.tf32_hc_prenorm_gemm.out(*sets[i], out=outs[i][0], out_sqr_sum=outs[i][1])

    def pytorch(i: int) -> None:
        x = sets[i][0].float()
        torch.matmul(x, sets[i][1].t(), out=outs[i][0])
        torch.sum(x.square_(), dim=1, out=outs[i][1])

    contenders: dict[str, Callable[[int], Any]] = {OURS: ours}
    if references:
        contenders["torch_tf32"] = pytorch
        public = _public_deep_gemm()
        if public is not None and hasattr(public, "tf32_hc_prenorm_gemm"):
            contenders["deep_gemm"] = lambda i: public.tf32_hc_prenorm_gemm(*sets[i], *outs[i])
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # PyTorch's word for TF32
    try:
        for name, call in list(contenders.items()):
            try:
                for out in outs[0]:
                    out.fill_(torch.nan)
                call(0)
                verdicts = [compare(x, y, tol=error_bar(torch.float32, "tf32")) for x, y in zip(outs[0], expected)]
                record["errors"][name] = max(verdict.rel_error for verdict in verdicts)
                wrong = "; ".join(f"wrong result: {verdict.describe()}" for verdict in verdicts if not verdict.ok)
            except Exception as why:
                wrong = _note(f"pre-norm M={m} N={n} K={k} {name}", why)
            if wrong:
                record["failed"][name] = wrong
                del contenders[name]
        half = record["bytes"] // 2
        buffers = [torch.empty(2, half, dtype=torch.uint8, device=DEVICE).fill_(1) for _ in range(count)]
        contenders["copy"] = lambda i: buffers[i][0].copy_(buffers[i][1])
        samples = timing.time_interleaved(
            contenders, calls=calls, sets=count, l2_bytes=limits.l2_bytes, repeats=repeats
        )
    finally:
        torch.set_float32_matmul_precision(precision)
    record["times"] = {name: summary(values) for name, values in samples.items()}
    return record


# ---------------------------------------------------------------------------------------------------------------------
# Host time


def host_records(*, references: bool = True) -> list[dict[str, Any]]:
    """Microseconds the host needs to enqueue one call, on a problem the device finishes as fast as it is fed."""
    case = GemmCase(16, 576, 1536)
    x = make_gemm_operands(case, DEVICE)
    activations = torch.randn(16, 1536, device=DEVICE).to(torch.bfloat16)
    outs = [torch.empty(case.m, case.n, dtype=torch.bfloat16, device=DEVICE)]
    op = torch.ops.deep_gemm.fp8_gemm_nt
    calls: list[tuple[str, Callable[[], Callable[[int], Any]]]] = [
        (f"{OURS}.fp8_gemm_nt", lambda: lambda i: deep_gemm_ops.fp8_gemm_nt(x.a, x.sfa, x.b, x.sfb)),
        (f"{OURS}.per_token_cast_to_fp8", lambda: lambda i: deep_gemm_ops.per_token_cast_to_fp8(activations)),
        ("torch.ops fp8_gemm_nt", lambda: lambda i: op(x.a, x.sfa, x.b, x.sfb)),
        ("torch.ops fp8_gemm_nt.out", lambda: lambda i: op.out(x.a, x.sfa, x.b, x.sfb, out=outs[0])),
        ("torch.ops fp8_gemm_nt.out, recipe=", lambda: _ours([x], outs, case.recipe).call),
    ]
    if references:
        # What PyTorch itself needs for the least operator there is, by its own binding and by the one that ours have.
        neg = torch.ops.aten.neg.out
        calls.append(("reference torch.neg, out=", lambda: lambda i: torch.neg(outs[0], out=outs[0])))
        calls.append(("reference torch.ops aten.neg.out", lambda: lambda i: neg(outs[0], out=outs[0])))
        for name, build in _builders([x], outs, case, True):
            if name != OURS:
                calls.append((f"reference {name}", lambda b=build: b().call))
    records = []
    for name, build in calls:
        try:
            records.append({"name": name, "us": timing.host_time_per_call(build())})
        except Exception as why:
            records.append({"name": name, "failed": _note(name, why)})
    return records
