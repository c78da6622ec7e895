"""What the examples print with: a progress bar, a table and a list of checks. Standard library only."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TextIO


class Progress:
    """A progress bar; where the output is no terminal, a line every ten seconds and one at the end instead.

    Args:
        label: what is being done.
        stream: where to draw, standard error by default, so that standard output holds results only.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        # Ten drawings a second at most: they must not cost time next to short training steps.
        self._interval = 0.1 if self._live else 10.0
        self._start = self._drawn = time.monotonic()

    def update(self, fraction: float, note: str = "") -> None:
        """Show that ``fraction`` (0 to 1) of the work is done."""
        if time.monotonic() - self._drawn >= self._interval:
            self._draw(min(max(fraction, 0.0), 1.0), note)

    def close(self, note: str = "") -> None:
        """Finish the bar with a last note."""
        self._draw(1.0, note)
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def _draw(self, fraction: float, note: str) -> None:
        self._drawn = time.monotonic()
        text = f"{self._label} {fraction:4.0%}  {self._drawn - self._start:5.1f} s  {note}".rstrip()
        if self._live:
            self._stream.write(f"\r\x1b[K[{'#' * round(24 * fraction):.<24}] {text}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print text columns, the first aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()

    print(line(header))
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print(line(row))


@dataclasses.dataclass
class Checks:
    """The conditions an example must meet, collected so that one failure does not hide the next."""

    failures: list[str] = dataclasses.field(default_factory=list)
    passed: int = 0

    def expect(self, condition: bool, text: str) -> None:
        """Count ``condition``; when it is false, say ``text`` at once and remember it."""
        if condition:
            self.passed += 1
        else:
            self.failures.append(text)
            print(f"CHECK FAILED: {text}")

    def summary(self, label: str) -> str:
        """One line: how many checks held."""
        total = self.passed + len(self.failures)
        return f"{label}: {self.passed} of {total} checks passed"
