"""Figures, tables and verdicts from the JSON of a benchmark run. Needs no GPU and no PyTorch.

A run is a dictionary: ``device`` (name, num_sms, l2_bytes, fp8_tflops, copy_gbps), ``software``, ``date``, ``method``
and one list of records a suite:

- ``gemm``: ``m, n, k, scaling, out_dtype, bytes``, ``times`` {contender: {median, min, max} in us}, ``kernel_us``
  {contender: us}, ``failed`` {contender: why}, ``errors`` {contender: relative error}, ``row`` (the kernel selected)
- ``products``: ``op, shape, flops, bytes, times, failed, errors``; contenders of ours beside the first are named
  ``deep_gemm_ops VARIANT``
- ``casts``: ``op, rows, cols, bytes, times, failed``
- ``prenorm``: ``m, n, k, bytes, times, failed, errors``
- ``layers``: ``tokens, n, k, experts, flops, times, failed, errors``: forward and backward pass
- ``host``: ``name`` and ``us`` or ``failed``
- ``rows``: ``m, n, k, selected``, ``rows`` [{index, name, us, cost_us}], ``failed`` {index: why}

``fault`` is there when a kernel faulted and ended the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

OURS = "deep_gemm_ops"
LABELS = {
    OURS: "deep_gemm_ops",
    "scaled_mm": "scaled_mm",
    "deep_gemm": "DeepGEMM",
    "deep_gemm_pdl": "DeepGEMM+PDL",
    "copy": "copy",
    "bf16": "BF16",
    "torch_tf32": "PyTorch TF32",
}
BIG_WEIGHTS_BYTES = 32 << 20
SMALL_M = (1, 16, 64, 128)
PRENORM_M = (4096, 8192)  # rows that pre-norm's goal is about

Record = Mapping[str, Any]


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def median_us(record: Record, name: str) -> float | None:
    timing = record.get("times", {}).get(name)
    return timing["median"] if timing else None


def fastest_reference(record: Record) -> tuple[str, float] | None:
    """Name and microseconds of the fastest contender that is not ours, None where there is none."""
    others = {name: timing["median"] for name, timing in record.get("times", {}).items() if name != OURS}
    return min(others.items(), key=lambda item: item[1]) if others else None


def figures(record: Record, device: Record, name: str = OURS) -> dict[str, float]:
    """What one contender reached on one record: ``us``, ``tflops``, ``gbps``, their share of the card's ceilings, and
    ``weights_share``, the bytes of B alone over time and copy bandwidth."""
    us = record["times"][name]["median"]
    gbps = record["bytes"] / us * 1e-3
    copy_gbps = device.get("copy_gbps") or math.nan
    result = {"us": us, "gbps": gbps, "copy_share": gbps / copy_gbps}
    if "k" in record:
        tflops = 2e-6 * record["m"] * record["n"] * record["k"] / us
        result |= {
            "tflops": tflops,
            "peak_share": tflops / (device.get("fp8_tflops") or math.nan),
            "weights_share": record["n"] * record["k"] / us * 1e-3 / copy_gbps,
        }
    return result


def speedup(record: Record, reference: str | None = None) -> float | None:
    """How many times faster ours is than ``reference`` (the fastest one by default)."""
    ours = median_us(record, OURS)
    if reference is None:
        fastest = fastest_reference(record)
        other = fastest[1] if fastest else None
    else:
        other = median_us(record, reference)
    return other / ours if ours and other else None


def _mean_speedup(group: Iterable[Record], reference: str) -> float | None:
    ratios = [ratio for record in group if (ratio := speedup(record, reference))]
    return geomean(ratios) if ratios else None


def by_m(run: Record) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record in run.get("gemm", []):
        groups.setdefault(record["m"], []).append(record)
    return dict(sorted(groups.items()))


def references(run: Record) -> list[str]:
    """Contenders other than ours that any GEMM record has, in a fixed order."""
    seen = {name for record in run.get("gemm", []) for name in record.get("times", {})} - {OURS}
    return sorted(seen, key=lambda name: (list(LABELS).index(name) if name in LABELS else len(LABELS), name))


# ---------------------------------------------------------------------------------------------------------------------
# Goals


def goals(run: Record) -> list[dict[str, Any]]:
    """``{goal, target, value, met}`` of each speed goal; ``value`` and ``met`` are None where the run has no data."""
    device = run.get("device", {})
    groups = by_m(run)
    found: list[dict[str, Any]] = []

    def add(goal: str, target: float, value: float | None, unit: str, below: bool = False) -> None:
        if value is not None and math.isnan(value):
            value = None
        met = None if value is None else (value < target if below else value >= target)
        found.append({"goal": goal, "target": target, "value": value, "unit": unit, "met": met})

    def mean_speedup(m: int) -> float | None:
        ratios = [speedup(record) for record in groups.get(m, [])]
        return geomean(ratios) if ratios and None not in ratios else None

    add("M = 4096, geometric mean over the fastest reference", 1.05, mean_speedup(4096), "x")
    big = [
        figures(record, device)["tflops"]
        for record in groups.get(4096, [])
        if (record["n"], record["k"]) == (7168, 16384) and median_us(record, OURS)
    ]
    add("M = 4096, N = 7168, K = 16384", 1400, big[0] if big else None, "TFLOPS")
    for m in SMALL_M:
        add(f"M = {m}, geometric mean over the fastest reference", 1.15, mean_speedup(m), "x")
    shares = [
        figures(record, device)["weights_share"]
        for m in SMALL_M
        for record in groups.get(m, [])
        if record["n"] * record["k"] > BIG_WEIGHTS_BYTES and median_us(record, OURS)
    ]
    add("weights over 32 MB at M <= 128, slowest, share of copy bandwidth", 0.80, min(shares, default=None), "")
    # Memory-bound operators against a copy that moves as many bytes: both start, and end, in a few microseconds.
    shares = [share for record in run.get("casts", []) if (share := speedup(record, "copy"))]
    add("casts, slowest, share of the speed of a copy of as many bytes", 0.85, min(shares, default=None), "")
    prenorm = [record for record in run.get("prenorm", []) if record["m"] in PRENORM_M]
    shares = [share for record in prenorm if (share := speedup(record, "copy"))]
    label = "pre-norm at M of 4096 and 8192, slowest, share of the speed of a copy of as many bytes"
    add(label, 0.80, min(shares, default=None), "")
    host = [record.get("us", math.nan) for record in run.get("host", []) if _is_ours(record)]
    slowest = math.nan if any(map(math.isnan, host)) else max(host, default=None)
    add("host time of a call, slowest form", 6.0, slowest, "us", below=True)
    return found


def _is_ours(host_record: Record) -> bool:
    return not host_record["name"].startswith("reference")


def failures(run: Record) -> list[str]:
    """One line for everything of ours that failed or gave a wrong result; references may fail."""
    lines = [f"the device faulted, what follows was not measured: {run['fault']}"] if run.get("fault") else []
    for record in run.get("gemm", []):
        if OURS in record.get("failed", {}):
            lines.append(f"M={record['m']} N={record['n']} K={record['k']}: {record['failed'][OURS]}")
    for record in [*run.get("products", []), *run.get("mega_moe", [])]:
        for name, why in record.get("failed", {}).items():
            if name.startswith(OURS):
                lines.append(f"{record['op']} {record['shape']} {name}: {why}")
    for record in run.get("casts", []):
        if OURS in record.get("failed", {}):
            lines.append(f"{record['op']} {record['rows']}x{record['cols']}: {record['failed'][OURS]}")
    for record in run.get("prenorm", []):
        if OURS in record.get("failed", {}):
            lines.append(f"pre-norm M={record['m']} N={record['n']} K={record['k']}: {record['failed'][OURS]}")
    for record in run.get("mqa", []):
        for name, why in record["failed"].items():
            if name != "deep_gemm":
                lines.append(f"{record['op']}, {name}: {why}")
    for record in run.get("layers", []):
        if OURS in record.get("failed", {}):
            lines.append(f"layer {record['tokens']} {record['n']} {record['k']}: {record['failed'][OURS]}")
    for record in run.get("host", []):
        if "failed" in record and _is_ours(record):
            lines.append(f"host time of {record['name']}: {record['failed']}")
    for record in run.get("rows", []):
        for index, why in record.get("failed", {}).items():
            lines.append(f"M={record['m']} N={record['n']} K={record['k']} row {index}: {why}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Rows: how good is the selection?


def selection_quality(record: Record) -> dict[str, Any] | None:
    """``{selected, best}`` rows of a sweep record and ``loss``, how much longer the selected one takes (0.05: 5 %)."""
    timed = [row for row in record.get("rows", []) if row.get("us")]
    if not timed:
        return None
    best = min(timed, key=lambda row: row["us"])
    selected = next((row for row in timed if row["index"] == record.get("selected")), None)
    return {"best": best, "selected": selected, "loss": selected["us"] / best["us"] - 1 if selected else math.nan}


# ---------------------------------------------------------------------------------------------------------------------
# Text


def header(run: Record) -> str:
    device, software = run.get("device", {}), run.get("software", {})
    parts = [device.get("name", "unknown device")]
    if "num_sms" in device:
        parts.append(f"{device['num_sms']} SMs")
    if device.get("copy_gbps"):
        parts.append(f"copy {device['copy_gbps']:.0f} GB/s")
    if device.get("fp8_tflops"):
        parts.append(f"FP8 peak {device['fp8_tflops']:.0f} TFLOPS")
    parts += [f"{name} {version}" for name, version in software.items() if version]
    return ", ".join(parts) + f" ({run.get('date', 'no date')})"


def gemm_line(record: Record, device: Record, names: Iterable[str]) -> str:
    """One line of the text table."""
    text = f"{record['m']:6d} {record['n']:6d} {record['k']:6d}"
    if median_us(record, OURS):
        f = figures(record, device)
        text += f" {f['us']:9.2f} {f['tflops']:7.0f} {_percent(f['peak_share']):>5}"
        text += f" {f['gbps']:6.0f} {_percent(f['copy_share']):>5}"
    else:
        text += f" {'-':>9} {'-':>7} {'-':>5} {'-':>6} {'-':>5}"
    for name in names:
        us, ratio = median_us(record, name), speedup(record, name)
        text += f" | {us:9.2f}" if us else f" | {'-':>9}"
        text += f" {ratio:5.2f}x" if ratio else f" {'-':>6}"
    row = record.get("row")
    text += f"  {row['name']}" if row else ""
    return text + _failed(record)


def _failed(record: Record) -> str:
    """What failed, a line each; a reference's reason is cut short, ours is wanted whole."""
    lines = (
        (name, why if name == OURS or len(why) < 110 else why[:110] + " ...") for name, why in record["failed"].items()
    )
    return "".join(f"\n       {name}: {why}" for name, why in lines)


