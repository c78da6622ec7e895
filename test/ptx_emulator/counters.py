"""Counters of a run (option `counters`): parsing and printing. README "Counters" says what each one counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# {"total": {name: value}, "warps": {warp id: {...}, summed over CTAs}, "ctas": {linear index: {...}, over warps}}
Counters = dict[str, dict]


def parse_counters(rows: Sequence[str], launch: int | None = None) -> Counters:
    """Sums of the table of ptx_emulator_session_counters, over all launches or one."""
    names = rows[0].split()[1:]
    total, warps, ctas = dict.fromkeys(names, 0), {}, {}
    skip, warp, cta = True, 0, {}
    for row in rows[1:]:
        word, *text = row.split()
        values = [int(x) for x in text]
        if word == "cta":
            skip, warp = launch not in (None, values[0]), 0
            if not skip:
                cta = ctas.setdefault(values[1], dict.fromkeys([*names, "bulk_received_bytes"], 0))
                cta["bulk_received_bytes"] += values[2]
        elif not skip:
            for table in (total, warps.setdefault(warp, dict.fromkeys(names, 0)), cta):
                for name, value in zip(names, values, strict=True):
                    table[name] += value
            warp += 1
    return {"total": total, "warps": dict(sorted(warps.items())), "ctas": dict(sorted(ctas.items()))}


def ranges(keys: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    out: list[list[int]] = []
    for k in sorted(keys):
        if out and out[-1][1] == k - 1:
            out[-1][1] = k
        else:
            out.append([k, k])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def print_report(counters: Counters, by: str = "warps", file=None) -> None:
    """A column per warp id (or by="ctas") and the total.

    Columns that are equal are merged, rows that are zero left out; polls, which depend on the schedule, are only
    shown in total.
    """
    columns: dict[tuple, list[int]] = {}
    for key, values in counters[by].items():
        columns.setdefault(tuple((n, x) for n, x in values.items() if n != "polls"), []).append(key)
    heads = [ranges(keys) + (" each" if len(keys) > 1 else "") for keys in columns.values()] + ["total"]
    tables = [dict(c) for c in columns] + [counters["total"]]
    widths = [max(len(h), *(len(f"{x:,}") for x in t.values())) for h, t in zip(heads, tables, strict=True)]
    print(f"{by:24s}" + "".join(f"  {h:>{w}s}" for h, w in zip(heads, widths, strict=True)), file=file)
    for name in counters["total"]:
        if any(t.get(name) for t in tables):
            cells = [f"{t[name]:,}" if name in t else "" for t in tables]
            print(f"{name:24s}" + "".join(f"  {c:>{w}s}" for c, w in zip(cells, widths, strict=True)), file=file)
