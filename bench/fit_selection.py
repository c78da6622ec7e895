"""How good the cost model of ``src/host/selection.cpp`` is on measured times, and which constants would make it better.

    python bench/fit_selection.py SWEEP.json [MORE.json ...] [--fit] [--seconds 60] [--never-selected]

A sweep is the JSON of ``python -m deep_gemm_ops.bench --rows --json SWEEP.json``, or a list of ``{"m", "n", "k",
"times": {"all:<index>:<row name>": microseconds}}``. For each problem the table shows the fastest timed row, the
timed row that the model finds cheapest, and the regret: how much longer the latter takes. An asterisk marks a
problem whose choice from the whole table of rows was not timed: it is named, and the cheapest timed row is judged
instead.

The model is compiled as it stands, with g++ and CUDA's headers, so there is no second copy of it here. ``--fit`` varies
the constants of ``CostModel`` and prints better ones as C++, to be put in by hand. ``--never-selected`` lists rows of
the table that no problem of a dense grid selects. No GPU is needed; numpy and PyTorch are.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "src" / "host"
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "python")]
import toolchain  # noqa: E402

from deep_gemm_ops.testing.cases import BENCH_M, BENCH_SHAPES  # noqa: E402

# The model behind C functions. A row is its eight fields in the order of the table, and k_warpgroups; `scaling` is an
# index of SCALINGS.
DRIVER = """
#include "selection.cpp"
#include "../sm90/gemm_instances.h"
using namespace deep_gemm;

static GemmProblem problem_of(const int64_t* x) {  // m, n, k, gran_m, gran_n, gran_k (0: BF16), d is FP32
    GemmProblem problem;
    if (x[5] == 0) problem.operands = OperandType::kBF16;
    problem.m = x[0], problem.n = x[1], problem.k = x[2];
    problem.sfa.gran_mn = x[3], problem.sfb.gran_mn = x[4], problem.gran_k = x[5];
    problem.d_type = x[6] ? DataType::kFloat32 : DataType::kBFloat16;
    return problem;
}
static const Scaling scalings[] = {kScaling1D2D, kScaling1D1D, kNoScaling};
extern "C" void rate(const CostModel* model, int count, const int64_t* problems, const int64_t* rows, double* us) {
    for (int i = 0; i < count; ++i, problems += 7, rows += 9) {
        GemmRow row = {int(rows[0]), int(rows[1]), int(rows[2]), int(rows[3]), int(rows[4]),
                       rows[5] != 0, scalings[rows[6]], int(rows[7])};
        if (row.scaling == kNoScaling) row.operands = OperandType::kBF16;
        row.k_warpgroups = int(rows[8]);
        us[i] = cost_us(row, problem_of(problems), {}, *model);
    }
}
extern "C" int choose(const int64_t* problem, int num_sms) {
    return select_row(sm90::kGemmRows, problem_of(problem), {num_sms});
}
extern "C" const char* name_of(int row) {
    static std::string name;
    name = row_name(sm90::kGemmRows[row]);
    return name.c_str();
}
extern "C" int num_rows() { return sm90::kNumGemmRows; }
"""

SCALINGS = ["1d2d", "1d1d", "bf16_nt"]
ROW_NAME = re.compile(
    r"(?P<scaling>1d[12]d|bf16_nt)_m(?P<m>\d+)n(?P<n>\d+)(_gran(?P<gran>\d+))?(?P<swap>_swap)?(_rows(?P<rows>\d+))?"
    r"(_cols(?P<cols>\d+))?(_splitk(?P<split>\d+))?(_kwg(?P<kwg>\d+))?$"
)


class Model:
    """The compiled model, and its constants: name -> value in the source."""

    def __init__(self) -> None:
        source = (HOST / "selection.cpp").read_text()
        body = re.search(r"struct CostModel \{(.*?)\n\};", source, re.DOTALL)
        assert body, "selection.cpp has no struct CostModel"
        self.constants = {name: float(value) for name, value in re.findall(r"double (\w+) = ([\d.e+-]+);", body[1])}
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "model.so"
            cuda = toolchain.cuda_home_of(toolchain.find_nvcc()) / "include"
            command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{HOST}", f"-I{cuda}"]
            command += [str(HOST / "selection_sm100.cpp"), "-x", "c++", "-"]
            subprocess.run([*command, "-o", str(library)], input=DRIVER, text=True, check=True)
            self.lib = ctypes.CDLL(str(library))
        self.lib.name_of.restype = ctypes.c_char_p
        self.table = [short_name(self.lib.name_of(i).decode()) for i in range(self.lib.num_rows())]

    def rate(self, constants: np.ndarray, problems: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Microseconds of ``rows[i]`` (int64 [count, 9]) on ``problems[i]`` (int64 [count, 7])."""
        us = np.empty(len(problems))
        arrays = [np.ascontiguousarray(array).ctypes.data_as(ctypes.c_void_p) for array in (problems, rows, us)]
        constants = np.ascontiguousarray(constants, dtype=np.float64)
        self.lib.rate(constants.ctypes.data_as(ctypes.c_void_p), len(us), *arrays)
        return us

    def choose(self, problem: list[int], num_sms: int = 132) -> str:
        """Name of the row that the table selects for a problem (seven numbers, as in the driver)."""
        row = self.lib.choose((ctypes.c_int64 * 7)(*problem), num_sms)
        return self.table[row] if row >= 0 else "none"