def gemm_head(names: Iterable[str]) -> str:
    text = f"{'M':>6} {'N':>6} {'K':>6} {'us':>9} {'TFLOPS':>7} {'peak':>5} {'GB/s':>6} {'copy':>5}"
    return text + "".join(f" | {LABELS.get(name, name):>16}" for name in names) + "  kernel"


def text(run: Record) -> str:
    """The whole run as plain text."""
    device, names = run.get("device", {}), references(run)
    lines = [header(run)]
    if run.get("gemm"):
        lines += ["", gemm_head(names)]
        for m, group in by_m(run).items():
            lines += [gemm_line(record, device, names) for record in group]
            if names:
                means = (_mean_speedup(group, name) for name in names)
                cells = (f" | {mean:15.2f}x" if mean else f" | {'-':>16}" for mean in means)
                lines.append(f"{'geometric mean, M = ' + str(m):>54}" + "".join(cells))
    if run.get("products"):
        lines += ["", "products", *map(product_line, run["products"])]
        lines += ["time over ours, geometric means", *product_means(run)]
    if run.get("mega_moe"):
        lines += ["", "expert layers", *map(product_line, run["mega_moe"])]
    if run.get("casts"):
        lines += ["", f"{'cast':<26} {'rows':>6} {'cols':>6} {'us':>9} {'GB/s':>6} {'copy':>5}"]
        lines += [cast_line(record, device) for record in run["casts"]]
    if run.get("prenorm"):
        lines += ["", f"{'pre-norm, M':>26} {'N':>6} {'K':>6} {'us':>9} {'GB/s':>6} {'copy':>5}"]
        lines += [prenorm_line(record, device) for record in run["prenorm"]]
    if run.get("mqa"):
        lines += ["", *(mqa_line(record, device) for record in run["mqa"])]
        ratios = [ratio for record in run["mqa"] if (ratio := speedup(record, "deep_gemm"))]
        lines += [f"geometric mean over DeepGEMM {geomean(ratios):.2f}x"] if ratios else []
    if run.get("layers"):
        lines += ["", f"{'forward + backward, tokens':>26} {'N':>6} {'K':>6} {'experts':>7} {'us':>9} {'TFLOPS':>7}"]
        lines += [layer_line(record) for record in run["layers"]]
    if run.get("host"):
        lines += ["", "host time of a call", *(host_line(record) for record in run["host"])]
    if run.get("rows"):
        lines += ["", rows_text(run)]
    lines += ["", goals_text(run)]
    lines += [f"FAILED {line}" for line in failures(run)]
    return "\n".join(lines)


