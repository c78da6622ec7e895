"""``python -m deep_gemm_ops.bench``: options, order of the measurements, output."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import plot, report

SUITES = ("gemm", "products", "fp4", "prenorm", "mqa", "mega_moe", "mega_tuning", "casts", "host", "rows", "layers")
NO_GPU = (
    "deep_gemm_ops.bench: PyTorch sees no CUDA device here, so nothing can be measured. --cpu checks the CPU reference "
    "on small problems instead; --from-json FILE shows an earlier run."
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deep_gemm_ops.bench", description=__doc__)
    suite_help = f"comma-separated: {', '.join(SUITES)}; default %(default)s"
    parser.add_argument("--suite", default="gemm,products,prenorm,mqa,casts,host", help=suite_help)
    parser.add_argument("--shapes", type=_shapes, help="GEMM shapes as NxK,NxK (default: DeepSeek-V3's projections)")
    parser.add_argument("--m", type=_numbers, help="values of M, comma-separated (default: 1,16,64,128,4096)")
    parser.add_argument("--scaling", choices=("1d2d", "1d1d"), default="1d2d", help="scales of B: per block or per row")
    parser.add_argument("--out-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", action="store_true", help="only time each compiled row that supports a problem")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and shapes")
    parser.add_argument("--repeats", type=int, help="samples of each contender (default: 20; rows and --quick: 7)")
    parser.add_argument("--kernel-times", action="store_true", help="also kernel durations from the profiler")
    parser.add_argument("--no-references", action="store_true", help="time only this package")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run; rewritten after each measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables in Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG picture")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, show this run")
    parser.add_argument("--cpu", action="store_true", help="smoke test of the CPU reference; its times mean nothing")
    options = parser.parse_args(arguments)
    options.suites = ["rows"] if options.rows else options.suite.split(",")
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"--suite has {unknown[0]!r}, expected one of {', '.join(SUITES)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected at least 1")
    return options


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected integers such as 1,16,4096") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected positive integers")
    return values


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
            raise argparse.ArgumentTypeError(f"{part!r}, expected NxK such as 7168x16384")
        shapes.append((int(n), int(k)))
    return shapes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0: measured, 1: something of ours failed or was wrong, 2: no GPU or bad arguments."""
    options = parse(arguments)
    if options.from_json:
        try:
            run = json.loads(options.from_json.read_text())
        except (OSError, ValueError) as error:
            print(f"deep_gemm_ops.bench: cannot read {options.from_json}: {error}", file=sys.stderr)
            return 2
    elif options.cpu:
        run = cpu_smoke()
    elif not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    else:
        run = measure(options)
    print(report.text(run))
    _save(options, run)
    for path, content in ((options.markdown, report.markdown), (options.plot, plot.svg)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content(run))
    return 1 if report.failures(run) else 0