def short_name(name: str) -> str:
    return name.removeprefix("sm90_").removeprefix("fp8_")


def row_fields(name: str) -> list[int] | None:
    """A row's fields as the driver takes them, from its short name."""
    match = ROW_NAME.match(name)
    if not match:
        return None
    m, n, swap = int(match["m"]), int(match["n"]), bool(match["swap"])
    block = [n, m] if swap else [m, n]
    clusters = [int(match[key] or 1) for key in ("rows", "cols", "split")]
    scaling = SCALINGS.index(match["scaling"])
    gran_k = int(match["gran"] or 128) if match["scaling"] != "bf16_nt" else 0
    return [*block, *clusters, int(swap), scaling, gran_k, int(match["kwg"] or 1)]


@dataclass
class Measured:
    """One problem and the times of its rows."""

    problem: list[int]
    names: list[str] = field(default_factory=list)
    us: list[float] = field(default_factory=list)


def load(path: Path) -> list[Measured]:
    """The problems of a sweep with at least two timed rows."""
    run: Any = json.loads(path.read_text())
    found = []
    for record in run["rows"] if isinstance(run, dict) else run:
        if "times" in record:
            timed = record["times"].items()
            times = {short_name(key.split(":")[-1]): us for key, us in timed if key.startswith("all:")}
        else:
            times = {short_name(row["name"]): row["us"] for row in record["rows"] if row.get("us")}
        times = {name: us for name, us in times.items() if row_fields(name)}
        if len(times) < 2:
            continue
        fields = row_fields(next(iter(times))) or []
        recipe = [0, 0, 0] if fields[7] == 0 else [1, 1 if fields[6] else 128, fields[7]]
        is_float = int(record.get("out_dtype") in ("float32", "torch.float32"))
        measured = Measured([record["m"], record["n"], record["k"], *recipe, is_float])
        measured.names, measured.us = list(times), list(times.values())
        found.append(measured)
    return found


class Data:
    """All measured points as arrays; `starts` are the first points of the problems."""

    def __init__(self, measured: list[Measured]) -> None:
        self.measured = measured
        self.problems = np.array([m.problem for m in measured for _ in m.us], dtype=np.int64)
        self.rows = np.array([row_fields(name) for m in measured for name in m.names], dtype=np.int64)
        self.us = np.array([us for m in measured for us in m.us])
        self.counts = np.array([len(m.us) for m in measured])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.best = np.repeat(np.minimum.reduceat(self.us, self.starts), self.counts)
        # The benchmark's problems count more than others.
        named = [m.problem[0] in BENCH_M and (m.problem[1], m.problem[2]) in BENCH_SHAPES for m in measured]
        self.weights = np.where(named, 3.0, 1.0)
        self.weights /= self.weights.sum()

    def regrets(self, predicted: np.ndarray) -> np.ndarray:
        """Of each problem: time of the timed row that looks cheapest over that of the fastest, minus 1."""
        ends = self.starts + self.counts
        picks = np.array([start + predicted[start:end].argmin() for start, end in zip(self.starts, ends, strict=True)])
        return self.us[picks] / self.best[picks] - 1

    def loss(self, predicted: np.ndarray) -> float:
        """What the fit minimizes: expected regret when near ties fall either way, and errors where they matter."""
        slower = np.log(self.us / self.best)
        cheapest = np.repeat(np.minimum.reduceat(predicted, self.starts), self.counts)
        chance = np.exp(-np.log(predicted / cheapest) / 0.008)
        regret = np.add.reduceat(chance * slower, self.starts) / np.add.reduceat(chance, self.starts)
        near = np.exp(-4 * slower)
        spread = np.sqrt(np.sum(near * np.log(predicted / self.us) ** 2) / np.sum(near))
        weights = self.weights
        return float(np.sum(weights * regret) + 0.5 * np.sum(weights * regret**2) ** 0.5 + 0.12 * spread)