def product_line(record: Record) -> str:
    """One line of the text table: ours, then every other contender with its time over ours."""
    text = f"{record['op']:<34} {record['shape']:<36}"
    ours = median_us(record, OURS)
    text += f" {ours:9.2f} us {record['flops'] / ours * 1e-6:6.0f} TFLOPS" if ours else f" {'-':>9}"
    for name, timing in record["times"].items():
        if name != OURS:
            ratio = f" {timing['median'] / ours:.2f}x" if ours else ""
            text += f" | {LABELS.get(name, name.removeprefix(OURS + ' '))} {timing['median']:.2f}{ratio}"
    return text + _failed(record)


def product_means(run: Record) -> list[str]:
    """A line for each operator and contender: the geometric mean of its times over ours."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for record in run.get("products", []):
        for name in record.get("times", {}):
            ratio = speedup(record, name)
            if name != OURS and ratio:
                ratios.setdefault((record["op"], name), []).append(ratio)
    return [
        f"  {op:<34} {LABELS.get(name, name):<24} {geomean(values):.3f}x of {len(values)}"
        for (op, name), values in ratios.items()
    ]


def cast_line(record: Record, device: Record) -> str:
    text = f"{record['op']:<26} {record['rows']:6d} {record['cols']:6d}"
    if median_us(record, OURS):
        f = figures(record, device)
        text += f" {f['us']:9.2f} {f['gbps']:6.0f} {_percent(f['copy_share']):>5}"
        copy = median_us(record, "copy")
        text += f" | copy of as many bytes {copy:9.2f} us, {speedup(record, 'copy'):.2f}x" if copy else ""
    return text + _failed(record)


def prenorm_line(record: Record, device: Record) -> str:
    text = f"{record['m']:26d} {record['n']:6d} {record['k']:6d}"
    if median_us(record, OURS):
        f = figures(record, device)
        text += f" {f['us']:9.2f} {f['gbps']:6.0f} {_percent(f['copy_share']):>5}"
    for name in ("deep_gemm", "torch_tf32", "copy"):
        us, ratio = median_us(record, name), speedup(record, name)
        text += f" | {LABELS[name]} {us:9.2f} us {ratio:5.2f}x" if us and ratio else ""
    return text


def mqa_line(record: Record, device: Record) -> str:
    """MQA logits: ours, the reference, and each kernel that could have run it."""
    text = f"{record['op']:<48}"
    us = median_us(record, OURS)
    if us:
        gbps = record["bytes"] / us * 1e-3
        text += f" {us:9.2f} us {record['flops'] / us * 1e-6:6.0f} TFLOPS {gbps:6.0f} GB/s"
        text += f" {_percent(gbps / device['copy_gbps']):>5} of copy" if device.get("copy_gbps") else ""
    reference = median_us(record, "deep_gemm")
    if us and reference:
        text += f" | DeepGEMM {reference:9.2f} us {speedup(record, 'deep_gemm'):5.2f}x"
    for name in record["times"]:
        if name not in (OURS, "deep_gemm"):
            text += f"\n       {name:<40} {median_us(record, name):9.2f} us"
    return text + _failed(record)


def layer_line(record: Record) -> str:
    text = f"{record['tokens']:26d} {record['n']:6d} {record['k']:6d} {record['experts'] or '-':>7}"
    us, other, ratio = median_us(record, OURS), median_us(record, "bf16"), speedup(record, "bf16")
    if us:
        text += f" {us:9.1f} {record['flops'] / us * 1e-6:7.0f}"
    text += f" | {LABELS['bf16']} {other:9.1f} us {ratio:5.2f}x" if other and ratio else ""
    return text + _failed(record)


def host_line(record: Record) -> str:
    return f"  {record['name']:<40} " + (record["failed"] if "failed" in record else f"{record['us']:7.2f} us")


def rows_line(record: Record) -> str:
    quality = selection_quality(record)
    where = f"{record['m']:6d} {record['n']:6d} {record['k']:6d}"
    if quality is None:
        return f"{where}  no row timed"
    best, selected = quality["best"], quality["selected"]
    mine = f"{selected['index']:3d} {selected['us']:8.2f} us" if selected else f"{'-':>3} {'-':>8}   "
    cost = f" (model {selected['cost_us']:.2f})" if selected and selected.get("cost_us") is not None else ""
    text = f"{where}  selected {mine}{cost}  best {best['index']:3d} {best['us']:8.2f} us {best['name']}"
    return f"{text}  loss {quality['loss']:.1%}"


def rows_text(run: Record) -> str:
    """Selection quality: a line for each problem, then each row's times."""
    lines = ["rows: how far the selected kernel is from the best one"]
    lines += [rows_line(record) for record in run["rows"]]
    losses = [q["loss"] for q in map(selection_quality, run["rows"]) if q and not math.isnan(q["loss"])]
    if losses:
        lines.append(f"  mean loss {sum(losses) / len(losses):.1%}, worst {max(losses):.1%}")
    for record in run["rows"]:
        lines.append(f"M={record['m']} N={record['n']} K={record['k']}")
        for row in sorted(record["rows"], key=lambda row: row["us"]):
            cost = f"{row['cost_us']:9.2f}" if row.get("cost_us") is not None else f"{'-':>9}"
            mark = " <- selected" if row["index"] == record.get("selected") else ""
            lines.append(f"  {row['index']:3d} {row['us']:9.2f} us  model {cost}  {row['name']}{mark}")
    return "\n".join(lines)


