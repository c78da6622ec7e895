"""Draws docs/mega_moe.svg: what the Mega MoE kernel of one rank consists of, and which buffers it reads and writes.

python tools/draw_mega_moe.py            # writes the picture
python tools/draw_mega_moe.py --check    # says whether it is current
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "mega_moe.svg"

WIDTH, HEIGHT = 1000, 640
INK, PALE = "#24292f", "#57606a"
ROLE, BUFFER, REMOTE = "#dbeafe", "#fef3c7", "#fde2e2"


class Canvas:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, fill: str, title: str, *lines: str) -> None:
        """A rectangle with a bold first line."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
        )
        self.text(x + width / 2, y + 19, title, "middle", bold=True)
        for i, line in enumerate(lines):
            self.text(x + width / 2, y + 37 + 16 * i, line, "middle", color=PALE)

    def text(self, x: float, y: float, words: str, anchor: str = "start", bold: bool = False, color: str = INK) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5"{dash} marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="13">\n<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def draw() -> str:
    canvas = Canvas()
    canvas.text(30, 30, "All ranks' buffers", bold=True)
    canvas.box(30, 45, 200, 92, REMOTE, "inputs", "x, x_sf", "topk_idx, topk_weights", "arrived[rank]")
    canvas.text(770, 30, "The token's rank", bold=True)
    canvas.box(770, 45, 200, 76, REMOTE, "combine buffer", "[token, choice, hidden] BF16", "combined[rank]")

    canvas.text(30, 190, "This rank's workspace", bold=True)
    canvas.box(30, 205, 200, 60, BUFFER, "lists of the experts", "counts, sources")
    canvas.box(30, 300, 200, 76, BUFFER, "pool", "x by expert, in blocks", "dispatched[block]")
    canvas.box(30, 420, 200, 76, BUFFER, "hidden activations", "FP8 and scales, or BF16", "activated[block]")
    canvas.box(30, 540, 200, 60, BUFFER, "weights", "l1: 8 gates, 8 ups, ...; l2")

    canvas.text(300, 190, "One CTA of the kernel, of all SMs", bold=True)
    canvas.box(300, 205, 190, 60, ROLE, "all threads: route", "every rank's choices")
    canvas.box(300, 300, 190, 76, ROLE, "dispatch", "a warp or three, and the", "consumers at first")
    canvas.box(300, 420, 190, 76, ROLE, "tokens: warp 1", "waits for the block,", "TMA")
    canvas.box(300, 540, 190, 60, ROLE, "weights: warp 0", "TMA, waits for nobody")
    canvas.box(550, 480, 190, 76, BUFFER, "ring of stages", "256 or 128 rows of weights", "block of tokens, scales")
    canvas.box(
        550,
        300,
        190,
        108,
        ROLE,
        "consumers: warpgroups",
        "wgmma; SM100: tcgen05",
        "first linear: SwiGLU,",
        "quantisation",
        "second linear: BF16 rows",
    )
    canvas.box(770, 205, 200, 60, ROLE, "all threads: combine", "sum in the order of choices")
    canvas.box(810, 560, 120, 40, BUFFER, "y")

    canvas.arrow((230, 75), (395, 75), (395, 204))
    canvas.arrow((300, 235), (231, 235))
    canvas.arrow((230, 105), (270, 105), (270, 330), (299, 330))
    canvas.arrow((230, 250), (255, 250), (255, 345), (299, 345))
    canvas.arrow((300, 362), (231, 362))
    canvas.arrow((230, 372), (245, 372), (245, 440), (299, 440))
    canvas.arrow((230, 470), (299, 470))
    canvas.arrow((230, 570), (299, 570))
    canvas.arrow((490, 460), (520, 460), (520, 505), (549, 505))
    canvas.arrow((490, 570), (520, 570), (520, 535), (549, 535))
    canvas.arrow((625, 480), (625, 409))
    canvas.arrow((550, 392), (510, 392), (510, 400), (130, 400), (130, 419))
    canvas.arrow((645, 300), (645, 85), (769, 85))
    canvas.text(655, 160, "second linear, to", color=PALE)
    canvas.text(655, 176, "whoever's token it is", color=PALE)
    canvas.text(350, 394, "first linear", color=PALE)
    canvas.arrow((870, 122), (870, 204))
    canvas.arrow((870, 265), (870, 559))
    canvas.arrow((960, 122), (960, 150), (985, 150), (985, 620), (15, 620), (15, 125), (29, 125), dashed=True)
    canvas.text(500, 614, "the next call: inputs may be overwritten once all ranks have combined", "middle", color=PALE)
    return canvas.svg()


def main() -> int:
    parser = argparse.ArgumentParser(description="draws docs/mega_moe.svg")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where it is not current")
    args = parser.parse_args()
    picture = draw()
    if args.check:
        current = PICTURE.is_file() and PICTURE.read_text() == picture
        print("docs/mega_moe.svg is current" if current else "docs/mega_moe.svg is stale: tools/draw_mega_moe.py")
        return 0 if current else 1
    PICTURE.write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
