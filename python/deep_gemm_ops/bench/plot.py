"""A benchmark run as an SVG picture: how many times faster than each reference, a panel for each M."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from . import report

WIDTH, PANEL, LEFT, RIGHT, TOP = 860, 150, 56, 16, 46
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")
INK, FAINT = "#333", "#ccc"


def svg(run: Mapping[str, Any]) -> str:
    """The picture as text. Bars are the time of a reference over ours: above the line of 1.0, ours is faster."""
    groups, names = report.by_m(run), report.references(run)
    height = TOP + PANEL * max(1, len(groups)) + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        _text(LEFT, 18, "fp8_gemm_nt: time of a reference over ours (above 1: ours is faster)", size=13),
    ]
    for i, name in enumerate(names):
        x = LEFT + 150 * i
        out.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{COLORS[i % len(COLORS)]}"/>')
        out.append(_text(x + 14, 35, report.LABELS.get(name, name)))
    ratios = [r for group in groups.values() for record in group for n in names if (r := report.speedup(record, n))]
    top = max([1.5, *ratios]) * 1.08
    for panel, (m, group) in enumerate(groups.items()):
        base = TOP + PANEL * (panel + 1) - 22
        span = PANEL - 40
        out.append(_text(6, base - span / 2, f"M = {m}"))
        marks = [x / 2 for x in range(2, int(top * 2) + 1)]
        for mark in marks:
            y = base - span * mark / top
            out.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{INK if mark == 1 else FAINT}"/>'
            )
            if len(marks) <= 8 or mark == int(mark):
                out.append(_text(LEFT - 4, y + 4, f"{mark:g}", anchor="end", size=9))
        slot = (WIDTH - LEFT - RIGHT) / max(1, len(group))
        for i, record in enumerate(group):
            bar = min(26.0, slot * 0.8 / max(1, len(names)))
            x = LEFT + slot * i + (slot - bar * len(names)) / 2
            for j, name in enumerate(names):
                ratio = report.speedup(record, name)
                if ratio is None:
                    continue
                tall = span * ratio / top
                out.append(
                    f'<rect x="{x + bar * j:.1f}" y="{base - tall:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}" '
                    f'fill="{COLORS[j % len(COLORS)]}"><title>{ratio:.2f}</title></rect>'
                )
            middle = LEFT + slot * (i + 0.5)
            out.append(_text(middle, base + 13, f"{record['n']} x {record['k']}", anchor="middle", size=9))
    out.append(_text(LEFT, height - 8, report.header(run), size=9))
    return "\n".join(out) + "\n</svg>\n"


def _text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(content)}</text>'