def _save(options: argparse.Namespace, run: dict[str, Any]) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The suites asked for, on the current CUDA device; each line is printed as it is measured."""
    from ..testing import bench as timing
    from . import suites

    limits = timing.device_limits()
    run: dict[str, Any] = suites.environment(limits)
    print(report.header(run), flush=True)
    started = time.perf_counter()
    try:
        for suite in options.suites:
            records = run.setdefault("products" if suite == "fp4" else suite, [])
            for record, line in _records(suite, options, limits, run):
                records.append(record)
                print(line, flush=True)
                _save(options, run)  # a run that is cut off leaves what it measured
    except suites.DeviceFault as fault:
        run["fault"] = str(fault)
    run["seconds"] = round(time.perf_counter() - started, 1)
    print(f"measured in {run['seconds']:.0f} s\n", flush=True)
    return run


def _records(suite: str, options: argparse.Namespace, limits: Any, run: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """Each record of one suite with the line to show for it."""
    from ..testing import cases
    from . import fp4, products, suites

    quick = options.quick
    shapes = options.shapes or (cases.BENCH_SHAPES[4:6] if quick else cases.BENCH_SHAPES)
    problems = [(m, n, k) for m in options.m or (cases.BENCH_M[::2] if quick else cases.BENCH_M) for n, k in shapes]
    variant = {"limits": limits, "scaling": options.scaling, "out_dtype": getattr(torch, options.out_dtype)}
    repeats = options.repeats or (7 if quick else 20)
    references = not options.no_references
    if suite == "gemm":
        contenders = ["scaled_mm", "deep_gemm", "deep_gemm_pdl"] if references else []
        print(report.gemm_head(contenders), flush=True)
        for problem in problems:
            record = suites.gemm_record(
                *problem, repeats=repeats, references=references, kernel_times=options.kernel_times, **variant
            )
            yield record, report.gemm_line(record, run["device"], contenders)
    elif suite in ("products", "fp4"):
        for product in (products if suite == "products" else fp4).problems(quick):
            record = products.product_record(product, limits=limits, repeats=repeats, references=references)
            yield record, report.product_line(record)
    elif suite == "rows":
        for problem in problems:
            record = suites.rows_record(*problem, repeats=options.repeats or 7, **variant)
            yield record, report.rows_line(record)
    elif suite == "casts":
        for rows, cols in cases.BENCH_CASTS[:1] if quick else cases.BENCH_CASTS:
            for record in suites.cast_records(rows, cols, limits=limits, repeats=repeats):
                yield record, report.cast_line(record, run["device"])
    elif suite == "prenorm":
        for problem in cases.BENCH_PRENORM[:5:4] if quick else cases.BENCH_PRENORM:
            record = suites.prenorm_record(*problem, limits=limits, repeats=repeats, references=references)
            yield record, report.prenorm_line(record, run["device"])
    elif suite == "mqa":
        from . import mqa_logits

        for record in mqa_logits.mqa_records(limits, repeats=repeats, references=references, quick=quick):
            yield record, report.mqa_line(record, run["device"])
    elif suite == "mega_moe":
        from . import mega_moe

        for record in mega_moe.mega_records(limits, repeats=repeats, references=references, quick=quick):
            yield record, report.product_line(record)
    elif suite == "mega_tuning":
        from . import mega_moe

        for record in mega_moe.tuning_records(limits, repeats=options.repeats or 7, quick=quick):
            yield record, report.product_line(record)
    elif suite == "layers":
        from . import layers

        for problem in layers.BENCH_LAYERS[:5:4] if quick else layers.BENCH_LAYERS:
            record = layers.layer_record(*problem, limits=limits, repeats=repeats, references=references)
            yield record, report.layer_line(record)
    else:
        for record in suites.host_records(references=references):
            yield record, report.host_line(record)


def cpu_smoke() -> dict[str, Any]:
    """Every operator of the suites once on the CPU reference, checked against float64 and the specification."""
    from .. import reference
    from ..testing.bench import count_bytes
    from ..testing.cases import GemmCase, make_gemm_operands
    from ..testing.numeric import compare, error_bar
    from . import suites

    run = suites.environment(None)
    run["method"] = "CPU reference: the times say nothing about the kernels."
    run["gemm"], run["casts"] = [], []
    for case in (GemmCase(4, 264, 384), GemmCase(65, 136, 528, recipe=(1, 1, 128)), GemmCase(1, 128, 256)):
        x = make_gemm_operands(case)
        begin = time.perf_counter()
        result = torch.ops.deep_gemm.fp8_gemm_nt(*x, recipe=case.recipe)
        us = (time.perf_counter() - begin) * 1e6
        expected = reference.fp8_gemm(*x, recipe=case.recipe, out_dtype=torch.float64, exact=True)
        verdict = compare(result, expected, tol=error_bar(torch.bfloat16))
        record = {"m": case.m, "n": case.n, "k": case.k, "bytes": count_bytes(x.tensors(), result)}
        record |= {"times": {report.OURS: suites.summary([us])}, "failed": {}}
        record["errors"] = {report.OURS: verdict.rel_error}
        if not verdict.ok:
            record["failed"][report.OURS] = verdict.describe()
        run["gemm"].append(record)
    x = make_gemm_operands(GemmCase(130, 128, 304)).a.float().to(torch.bfloat16)
    for op, flags in suites.CASTS:
        sources = suites.cast_inputs(op, x)
        begin = time.perf_counter()
        result = getattr(torch.ops.deep_gemm, op)(*sources, **flags)
        us = (time.perf_counter() - begin) * 1e6
        record = {"op": suites.cast_label(op, flags), "rows": x.shape[0], "cols": x.shape[1]}
        record |= {"bytes": count_bytes(sources, result), "times": {report.OURS: suites.summary([us])}, "failed": {}}
        try:
            suites.check_equal(result, suites.cast_reference(op)(*sources, **flags))
        except RuntimeError as why:
            record["failed"][report.OURS] = str(why)
        run["casts"].append(record)
    return run
