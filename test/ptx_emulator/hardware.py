"""The emulator's tests on a GPU: every launch that a test makes for sm_90a, repeated there and compared bit for bit.

    cd test && python -m ptx_emulator.hardware record CASES.zip            (here: needs nvcc, no GPU)
    cd test && python -m ptx_emulator.hardware run CASES.zip --out DIR     (there: needs a driver and numpy)

`record` runs tests with pytest and keeps of each launch that ends well the kernel's PTX (and its cubin, where ptxas is
found), its parameters, and the memory that it can reach, before and after, with sums rounded as Hopper does (option
`hopper_sums`). Launches that differ in nothing but the schedule are one case, and a launch with a check of memory or
order turned off is none. `run` gives the same memory to
the GPU: pointers are moved, in the parameters and in memory, and tensor maps encoded again by the driver. Behind and
before each region it puts a pattern that must survive. A worker process runs the cases; one that fails or stalls, after
which a context is of no use, is put down as failed and followed by a new worker.

DIR receives `results.json` (a line for each case: `equal`, `differs` or `failed`) and `outputs.zip` (what the GPU wrote
where it differs, and of cases named in --keep).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import api, mutate
from .build import cache_dir
from .driver import Device, DriverError

# What `record` runs: the emulator's own tests, and each row of the library's tables on a few small problems.
_OWN = "basic hopper instructions interface races global_order fences tma wgmma wgmma_conformance rounding"
DEFAULT_TESTS = [f"test_emulator_{name}.py" for name in _OWN.split()]
# What they compute is not defined. As pytest names it, from its root directory.
UNDEFINED = ["test/test_emulator_instructions.py::test_maybe_uninitialised_registers"]
MAP_MAGIC, MAP_BYTES = 0x544D4150, 128  # src/tma.hpp
GUARD_BYTES = 4096
STALL_S = 20


# ------------------------------------------------------------------------------------------------------ cases ---
@dataclass
class Bytes:
    """Contents that hold addresses: a blob, zero in their places, and [offset, region, offset in it] of each pointer,
    [offset, region, offset in it, arguments of `Device.encode`] of each tensor map.
    """

    blob: str
    pointers: list[list[int]]
    maps: list[list[Any]]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Offset and length of what the blob leaves open."""
        return [(p[0], 8) for p in self.pointers] + [(m[0], MAP_BYTES) for m in self.maps]


@dataclass
class Region:
    """Memory that a kernel can reach.

    `before` and `after` name blobs, zero where addresses stand. Of what is there afterwards `pointers` and `maps` tell
    what need not be the same, as the emulator's addresses and tensor maps are its own.
    """

    name: str
    size: int
    offset: int  # of its address from a multiple of 256
    dtype: str
    before: Bytes
    after: Bytes


@dataclass
class Case:
    """One launch."""

    name: str
    ptx: str
    entry: str
    grid: list[int]
    block: list[int]
    cluster: list[int]
    shared_bytes: int
    params: list[Bytes]
    regions: list[Region]

    def digest(self) -> str:
        """Of all that goes into the launch."""
        regions = [(r.size, r.offset, r.before) for r in self.regions]
        parts = [self.ptx, self.entry, self.grid, self.block, self.cluster, self.shared_bytes, self.params, regions]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        regions = [
            Region(**{**r, "before": Bytes(**r["before"]), "after": Bytes(**r["after"])}) for r in values["regions"]
        ]
        return cls(**{**values, "params": [Bytes(**p) for p in values["params"]], "regions": regions})


