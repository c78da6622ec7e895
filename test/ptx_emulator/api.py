"""The Python front end: modules, launches, tensor maps."""

from __future__ import annotations

import ctypes as C
import functools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .build import library_path
from .counters import Counters, parse_counters, print_report

# CUtensorMapDataType and CUtensorMapSwizzle of the driver API.
_DTYPES = "u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16 f32_ftz tf32 tf32_ftz u4_align8 u4_align16 u6_align16"
DTYPE = {name: i for i, name in enumerate(_DTYPES.split())}
SWIZZLE = {0: 0, None: 0, 32: 1, 64: 2, 128: 3, "128_atom32": 4, "128_atom32_flip8": 5, "128_atom64": 6}
TENSOR_MAP_BYTES = 128


@functools.cache
def _load() -> C.CDLL:
    lib = C.CDLL(str(library_path()))
    ptr, text, u32, u64, i64, status = C.c_void_p, C.c_char_p, C.c_uint32, C.c_uint64, C.c_int64, C.c_int
    signatures = {
        "error": (text, []),
        "error_kind": (text, []),
        "module_load": (ptr, [text, C.c_size_t]),
        "module_free": (None, [ptr]),
        "module_entries": (text, [ptr]),
        "module_global": (u64, [ptr, text]),
        "kernel_info": (text, [ptr, text]),
        "session_new": (ptr, []),
        "session_free": (None, [ptr]),
        "session_option": (status, [ptr, text, i64]),
        "session_region": (status, [ptr, u64, u64, C.c_int, text]),
        "session_launch": (status, [ptr, ptr, text, ptr, ptr, ptr, u32, ptr, ptr, u32]),
        "session_run": (status, [ptr]),
        "session_stats": (text, [ptr]),
        "session_output": (text, [ptr]),
        "session_warnings": (text, [ptr]),
        "session_counters": (text, [ptr]),
        "encode_tiled": (status, [ptr, C.c_int, u32, u64, ptr, ptr, ptr, ptr, C.c_int, C.c_int, C.c_int, C.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        f = getattr(lib, f"ptx_emulator_{name}")
        f.restype, f.argtypes = result, arguments
        setattr(lib, name, f)
    return lib


class PtxError(RuntimeError):
    """A violation found by the emulator; `kind` names the class of violation."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def _raise() -> None:
    lib = _load()
    raise PtxError(lib.error_kind().decode(), lib.error().decode())


# ---------------------------------------------------------------------------------------------- tensor maps ---
def _is_array(a: Any) -> bool:
    return isinstance(a, np.ndarray) or hasattr(a, "data_ptr")


def _span(a: Any) -> tuple[int, int]:
    """(address, bytes) of the memory that an array touches."""
    if hasattr(a, "data_ptr"):  # torch
        extent = 0 if a.numel() == 0 else sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) + 1
        return a.data_ptr(), extent * a.element_size()
    if isinstance(a, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(a) if hasattr(np.lib, "array_utils") else np.byte_bounds(a)
        return low, high - low
    raise TypeError(f"not an array: {type(a)}")


class TensorMap:
    """A 128-byte tensor map, to be passed by value; `arrays` are registered with the launch that takes it."""

    def __init__(self, blob: bytes, arrays: Iterable[Any] = ()):
        self.blob, self.arrays = blob, list(arrays)


def encode_tiled(
    dtype: str | int,
    rank: int,
    address: Any,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] | None = None,
    interleave: int = 0,
    swizzle: Any = 0,
    l2_promotion: int = 0,
    oob_fill: int = 0,
    arrays: Sequence[Any] = (),
    out: int | None = None,
) -> TensorMap:
    """cuTensorMapEncodeTiled: `strides` are bytes, of dimensions 1 to rank - 1; `address` may be an array.

    `out`, an address, receives the 128 bytes as well.
    """
    if _is_array(address):
        arrays, address = (*arrays, address), _span(address)[0]
    blob = C.create_string_buffer(TENSOR_MAP_BYTES)
    sizes, pitches = (C.c_uint64 * rank)(*dims), (C.c_uint64 * max(rank - 1, 1))(*strides)
    boxes, steps = (C.c_uint32 * rank)(*box), (C.c_uint32 * rank)(*(element_strides or [1] * rank))
    dtype, swizzle = DTYPE.get(dtype, dtype), SWIZZLE.get(swizzle, swizzle)
    if _load().encode_tiled(
        blob, dtype, rank, address, sizes, pitches, boxes, steps, interleave, swizzle, l2_promotion, oob_fill
    ):
        _raise()
    if out is not None:
        C.memmove(out, blob, TENSOR_MAP_BYTES)
    return TensorMap(blob.raw, arrays)


def encode_tiled_function() -> int:
    """Address of a C function with the signature and the meaning of cuTensorMapEncodeTiled.

    It writes the emulator's 128 bytes, and returns 0 or, like the driver, 1 (invalid value); `last_error` has the
    reason. A host launcher that takes the encoder as a function pointer can be given this one.
    """
    return C.cast(_load().encode_tiled, C.c_void_p).value


def last_error() -> str:
    """Text of the last failure in this thread, empty when the last call succeeded."""
    return _load().error().decode()


def tensor_map(array: Any, dtype: str, box: Sequence[int], swizzle: Any = 0, oob_fill: int = 0) -> TensorMap:
    """Tensor map of a whole strided array; `box` is given innermost first."""
    if hasattr(array, "data_ptr"):
        shape, item = tuple(array.shape), array.element_size()
        strides = [x * item for x in array.stride()]
    else:
        shape, strides = array.shape, list(array.strides)
    return encode_tiled(
        dtype, len(shape), array, list(shape)[::-1], strides[::-1][1:], box, swizzle=swizzle, oob_fill=oob_fill
    )


# -------------------------------------------------------------------------------------------------- launches ---
@dataclass
class Stats:
    """What a run did. `counters` and `launches` are filled with counters=True, see README "Counters"."""

    warp_instrs: int = 0
    thread_instrs: int = 0
    tensor_ops: int = 0
    bulk_ops: int = 0
    seconds: float = 0.0
    output: str = ""  # device printf
    warnings: list[str] = field(default_factory=list)
    counters: Counters = field(default_factory=dict)
    launches: list[Counters] = field(default_factory=list)

    def report(self, by: str = "warps", file=None) -> None:
        """Prints the counters, a column per warp id (or by="ctas") and the total."""
        if not self.counters:
            raise ValueError("run with counters=True")
        print_report(self.counters, by, file)


@dataclass
class Launch:
    """One kernel launch; several can run side by side in `run`.

    `args`: one value per kernel parameter: array, TensorMap, number, None, bytes, ctypes value.
    `buffers`: memory that the kernel reaches otherwise: arrays, or (address, bytes[, name[, read_only]]) tuples.
    """

    module: Module
    entry: str
    grid: int | Sequence[int]
    block: int | Sequence[int]
    args: Sequence[Any]
    cluster: int | Sequence[int] = (0, 0, 0)
    smem: int = 0
    buffers: Sequence[Any] = ()


class Module:
    """PTX text, parsed. A kernel is decoded when it is first used."""

    def __init__(self, text: str | bytes):
        self._lib = _load()
        self.text = text.encode() if isinstance(text, str) else text
        self._h = self._lib.module_load(self.text, len(self.text))
        if not self._h:
            _raise()
        self.entries: list[str] = self._lib.module_entries(self._h).decode().split()
        self._info: dict[str, dict[str, Any]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> Module:
        return cls(Path(path).read_bytes())

    def __del__(self):
        if getattr(self, "_h", None):
            self._lib.module_free(self._h)

    def find(self, name: str) -> str:
        """The entry whose mangled name is, or contains, `name`."""
        if name in self.entries:
            return name
        hits = [e for e in self.entries if name in e]
        if len(hits) != 1:
            raise KeyError(f"{name!r} matches {len(hits)} entries of {self.entries}")
        return hits[0]

    def info(self, name: str) -> dict[str, Any]:
        """Sizes of the parameters and of registers, shared and local memory (bytes), number of instructions."""
        entry = self.find(name)
        if entry not in self._info:
            text = self._lib.kernel_info(self._h, entry.encode())
            if text is None:
                _raise()
            rows = [line.split() for line in text.decode().splitlines()]
            self._info[entry] = {r[0]: [int(x) for x in r[1:]] if r[0] == "params" else int(r[1]) for r in rows}
        return self._info[entry]

    def global_address(self, name: str) -> int:
        """Address of a module-scope variable, 0 if there is none."""
        return self._lib.module_global(self._h, name.encode())

    def launch(
        self,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        cluster: int | Sequence[int] = (0, 0, 0),
        smem: int = 0,
        buffers: Sequence[Any] = (),
        **options: int,
    ) -> Stats:
        """Runs one kernel to completion; see `Launch`, and README for the options."""
        return run([Launch(self, entry, grid, block, args, cluster, smem, buffers)], **options)


def _dims(v: int | Sequence[int]) -> C.Array:
    v = (v,) if isinstance(v, int) else tuple(v)
    return (C.c_uint32 * 3)(*(v + (1,) * (3 - len(v))))


def _pack(value: Any, size: int, arrays: list[Any]) -> bytes:
    if isinstance(value, TensorMap):
        arrays.extend(value.arrays)
        return value.blob
    if _is_array(value):
        arrays.append(value)
        return struct.pack("<Q", _span(value)[0])
    if value is None:
        return bytes(size)
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, bytes | bytearray | C._SimpleCData | C.Structure | C.Array):
        return bytes(value)
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return int(value).to_bytes(size, "little", signed=value < 0)


def _register(session: int, arrays: Sequence[Any]) -> None:
    seen = set()
    for i, a in enumerate(arrays):
        if isinstance(a, tuple):
            address, size, name, read_only = (*a, *(f"buffer{i}", False)[len(a) - 2 :])
        else:
            (address, size), name, read_only = _span(a), f"array{i}{list(a.shape)}", False
        if size and (address, size) not in seen:
            seen.add((address, size))
            _load().session_region(session, address, size, int(read_only), name.encode())


# Each is called before a run with its launches, the packed parameters of each, the registered memory and the options;
# what it returns is called once the run has ended well. For hardware.py.
Observer = Callable[
    [Sequence[Launch], Sequence[Sequence[bytes]], Sequence[Any], Mapping[str, int]], Callable[[], None] | None
]
observers: list[Observer] = []


def run(launches: Sequence[Launch], **options: int) -> Stats:
    """Runs the launches concurrently on one emulated device."""
    lib = _load()
    session = lib.session_new()
    try:
        for name, value in options.items():
            if lib.session_option(session, name.encode(), int(value)):
                raise ValueError(f"unknown option {name}")
        arrays: list[Any] = []
        packed: list[list[bytes]] = []
        for la in launches:
            entry = la.module.find(la.entry)
            sizes = la.module.info(entry)["params"]
            if len(sizes) != len(la.args):
                raise ValueError(f"{entry} has {len(sizes)} parameters, {len(la.args)} given")
            blobs = [_pack(a, n, arrays) for a, n in zip(la.args, sizes, strict=True)]
            packed.append(blobs)
            arrays.extend(la.buffers)
            values = [C.create_string_buffer(b, len(b)) for b in blobs]
            pointers = (C.c_void_p * max(len(values), 1))(*[C.addressof(b) for b in values])
            lengths = (C.c_uint32 * max(len(values), 1))(*map(len, blobs))
            shape = [_dims(v) for v in (la.grid, la.block, la.cluster)]
            if lib.session_launch(
                session, la.module._h, entry.encode(), *shape, la.smem, pointers, lengths, len(values)
            ):
                _raise()
        _register(session, arrays)
        ended = [observer(launches, packed, arrays, options) for observer in observers]
        if lib.session_run(session):
            _raise()
        for tell in filter(None, ended):
            tell()
        rows = dict(line.split() for line in lib.session_stats(session).decode().splitlines())
        stats = Stats(
            *(int(rows[k]) for k in ("warp_instrs", "thread_instrs", "tensor_ops", "bulk_ops")),
            float(rows["seconds"]),
            lib.session_output(session).decode(errors="replace"),
            lib.session_warnings(session).decode().splitlines(),
        )
        if options.get("counters"):
            table = lib.session_counters(session).decode().splitlines()
            stats.counters = parse_counters(table)
            stats.launches = [parse_counters(table, i) for i in range(len(launches))]
        return stats
    finally:
        lib.session_free(session)