def fit(model: Model, data: Data, seconds: float, seed: int, keep: list[str]) -> np.ndarray:
    """Constants with a lower loss: steps at random of one or a few of them, kept where they help. All stay positive."""
    generator = np.random.default_rng(seed)
    initial = np.log(np.array(list(model.constants.values())))

    def value(x: np.ndarray) -> float:
        drift = 0.0015 * float(np.mean((x - initial) ** 2))
        return data.loss(model.rate(np.exp(x), data.problems, data.rows)) + drift

    def matters(constant: int) -> bool:
        x = initial.copy()
        x[constant] += 0.1
        return not np.array_equal(*(model.rate(np.exp(y), data.problems, data.rows) for y in (initial, x)))

    constants = [i for i, name in enumerate(model.constants) if name not in keep and matters(i)]
    best, best_value = initial, value(initial)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        moved = generator.choice(constants, generator.choice([1, 1, 2, 3, 5]), replace=False)
        x = best.copy()
        x[moved] += generator.normal(0, generator.choice([0.03, 0.08, 0.15]), len(moved))
        x_value = value(x)
        if x_value < best_value:
            best, best_value = x, x_value
    print(f"  loss {best_value:.4f}", file=sys.stderr)
    return np.exp(best)


def print_table(data: Data, predicted: np.ndarray, choose: Callable[[list[int]], str] | None) -> None:
    print(f"{'m':>6} {'n':>6} {'k':>6}  {'fastest':<26} {'us':>7}  {'selected':<26} {'us':>7} {'model':>7} regret")
    regrets = data.regrets(predicted)
    for measured, start, regret in zip(data.measured, data.starts, regrets, strict=True):
        us, costs = np.array(measured.us), predicted[start : start + len(measured.us)]
        fast, cheap = int(us.argmin()), int(costs.argmin())
        chosen = choose(measured.problem) if choose else measured.names[cheap]
        note = "" if chosen in measured.names else f"  * selects {chosen}"
        line = "{:6d} {:6d} {:6d}".format(*measured.problem[:3])
        line += f"  {measured.names[fast]:<26} {us[fast]:7.2f}  {measured.names[cheap]:<26} {us[cheap]:7.2f}"
        print(f"{line} {costs[cheap]:7.2f} {regret * 100:5.1f}%{note}")
    mean = np.exp(np.mean(np.log1p(regrets))) - 1
    error = np.log(predicted / data.us)[data.us < 1.3 * data.best]
    worst = regrets.max()
    print(f"{len(regrets)} problems: regret {mean * 100:.2f} % in the geometric mean, {worst * 100:.1f} % at most;")
    print(f"model against time, rows within 30 % of the fastest: off by {np.sqrt(np.mean(error**2)) * 100:.0f} % (rms)")


def selected_counts(model: Model) -> dict[str, int]:
    """How often each row of the table is selected over a dense grid of problems and recipes."""
    counts = dict.fromkeys(model.table, 0)
    sizes_m = sorted({round(2 ** (i / 3)) for i in range(52)})
    sizes_n = [
        64 * i for i in (1, 2, 4, 8, 9, 12, 16, 24, 32, 33, 48, 64, 80, 96, 112, 128, 192, 224, 384, 512, 1024, 2020)
    ]
    sizes_k = [128 * i for i in (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 56, 64, 96, 128, 144, 224)]
    for m in sizes_m:
        for n in sizes_n:
            for k in sizes_k:
                for recipe in ([1, 128, 128, 0], [1, 1, 128, 1], [1, 1, 32, 1], [0, 0, 0, 0]):
                    counts[model.choose([m, n, k, *recipe])] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP.json")
    parser.add_argument("--fit", action="store_true", help="search for better constants and judge those")
    parser.add_argument("--seconds", type=float, default=60, help="of --fit (default: %(default)s)")
    parser.add_argument("--keep", default="", help="constants that --fit leaves alone, comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of --fit (default: %(default)s)")
    parser.add_argument("--never-selected", action="store_true", help="list rows that no problem of a grid selects")
    options = parser.parse_args()
    model = Model()
    data = Data([measured for path in options.sweeps for measured in load(path)])
    constants = np.array(list(model.constants.values()))
    if options.fit:
        constants = fit(model, data, options.seconds, options.seed, options.keep.split(","))
        for name, value in zip(model.constants, constants, strict=True):
            print(f"    double {name} = {value:.4g};")
    predicted = model.rate(constants, data.problems, data.rows)
    print_table(data, predicted, None if options.fit else model.choose)
    if options.never_selected:
        counts = selected_counts(model)
        print("selected on a grid: " + ", ".join(f"{name} {count}" for name, count in counts.items() if count))
        print("never selected: " + ", ".join(name for name, count in counts.items() if not count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
