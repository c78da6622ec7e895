"""``python -m deep_gemm_ops.inspect``: the compiled kernels, which one a problem selects, and what one is made of.

    python -m deep_gemm_ops.inspect                        the tables of compiled rows: GEMM, the indexer's logits
    python -m deep_gemm_ops.inspect select M N K           the row a GEMM selects, and what it beat
    python -m deep_gemm_ops.inspect row ROW [--sass]       a row's registers, shared memory and instructions; ROW is the
                                                           index of a GEMM's or any row's name

Needs the compiled library but no GPU. ``row`` reads it with cuobjdump and nvdisasm, from PATH, CUDA_HOME or the
wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import _capi
from ._library import library_path

__all__ = ["find_tool", "kernel_resources", "kernel_sass", "main", "opcode_counts"]

# Opcodes worth a line of their own: what they do, by prefix of the SASS mnemonic.
NOTABLE = {
    "QGMMA": "FP8 tensor core",
    "HGMMA": "BF16/TF32 tensor core",
    "UTCQMMA": "FP8/FP4 tensor core",
    "UTCOMMA": "FP4 tensor core",
    "UTCHMMA": "BF16/TF32 tensor core",
    "UTCCP": "scales to tensor memory",
    "UTMALDG": "TMA load",
    "UTMASTG": "TMA store",
    "UTMAREDG": "TMA reduce",
    "FFMA": "FP32 multiply-add",
    "LDS": "shared load",
    "STS": "shared store",
    "STSM": "shared matrix store",
    "LDG": "global load",
    "STG": "global store",
    "LDL": "local load (spill)",
    "STL": "local store (spill)",
}


class InspectError(RuntimeError):
    """Something needed is missing or does not exist; the message is for the user."""


# ---------------------------------------------------------------------------------------------------------------------
# cuobjdump


def find_tool(name: str) -> Path:
    """cuobjdump or nvdisasm from PATH, ``CUDA_HOME`` or the wheel; raises InspectError that says what to install."""
    candidates = [shutil.which(name)]
    candidates += [f"{home}/bin/{name}" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    candidates += [f"{folder}/nvidia/cu13/bin/{name}" for folder in sys.path if folder]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise InspectError(f"{name} is missing: pip install nvidia-cuda-{name}, or put a CUDA toolkit's bin folder on PATH")


def _cuobjdump(*arguments: str | Path, disassemble: bool = False) -> str:
    command = [str(find_tool("cuobjdump")), *map(str, arguments)]
    environment = dict(os.environ)
    if disassemble:
        environment["NVDISASM_PATH"] = str(find_tool("nvdisasm").parent)
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise InspectError(f"{' '.join(command)} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def kernel_resources(library: Path, kernel: str) -> dict[str, Any]:
    """Resource usage of the kernel whose mangled name contains ``kernel``.

    Returns ``function`` (the mangled name) and what cuobjdump lists, in lower case: ``reg``, ``stack``, ``shared``
    (static, bytes), ``local`` and so on.
    """
    return _parse_resources(_cuobjdump("--dump-resource-usage", library), kernel)


def _parse_resources(text: str, kernel: str) -> dict[str, Any]:
    for function, usage in re.findall(r"Function ([^\s:]+):\s*\n\s*([A-Z][^\n]*)", text):
        if kernel in function:
            numbers = {name.lower(): int(value) for name, value in re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", usage)}
            return {"function": function, **numbers}
    raise InspectError(f"the library has no kernel with {kernel!r} in its name")


def kernel_sass(library: Path, function: str) -> list[str]:
    """SASS of one kernel by its mangled name, an instruction a line (predicate, mnemonic, operands)."""
    return _parse_sass(_cuobjdump("-sass", "-fun", function, library, disassemble=True))


def _parse_sass(text: str) -> list[str]:
    # /*0010*/   @P0 IADD3 R1, R1, -0x8, RZ ;   /* encoding */
    return [line.strip() for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;{}]+?)\s*;", text)]


def opcode_counts(sass: Sequence[str]) -> collections.Counter[str]:
    """How often each base mnemonic occurs (``QGMMA`` for ``QGMMA.64x128x32.F32.E4M3.E4M3``)."""
    counts: collections.Counter[str] = collections.Counter()
    for line in sass:
        match = re.match(r"(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*)", line)
        if match:
            counts[match.group(1)] += 1
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Views


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("index", "name", "arch", "tile", "cluster", "scaling", "gran_k", "stages", "shared", "threads")
    cells = [columns]
    for row in rows:
        cluster = str(row.get("cluster", "none"))
        size = row.get("cluster_size", 1)
        if "block_m" in row:
            tile = f"{row['block_m']}x{row['block_n']}x{row.get('block_k', 128)}{' swap' if row.get('swap_ab') else ''}"
        else:
            tile = f"{row['tile_keys']} keys x {row['cols'] * row['parts']}"  # of tokens' heads
        cells.append(
            (
                str(row["index"]) if "block_m" in row else "-",
                row["name"],
                row["arch"],
                tile,
                cluster if size == 1 else f"{cluster} {size}",
                str(row.get("scaling", "-")),
                str(row.get("gran_k", "-")),
                str(row.get("num_stages", "-")),
                str(row.get("shared_bytes", "-")),
                str(row.get("num_threads", "-")),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _selection(problem: str, selection: Mapping[str, Any]) -> str:
    usable = [c for c in selection["candidates"] if not c.get("reason")]
    refused = [c for c in selection["candidates"] if c.get("reason")]
    usable.sort(key=lambda c: c["cost_us"])
    lines = [problem]
    chosen = next((c for c in usable if c["index"] == selection["row"]), None)
    if chosen is None:
        lines.append("no compiled row supports it")
    else:
        lines.append(f"selected {chosen['index']:4d}  {chosen['cost_us']:9.2f} us in the cost model  {chosen['name']}")
        for other in usable:
            if other is not chosen:
                behind = other["cost_us"] / chosen["cost_us"] - 1 if chosen["cost_us"] else float("nan")
                lines.append(
                    f"    beat {other['index']:4d}  {other['cost_us']:9.2f} us {behind:+8.1%}  {other['name']}"
                )
    lines += [f" refused {other['index']:4d}  {other['name']}: {other['reason']}" for other in refused]
    return "\n".join(lines)


def _row_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    library = library_path()
    assert library is not None  # instances() was not empty
    resources = kernel_resources(library, row["kernel"])
    sass = kernel_sass(library, resources["function"])
    return {"row": dict(row), "resources": resources, "opcodes": dict(opcode_counts(sass)), "sass": sass}


def _row_text(facts: Mapping[str, Any]) -> str:
    row, resources, opcodes = facts["row"], facts["resources"], facts["opcodes"]
    lines = [f"{row['name']} (row {row['index']}, {row['arch']})", f"  kernel            {resources['function']}"]
    lines.append(
        f"  registers         {resources.get('reg', '?')} a thread at launch, {row.get('num_threads', '?')} threads"
    )
    lines.append(
        f"  shared memory     {row.get('shared_bytes', '?')} bytes dynamic, {resources.get('shared', 0)} static, "
        f"{row.get('num_stages', '?')} stages"
    )
    lines.append(f"  stack, local      {resources.get('stack', 0)}, {resources.get('local', 0)} bytes")
    lines.append(f"  instructions      {sum(opcodes.values())}")
    for opcode, meaning in NOTABLE.items():
        if opcodes.get(opcode):
            lines.append(f"    {opcode:<15} {opcodes[opcode]:6d}  {meaning}")
    if not opcodes.get("LDL") and not opcodes.get("STL"):
        lines.append("  no spills")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def _recipe(text: str) -> tuple[int, int, int]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r}, expected gran_m,gran_n,gran_k such as 1,128,128")
    return values


def _size(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer >= 0")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deep_gemm_ops.inspect",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output (before the command)")
    commands = parser.add_subparsers(dest="command")
    select = commands.add_parser("select", help="the row a GEMM selects, and what it beat")
    for name in ("m", "n", "k"):
        select.add_argument(name, type=_size, metavar=name.upper())
    select.add_argument(
        "--recipe", type=_recipe, default=(1, 128, 128), help="gran_m,gran_n,gran_k (default 1,128,128)"
    )
    select.add_argument("--bf16", metavar="LAYOUT", choices=("nt", "nn", "tn", "tt"), help="BF16 operands, no recipe")
    select.add_argument("--float32", action="store_true", help="FP32 instead of BF16 output")
    select.add_argument("--num-sms", type=_size, default=_capi.DEFAULT_NUM_SMS, help="SMs to use (default %(default)s)")
    select.add_argument("--arch", choices=("sm_90a", "sm_100a"), default="sm_90a", help="default %(default)s")
    row = commands.add_parser("row", help="a row's registers, shared memory and instructions")
    row.add_argument("row", metavar="ROW", help="an index of the GEMM table, or a name")
    row.add_argument("--sass", action="store_true", help="print the instructions too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 with a message on stderr."""
    options = _parse(arguments)
    try:
        print(_run(options))
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        sys.stderr.close()
    except InspectError as error:
        print(f"deep_gemm_ops.inspect: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> str:
    rows = _capi.instances(None)
    if not rows:
        raise InspectError("this installation has no compiled library (it was built with DG_SKIP_CUDA_BUILD=1)")
    if options.command == "select":
        selection = _capi.select(
            options.m,
            options.n,
            options.k,
            recipe=None if options.bf16 else options.recipe,
            layout=options.bf16 or "nt",
            float_output=options.float32,
            num_sms=options.num_sms,
            arch=options.arch,
        )
        if options.json:
            return json.dumps(selection, indent=1)
        operands = f"BF16 {options.bf16}" if options.bf16 else f"recipe [{', '.join(map(str, options.recipe))}]"
        output = "float32" if options.float32 else "bfloat16"
        problem = f"M = {options.m}, N = {options.n}, K = {options.k}, {operands}, {output} output"
        return _selection(f"{problem}, {options.num_sms} SMs", selection)
    logits = _capi.mqa_instances()
    if options.command == "row":
        wanted = options.row
        row = next((row for row in rows if wanted in (str(row["index"]), row["name"])), None)
        row = row or next((row for row in logits if row["name"] == wanted), None)
        if row is None:
            raise InspectError(f"row {wanted} does not exist, the table has rows 0 to {len(rows) - 1} and names")
        facts = _row_facts(row)
        if options.json:
            return json.dumps(facts if options.sass else {k: v for k, v in facts.items() if k != "sass"}, indent=1)
        return "\n".join([_row_text(facts), *(["", *facts["sass"]] if options.sass else [])])
    return json.dumps(rows + logits, indent=1) if options.json else _table(rows + logits)


if __name__ == "__main__":
    sys.exit(main())
