"""Writes a benchmark run into the README: tables between its two `bench` markers, and the picture beside it.

    python bench/make_table.py bench/results/h200.json [--readme README.md] [--plot docs/bench.svg] [--check]

Run it after ``python -m deep_gemm_ops.bench --json bench/results/h200.json``. ``--check`` writes nothing and fails when
the README or the picture is not what the run gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deep_gemm_ops.bench import plot, report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="JSON file of a run")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when something is out of date")
    options = parser.parse_args(arguments)
    run = json.loads(options.run.read_text())
    wanted = {options.readme: report.replace_between_markers(options.readme.read_text(), report.markdown(run))}
    if options.plot:
        wanted[options.plot] = plot.svg(run)
    stale = [path for path, content in wanted.items() if not path.is_file() or path.read_text() != content]
    if options.check:
        for path in stale:
            print(f"{path} is not what {options.run} gives; run bench/make_table.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
