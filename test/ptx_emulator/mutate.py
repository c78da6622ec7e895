"""Mutation of a kernel's synchronisation: a test of the tests.

`mutants` takes PTX and yields versions of it in which one wait, arrive, fence, barrier or commit is missing (or one
expected byte count is wrong). Each must be reported by the emulator, or be harmless for a reason one can name.

    python -m ptx_emulator.mutate --row 3             (in test/, with the library installed)

does this for rows of the library's table and prints what went unnoticed.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .api import Module, PtxError

# kind: pattern of the mnemonic. The first that matches counts.
KINDS = {
    "mbarrier wait": r"mbarrier\.(?:try|test)_wait[\w.:]*",
    "expected bytes": r"mbarrier\.(?:arrive\.)?expect_tx[\w.:]*",
    "mbarrier arrive": r"mbarrier\.arrive[\w.:]*",
    "cp.async arrive": r"cp\.async\.mbarrier\.arrive[\w.:]*",
    "mbarrier init fence": r"fence\.mbarrier_init[\w.:]*",
    "proxy fence": r"fence\.proxy\.async[\w.:]*",
    "fence": r"fence\.(?!proxy|mbarrier)[\w.:]+",
    "warp barrier": r"bar\.warp\.sync",
    "cluster arrive": r"barrier\.cluster\.arrive[\w.:]*",
    "cluster wait": r"barrier\.cluster\.wait[\w.:]*",
    "barrier": r"(?:bar|barrier)(?:\.cta)?\.(?:sync|arrive|red)[\w.:]*",
    "wgmma fence": r"wgmma\.fence[\w.:]*",
    "wgmma commit": r"wgmma\.commit_group[\w.:]*",
    "wgmma wait": r"wgmma\.wait_group[\w.:]*",
    "copy commit": r"cp\.async\.(?:bulk\.)?commit_group[\w.:]*",
    "copy wait": r"cp\.async\.(?:bulk\.)?wait_(?:group|all)[\w.:]*",
    "tcgen05 commit": r"tcgen05\.commit[\w.:]*",
    "tcgen05 wait": r"tcgen05\.wait[\w.:]*",
    "tcgen05 fence": r"tcgen05\.fence[\w.:]*",
    "tcgen05 dealloc": r"tcgen05\.dealloc[\w.:]*",
    "release": r"(?:st|red|atom)\.(?:release|acq_rel)[\w.:]*",
    "acquire": r"(?:ld|atom)\.acquire[\w.:]*",
}
# Not mutated unless asked for: whether a weaker access would do depends on what else the flag carries.
MEMORY_ORDER = ("release", "acquire")
_STATEMENT = re.compile(r"(?<=[;{}\n])([ \t]*)(@!?[%\w]+[ \t]+)?(" + "|".join(KINDS.values()) + r")([ \t][^;]*)?;")


@dataclass
class Mutant:
    """`ptx` is the kernel's module with one statement changed; the statement was `text`, on `line` of it.

    In `probe` the statement is a trap instead, which tells whether a run reaches it.
    """

    kind: str
    line: int
    text: str
    ptx: str
    probe: str

    def __str__(self) -> str:
        return f"{self.kind}, PTX line {self.line}: {self.text}"


@functools.lru_cache(maxsize=8)
def _entry_spans(ptx: str) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    head = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)")
    brace = re.compile(r"[{}]")
    at = 0
    while (found := head.search(ptx, at)) is not None:
        depth, at = 0, ptx.index("{", found.end())
        for one in brace.finditer(ptx, at):
            depth += 1 if one.group() == "{" else -1
            if not depth:
                at = one.end()
                break
        if depth:
            raise ValueError(f"entry {found[1]} does not end")
        spans[found[1]] = (found.start(), at)
    return spans


def entry_span(ptx: str, entry: str) -> tuple[int, int]:
    """Where the entry starts (at its linkage directives) and ends (after the closing brace)."""
    return _entry_spans(ptx)[entry]


def extract(ptx: str, entry: str) -> str:
    """The module with no other entry; lines keep their numbers."""
    out, at = [], 0
    for name, (start, end) in _entry_spans(ptx).items():
        if name != entry:
            out += [ptx[at:start], "\n" * ptx.count("\n", start, end)]
            at = end
    return "".join([*out, ptx[at:]])


def mutants(ptx: str, entry: str | None = None, kinds: Sequence[str] | None = None) -> Iterator[Mutant]:
    """Mutants of each synchronising statement of the entry (of all entries without one), of all kinds but MEMORY_ORDER,
    or of those KINDS that are named.

    A wait for an mbarrier has two: one that succeeds at once, and one for the other phase.
    """
    if entry is not None:
        ptx = extract(ptx, entry)
    start, end = (0, len(ptx)) if entry is None else entry_span(ptx, entry)
    for m in _STATEMENT.finditer(ptx, start, end):
        indent, guard, op, operands = (g or "" for g in m.groups())
        kind = next(k for k, pattern in KINDS.items() if re.fullmatch(pattern, op))
        if kind in MEMORY_ORDER if kinds is None else kind not in kinds:
            continue
        operands = operands.strip()
        line, text = ptx.count("\n", 0, m.start(3)) + 1, " ".join(m.group().split())

        def mutant(kind: str, new: str, m: re.Match = m, line: int = line, text: str = text) -> Mutant:
            def version(statement: str) -> str:
                lines = "\n" * (m.group().count("\n") - statement.count("\n"))
                return f"{ptx[: m.start()]}{statement}{lines}{ptx[m.end() :]}"

            return Mutant(kind, line, text, version(new), version((m[1] or "") + (m[2] or "") + "trap;"))

        if kind == "mbarrier wait":
            done = operands.split(",")[0].strip()
            new = f"{indent}{guard}setp.eq.u32 {done}, 0, 0;"  # succeeds at once
            if ".parity" in op:
                rest, parity = operands.rsplit(",", 1)
                other = (
                    f"{{ .reg .b32 other_phase; xor.b32 other_phase, {parity}, 1; {guard}{op} {rest}, other_phase; }}"
                )
                yield mutant("mbarrier phase", indent + other)
        elif kind == "expected bytes":
            address, count = operands.rsplit(",", 1)
            if not count.strip().isdigit():
                # The count is a register: arrive, but expect nothing.
                new = f"{indent}{guard}{op} {address}, 0;"
            else:
                new = f"{indent}{guard}{op} {address}, {int(count) + 16};"
        elif kind in ("release", "acquire"):
            relaxed = re.sub(r"\.(?:release|acquire|acq_rel)\b", ".relaxed", op)
            new = f"{indent}{guard}{relaxed} {operands};"
        else:
            new = indent
        yield mutant(kind, new)


def survey(mutants: Iterator[Mutant], run: Callable[[str], None]) -> list[tuple[Mutant, str]]:
    """Runs each mutant; pairs it with the kind of the violation found, or with one of three words.

    "wrong result": only the numbers tell; "not reached": the run does not execute the statement; "unnoticed".
    `run` takes PTX, launches the kernel and raises AssertionError when the result is wrong.
    """
    results = []
    for m in mutants:
        found = _outcome(run, m.ptx)
        if found == "unnoticed" and _outcome(run, m.probe) == "unnoticed":
            found = "not reached"
        results.append((m, found))
    return results


def _outcome(run: Callable[[str], None], ptx: str) -> str:
    try:
        run(ptx)
    except PtxError as e:
        return e.kind
    except AssertionError:
        return "wrong result"
    return "unnoticed"


def survey_row(row: int) -> list[tuple[Mutant, str]]:
    """`survey` of a row of the library's table: ragged tiles, several for each CTA, more K blocks than stages.

    A last case, of two tiles, has so many K blocks that each part of the unrolled loops over them runs.
    """
    from deep_gemm_ops import _capi

    from gemm_emulation import RowCase, cluster_tile, row_ptx
    from grouped_emulation import GroupedCase
    from kgrouped_emulation import KGroupedCase

    info = _capi.instances()[row]
    ragged = info["block_k"] * 7 // 8
    m, n, step = 3 * info["block_m"] - 7, 2 * info["block_n"] - 8, info["split_k"] * info["block_k"]
    blocks = info["num_stages"] + 3
    at_once = cluster_tile(info)
    shapes = [(m, n, blocks, "tma"), (m, n, blocks + 1, "float32"), (at_once[0], 2 * at_once[1], 195, "tma")]
    if info["k_warpgroups"] > 1 and info["col_ctas"] > 1:
        shapes.append((m, n, 4, "tma"))  # with more, stages that come and go order what the barriers of a tile do
    cases = [
        RowCase(info["name"], m, n, blocks * step - ragged, d, data="integer", num_sms=info["cluster_size"])
        for m, n, blocks, d in shapes
    ]
    if info["scaling"] == "ue8m0":  # scales that threads take care of themselves
        k, options = blocks * step, {"data": "far", "num_sms": info["cluster_size"]}
        cases.append(RowCase(info["name"], m, n, k, "float32", **options))

    if info["grouping"] == "m_grouped":
        # More groups than the scheduler holds, and more tiles than it finds at a time.
        sizes = tuple(7 * group % 5 for group in range(70))
        cases += [
            GroupedCase(info["name"], layout, sizes, n, 2 * step, alignment=16, data="integer", num_sms=1)
            for layout in ("offsets", "masked")
        ]
    if info["grouping"] == "k_grouped":
        sizes = (blocks * step - 5, 0, step, 70, 1)
        cases = [
            KGroupedCase(info["name"], layout, sizes, m, n, 64, 64, d=d, data="integer", num_sms=info["cluster_size"])
            for layout, d in (("psum", "tma"), ("sizes", "float32"))
        ]

    def run(text: str) -> None:
        module = Module(text)
        for case in cases:
            case.run(module, budget=20_000_000, check_exit=1)

    ptx, entry = row_ptx(row)
    run(ptx)  # the kernel itself is right
    return survey(mutants(ptx, entry), run)


def main(arguments: Sequence[str] | None = None) -> None:
    from deep_gemm_ops import _capi

    parser = argparse.ArgumentParser(prog="python -m ptx_emulator.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("--row", type=int, action="append", help="index in the table; several allowed; default: all")
    for row in parser.parse_args(arguments).row or [r["index"] for r in _capi.instances()]:
        results = survey_row(row)
        print(f"row {row}: {len(results)} mutants, {dict(Counter(found for _, found in results))}")
        for m, found in results:
            if found in ("unnoticed", "wrong result", "not reached"):
                print(f"  {found}: {m}")


if __name__ == "__main__":
    main()