def _find_maps(data: bytes) -> list[tuple[int, dict[str, Any]]]:
    """The emulator's tensor maps in memory: offset, and the arguments of `Device.encode`."""
    if len(data) < MAP_BYTES:
        return []
    words = np.frombuffer(data, "<u4", len(data) // 4)
    found = []
    for at in np.flatnonzero(words == MAP_MAGIC) * 4:
        # TensorMap of src/tma.hpp
        if at + MAP_BYTES > len(data):
            continue
        values = struct.unpack_from("<I5B5B5H5I4xQ5Q", data, at)
        dtype, rank, swizzle, _, oob_fill = values[1:6]
        steps, box, dims, address, strides = values[6:11], values[11:16], values[16:21], values[21], values[22:27]
        fields = {
            "dtype": dtype,
            "address": address,
            "dims": [n + 1 for n in dims[:rank]],
            "strides": list(strides[1:rank]),
            "box": list(box[:rank]),
            "element_strides": list(steps[:rank]),
            "swizzle": swizzle,
            "oob_fill": oob_fill,
        }
        found.append((int(at), fields))
    return found


class _Places:
    """Regions by address."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        spans: list[list[Any]] = []  # address, end, name, dtype
        for i, a in enumerate(arrays):
            if isinstance(a, tuple):
                spans.append([a[0], a[0] + a[1], a[2] if len(a) > 2 else f"buffer{i}", ""])
            else:
                address, size = api._span(a)
                spans.append([address, address + size, f"array{i}", str(a.dtype).removeprefix("torch.")])
        self.spans: list[list[Any]] = []
        for span in sorted((s for s in spans if s[1] > s[0]), key=lambda s: (s[0], -s[1])):
            if self.spans and span[0] < self.spans[-1][1]:
                self.spans[-1][1] = max(self.spans[-1][1], span[1])
            else:
                self.spans.append(span)
        self._starts = np.array([s[0] for s in self.spans], np.uint64)
        self._ends = np.array([s[1] for s in self.spans], np.uint64)

    def find(self, address: int) -> tuple[int, int] | None:
        """The region of an address, and the offset in it."""
        for i, (start, end, *_) in enumerate(self.spans):
            if start <= address < end:
                return i, address - start
        return None

    def read(self) -> list[bytes]:
        return [ctypes.string_at(start, end - start) for start, end, *_ in self.spans]

    def write(self, memory: Sequence[bytes]) -> None:
        for (start, end, *_), data in zip(self.spans, memory):
            if ctypes.string_at(start, end - start) != data:  # memory that is not written may be read-only
                ctypes.memmove(start, data, len(data))

    def contents(self, store: Callable[[bytes], str]) -> list[Bytes]:
        """What the regions hold now."""
        return [self.take(data, store) for data in self.read()]

    def take(self, data: bytes, store: Callable[[bytes], str]) -> Bytes:
        """Data without its addresses."""
        maps = []
        for at, fields in _find_maps(data):
            place = self.find(fields.pop("address"))
            if place is not None:
                maps.append([at, *place, fields])
        inside = {at for start, *_ in maps for at in range(start, start + MAP_BYTES, 8)}
        pointers = []
        if self.spans and len(data) >= 8:
            words = np.frombuffer(data, "<u8", len(data) // 8)
            region = np.searchsorted(self._starts, words, side="right").astype(np.int64) - 1
            for i in np.flatnonzero((region >= 0) & (words < self._ends[np.maximum(region, 0)])):
                if int(i) * 8 not in inside:
                    r = int(region[i])
                    pointers.append([int(i) * 8, r, int(words[i]) - self.spans[r][0]])
        out = Bytes("", pointers, maps)
        kept = bytearray(data)
        for at, size in out.places:
            kept[at : at + size] = bytes(size)
        out.blob = store(bytes(kept))
        return out


# ------------------------------------------------------------------------------------------------------ record ---
class Recorder:
    """Keeps launches for sm_90a that end well; `name` is what they are called from now on."""

    def __init__(self) -> None:
        self.name = ""
        self.cases: dict[str, Case] = {}  # by a digest of all that goes in
        self.unsteady: set[str] = set()
        self._repeating = False
        self.blobs: dict[str, bytes] = {}

    def blob(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()[:24]
        self.blobs.setdefault(key, data)
        return key

    def observe(
        self,
        launches: Sequence[api.Launch],
        packed: Sequence[Sequence[bytes]],
        arrays: Sequence[Any],
        options: Mapping[str, int],
    ) -> Any:
        """An `api.Observer`."""
        relaxed = any(name.startswith("check_") and not on for name, on in options.items())
        text = launches[0].module.text
        if (
            self._repeating
            or len(launches) > 1
            or relaxed
            or not re.search(rb"^\s*\.target\s+sm_90a", text[:4000], re.MULTILINE)
        ):
            return None
        launch = launches[0]
        entry = launch.module.find(launch.entry)
        source = text.decode()
        ptx = self.blob((mutate.extract(source, entry) if source.count(".entry") > 1 else source).encode())
        places = _Places(arrays)
        params = [places.take(data, self.blob) for data in packed[0]]
        memory = places.read()
        before = places.contents(self.blob)
        name = self.name

        def ended() -> None:
            # Once more with the sums that a GPU gives; the test sees what it has computed itself.
            exact = places.read()
            places.write(memory)
            self._repeating = True
            try:
                api.run(launches, **{**options, "hopper_sums": 1, "counters": 0})
            finally:
                self._repeating = False
            regions = [
                Region(span[2], span[1] - span[0], span[0] % 256, span[3], b, a)
                for span, b, a in zip(places.spans, before, places.contents(self.blob))
            ]
            dims = [_three(v) for v in (launch.grid, launch.block, launch.cluster)]
            case = Case(name, ptx, entry, *dims, launch.smem, params, regions)
            after = [region.after.blob for region in regions]
            same = self.cases.setdefault(case.digest(), case)
            if [region.after.blob for region in same.regions] != after:
                self.unsteady.add(case.digest())
            places.write(exact)

        return ended

    def save(self, path: Path, machine_code: bool = True) -> int:
        """Writes what is needed to run the cases elsewhere; the number of cases."""
        cases = [case for key, case in self.cases.items() if key not in self.unsteady]
        wanted = {case.ptx for case in cases}
        for case in cases:
            wanted |= {side.blob for region in case.regions for side in (region.before, region.after)}
            wanted |= {param.blob for param in case.params}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("cases.json", json.dumps([asdict(case) for case in cases]))
            for key in sorted(wanted):
                file.writestr(f"blob/{key}", self.blobs[key])
            for key, cubin in self._cubins(sorted({case.ptx for case in cases})) if machine_code else ():
                file.writestr(f"cubin/{key}", cubin)
        return len(cases)

    def _cubins(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Machine code of each PTX, so that the driver there need not compile it."""
        ptxas = shutil.which("ptxas")
        if ptxas is None:
            return

        def assemble(key: str) -> tuple[str, bytes]:
            out = cache_dir() / f"{key}.cubin"
            if not out.exists():
                with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                    source, new = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
                    source.write_bytes(self.blobs[key])
                    r = subprocess.run([ptxas, "-arch=sm_90a", source, "-o", new], capture_output=True, text=True)
                    if r.returncode:
                        names = sorted({case.name for case in self.cases.values() if case.ptx == key})
                        raise RuntimeError(f"ptxas refuses the kernel of {names}:\n{r.stderr[-2000:]}")
                    new.replace(out)
            return key, out.read_bytes()

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            yield from pool.map(assemble, keys)


def _three(v: Any) -> list[int]:
    v = (v,) if isinstance(v, int) else tuple(v)
    return [*v, *(1,) * (3 - len(v))]


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Records every launch made in this process."""
    recorder = Recorder()
    api.observers.append(recorder.observe)
    try:
        yield recorder
    finally:
        api.observers.remove(recorder.observe)


def record(path: Path, tests: Sequence[str]) -> None:
    """Runs tests with pytest and records their launches."""
    import pytest

    with recording() as recorder:

        class Names:
            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
                recorder.name = item.nodeid
                return (yield)

        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--durations=0",
            "-rN",
            *(f"--deselect={test}" for test in UNDEFINED),
        ]
        status = pytest.main([*options, *tests], plugins=[Names()])
    if status:
        raise SystemExit(f"the tests do not pass (pytest: {status})")
    count = recorder.save(path)
    print(f"{path}: {count} cases, {path.stat().st_size / 2**20:.1f} MiB, {len(recorder.unsteady)} left out")


# --------------------------------------------------------------------------------------------------------- run ---
class Pack:
    """What `Recorder.save` has written."""

    def __init__(self, path: Path) -> None:
        self._file = zipfile.ZipFile(path)
        self.cases = [Case.from_json(values) for values in json.loads(self._file.read("cases.json"))]
        self._names = set(self._file.namelist())

    def blob(self, key: str) -> bytes:
        return self._file.read(f"blob/{key}")

    def image(self, case: Case) -> bytes:
        """The kernel as machine code if there is, otherwise as PTX."""
        name = f"cubin/{case.ptx}"
        return self._file.read(name) if name in self._names else self.blob(case.ptx)


def run_case(device: Any, pack: Pack, case: Case) -> tuple[list[bytes], dict[str, str]]:
    """Runs a case on a `Device`, or on what has its methods.

    What its regions hold afterwards, and of those that were overwritten next to their ends, how far.
    """
    guard = b"\xa5" * GUARD_BYTES
    bases = [device.allocate(GUARD_BYTES * 2 + 256 + region.size) for region in case.regions]
    addresses = [base + GUARD_BYTES + region.offset for base, region in zip(bases, case.regions)]

    def placed(data: Bytes) -> bytes:
        out = bytearray(pack.blob(data.blob))
        for at, region, offset in data.pointers:
            out[at : at + 8] = struct.pack("<Q", addresses[region] + offset)
        for at, region, offset, fields in data.maps:
            out[at : at + MAP_BYTES] = device.encode(address=addresses[region] + offset, **fields)
        return bytes(out)

    for region, address in zip(case.regions, addresses):
        device.write(address - GUARD_BYTES, guard + placed(region.before) + guard)
    module = device.load(pack.image(case))
    device.launch(
        module, case.entry, case.grid, case.block, case.cluster, case.shared_bytes, [placed(p) for p in case.params]
    )
    results, outside = [], {}
    for region, address in zip(case.regions, addresses):
        data = device.read(address - GUARD_BYTES, region.size + 2 * GUARD_BYTES)
        results.append(data[GUARD_BYTES:-GUARD_BYTES])
        before = GUARD_BYTES - next((i for i in range(GUARD_BYTES) if data[i] != guard[i]), GUARD_BYTES)
        behind = next((i for i in range(GUARD_BYTES, 0, -1) if data[i - 1 - GUARD_BYTES] != guard[i - 1]), 0)
        if before or behind:
            outside[region.name] = f"wrote outside, {before} bytes before its start, {behind} behind its end"
    device.unload(module)
    for base in bases:
        device.free(base)
    return results, outside


_FLOATS = {"float32": np.float32, "float16": np.float16, "float64": np.float64}


def compare(region: Region, expected: bytes, actual: bytes) -> str:
    """How the bits differ, empty where they do not. NaN of either kind is NaN."""
    want, got = np.frombuffer(expected, np.uint8).copy(), np.frombuffer(actual, np.uint8).copy()
    for data in (want, got):
        for at, size in region.after.places:
            data[at : at + size] = 0
    if np.array_equal(want, got):
        return ""
    kind = _FLOATS.get(region.dtype)
    if kind is None or len(want) % np.dtype(kind).itemsize:
        at = np.flatnonzero(want != got)
        return f"{len(at)} of {len(want)} bytes, the first at {at[0]}: {got[at[0]]:#x} for {want[at[0]]:#x}"
    bits = want.view(f"u{np.dtype(kind).itemsize}") != got.view(f"u{np.dtype(kind).itemsize}")
    want, got = want.view(kind), got.view(kind)
    at = np.flatnonzero(bits & ~(np.isnan(want) & np.isnan(got)))
    if not len(at):
        return ""
    with np.errstate(all="ignore"):
        worst = np.nanmax(np.abs(want[at].astype(np.float64) - got[at])) / np.nanmax(np.abs(want.astype(np.float64)))
    first = f"{got[at[0]]!r} for {want[at[0]]!r}"
    return f"{len(at)} of {len(want)} values, by {worst:.2g} of the largest, the first at {at[0]}: {first}"


def _worker(pack: Pack, first: int, out: Path, keep: str) -> None:
    """Runs the cases from `first` on; a line of results.jsonl each."""
    device = Device()
    for index in range(first, len(pack.cases)):
        case = pack.cases[index]
        result: dict[str, Any] = {"index": index, "name": case.name, "entry": case.entry, "status": "equal"}
        stop = False
        try:
            actual, differences = run_case(device, pack, case)
            for number, (region, data) in enumerate(zip(case.regions, actual)):
                text = compare(region, pack.blob(region.after.blob), data)
                if text:
                    differences[region.name] = "; ".join(filter(None, [differences.get(region.name), text]))
                if text or (keep and re.search(keep, case.name) and region.before.blob != region.after.blob):
                    (out / "outputs" / f"{index}_{number}").write_bytes(data)
            if differences:
                result |= {"status": "differs", "detail": differences}
        except DriverError as error:
            result |= {"status": "failed", "detail": str(error)}
            stop = True
        with open(out / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        if stop:
            # What failed may have left the context unusable, and memory behind.
            os._exit(1)


def _finished(lines: Path) -> list[dict[str, Any]]:
    """The results that are written whole."""
    text = lines.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _watch(worker: subprocess.Popen[bytes], lines: Path) -> None:
    """Waits for the end of a worker, and ends it when it no longer writes results."""
    size, since = lines.stat().st_size, time.monotonic()
    while worker.poll() is None:
        time.sleep(0.05)
        if lines.stat().st_size > size:
            size, since = lines.stat().st_size, time.monotonic()
        elif time.monotonic() - since > STALL_S:
            worker.kill()
            worker.wait()


def run(path: Path, out: Path, keep: str = "", limit_mib: float = 15) -> list[dict[str, Any]]:
    """Runs a pack on the GPU, in workers that may die; returns and writes the results."""
    pack, description = Pack(path), Device().describe()
    shutil.rmtree(out / "outputs", ignore_errors=True)
    (out / "outputs").mkdir(parents=True)
    lines = out / "results.jsonl"
    lines.write_text("")
    started = time.monotonic()
    while (first := len(_finished(lines))) < len(pack.cases):
        command = [sys.executable, "-m", "ptx_emulator.hardware", "worker", path, "--out", out, "--first", str(first)]
        worker = subprocess.Popen([*command, "--keep", keep])
        _watch(worker, lines)
        results = _finished(lines)
        if worker.returncode and not (len(results) > first and results[-1]["status"] == "failed"):
            case = pack.cases[len(results)]
            result = {"index": len(results), "name": case.name, "entry": case.entry, "status": "failed"}
            with open(lines, "a") as file:
                file.write(json.dumps({**result, "detail": f"no answer (worker: {worker.returncode})"}) + "\n")
    results = _finished(lines)
    lines.unlink()
    summary = {"device": description, "seconds": round(time.monotonic() - started, 1), "results": results}
    (out / "results.json").write_text(json.dumps(summary, indent=1))

    def order(output: Path) -> tuple[bool, int]:
        index = int(output.name.split("_")[0])
        return not (keep and re.search(keep, pack.cases[index].name)), output.stat().st_size

    with zipfile.ZipFile(out / "outputs.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for output in sorted((out / "outputs").iterdir(), key=order):
            if file.fp.tell() < limit_mib * 2**20:
                file.write(output, output.name)
    shutil.rmtree(out / "outputs")
    return results


def report(results: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for each test file, and for each case that is not equal."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result["name"].split("::")[0], Counter())[result["status"]] += 1
    for result in results:
        if result["status"] != "equal":
            print(f"{result['status']}: {result['index']} {result['name']}: {result['detail']}")
    for name, count in counts.items():
        print(f"{name}: {', '.join(f'{n} {status}' for status, n in sorted(count.items()))}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ptx_emulator.hardware", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "run", "worker"):
        command = commands.add_parser(name)
        command.add_argument("cases", type=Path)
        if name != "record":
            command.add_argument("--out", type=Path, required=True)
            command.add_argument("--keep", default="", help="keep what the GPU wrote in cases whose names match this")
            command.add_argument("--limit-mib", type=float, default=15, help="size of outputs.zip, small ones first")
            command.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "record":
        record(chosen.cases, rest or DEFAULT_TESTS)
    elif chosen.command == "worker":
        _worker(Pack(chosen.cases), chosen.first, chosen.out, chosen.keep)
    else:
        chosen.out.mkdir(parents=True, exist_ok=True)
        report(run(chosen.cases, chosen.out, chosen.keep, chosen.limit_mib))


if __name__ == "__main__":
    main()