def goals_text(run: Record) -> str:
    lines = ["goals"]
    for goal in goals(run):
        verdict = {True: "met", False: "NOT met", None: "not measured"}[goal["met"]]
        value = "" if goal["value"] is None else f"{_amount(goal['value'], goal['unit'])} "
        sign = "<" if goal["unit"] == "us" else ">="
        lines.append(f"  {verdict:<12} {goal['goal']}: {value}({sign} {_amount(goal['target'], goal['unit'])})")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _amount(value: float, unit: str) -> str:
    if unit == "":
        return f"{value:.0%}"
    return f"{value:.2f}x" if unit == "x" else f"{value:.0f} {unit}" if unit == "TFLOPS" else f"{value:.2f} {unit}"


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(run: Record) -> str:
    """Tables for a README: GEMM with a geometric mean for each M, casts, host time, goals."""
    device, names = run.get("device", {}), references(run)
    lines = [f"{header(run)}. {run.get('method', '')}".strip(), ""]
    if run.get("gemm"):
        head = ["M", "N", "K", "µs", "TFLOPS", "GB/s"] + [f"over {LABELS.get(name, name)}" for name in names]
        lines += [_md_row(head), _md_rule(len(head))]
        for m, group in by_m(run).items():
            for record in group:
                cells = [str(record[x]) for x in ("m", "n", "k")]
                if median_us(record, OURS):
                    f = figures(record, device)
                    cells += [
                        f"{f['us']:.1f}",
                        f"{f['tflops']:.0f} ({_percent(f['peak_share'])})",
                        f"{f['gbps']:.0f} ({_percent(f['copy_share'])})",
                    ]
                else:
                    cells += ["-"] * 3
                cells += [f"{ratio:.2f}" if (ratio := speedup(record, name)) else "-" for name in names]
                lines.append(_md_row(cells))
            if names:
                means = (_mean_speedup(group, name) for name in names)
                cells = [f"**{m}**", "geometric mean", "", "", "", ""]
                lines.append(_md_row(cells + [f"**{mean:.2f}**" if mean else "-" for mean in means]))
        lines.append("")
    if run.get("casts"):
        head = ["Cast", "Rows", "Columns", "µs", "GB/s", "of copy bandwidth", "of a copy of as many bytes"]
        lines += [_md_row(head), _md_rule(len(head), left=1)]
        for record in run["casts"]:
            cells = [f"`{record['op']}`", str(record["rows"]), str(record["cols"])]
            if median_us(record, OURS):
                f = figures(record, device)
                cells += [f"{f['us']:.1f}", f"{f['gbps']:.0f}", _percent(f["copy_share"])]
            else:
                cells += ["-"] * 3
            share = speedup(record, "copy")
            lines.append(_md_row([*cells, _percent(share) if share else "-"]))
        lines.append("")
    if run.get("prenorm"):
        head = ["Pre-norm, M", "N", "K", "µs", "GB/s", "of copy bandwidth", "of a copy of as many bytes"]
        head += ["over DeepGEMM", "over PyTorch TF32"]
        lines += [_md_row(head), _md_rule(len(head))]
        for record in run["prenorm"]:
            cells = [str(record[x]) for x in ("m", "n", "k")]
            if median_us(record, OURS):
                f = figures(record, device)
                cells += [f"{f['us']:.1f}", f"{f['gbps']:.0f}", _percent(f["copy_share"])]
            else:
                cells += ["-"] * 3
            share = speedup(record, "copy")
            cells.append(_percent(share) if share else "-")
            ratios = (speedup(record, name) for name in ("deep_gemm", "torch_tf32"))
            lines.append(_md_row(cells + [f"{ratio:.2f}" if ratio else "-" for ratio in ratios]))
        lines.append("")
    if run.get("layers"):
        head = ["Forward and backward, tokens", "N", "K", "experts", "µs", "TFLOPS", "over BF16"]
        lines += [_md_row(head), _md_rule(len(head))]
        for record in run["layers"]:
            us, ratio = median_us(record, OURS), speedup(record, "bf16")
            cells = [str(record[x] or "-") for x in ("tokens", "n", "k", "experts")]
            cells += [f"{us:.1f}", f"{record['flops'] / us * 1e-6:.0f}"] if us else ["-"] * 2
            lines.append(_md_row([*cells, f"{ratio:.2f}" if ratio else "-"]))
        lines.append("")
    if run.get("host"):
        lines += [_md_row(["Host time of a call", "µs"]), _md_rule(2, left=1)]
        for record in run["host"]:
            lines.append(_md_row([f"`{record['name']}`", f"{record['us']:.2f}" if "us" in record else "-"]))
        lines.append("")
    lines += [_md_row(["Goal", "Target", "Measured", ""]), _md_rule(4, left=1)]
    for goal in goals(run):
        value = "-" if goal["value"] is None else _amount(goal["value"], goal["unit"])
        verdict = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        lines.append(_md_row([goal["goal"], _amount(goal["target"], goal["unit"]), value, verdict]))
    return "\n".join(lines) + "\n"


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_rule(columns: int, left: int = 0) -> str:
    return "|" + "|".join(["---"] * left + ["---:"] * (columns - left)) + "|"


def replace_between_markers(document: str, content: str, name: str = "bench") -> str:
    """``document`` with what is between ``<!-- name:begin -->`` and ``<!-- name:end -->`` replaced by ``content``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"expected one '{begin}' and after it one '{end}' in the document")
    head, rest = document.split(begin)
    return head + begin + "\n" + content.strip("\n") + "\n" + end + rest.split(end)[1]
