"""A CUDA device through the driver API: what is needed to run a recorded launch, and nothing else. See hardware.py."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

MAX_DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability
ERROR_LOG, ERROR_LOG_BYTES = 5, 6  # CUjit_option


class DriverError(RuntimeError):
    """A call of the driver failed; what was launched before may be the reason."""


class _LaunchAttribute(C.Structure):
    """CUlaunchAttribute: an id, then from byte 8 on a union of 64 bytes."""

    _fields_ = [("id", C.c_int), ("pad", C.c_char * 4), ("dim", C.c_uint * 3), ("rest", C.c_char * 52)]


class _LaunchConfig(C.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", C.c_uint * 3),
        ("block", C.c_uint * 3),
        ("shared_bytes", C.c_uint),
        ("stream", C.c_void_p),
        ("attributes", C.POINTER(_LaunchAttribute)),
        ("num_attributes", C.c_uint),
    ]


class _AlignedMap(C.Structure):
    """Room for a CUtensorMap, which has to lie on a multiple of 64 bytes."""

    _fields_ = [("bytes", C.c_char * 192)]


class Device:
    """The first GPU, with the primary context of this process."""

    def __init__(self) -> None:
        self._lib = C.CDLL("libcuda.so.1")
        self._call("cuInit", C.c_uint(0))
        self._device = C.c_int()
        self._call("cuDeviceGet", C.byref(self._device), C.c_int(0))
        context = C.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", C.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            text = C.c_char_p()
            self._lib.cuGetErrorName(C.c_int(status), C.byref(text))
            raise DriverError(f"{name}: {text.value.decode() if text.value else status}")

    def describe(self) -> dict[str, Any]:
        name, version = C.create_string_buffer(128), C.c_int()
        self._call("cuDeviceGetName", name, C.c_int(len(name)), self._device)
        self._call("cuDriverGetVersion", C.byref(version))
        capability = []
        for attribute in (MAJOR, MINOR):
            value = C.c_int()
            self._call("cuDeviceGetAttribute", C.byref(value), C.c_int(attribute), self._device)
            capability.append(value.value)
        return {"name": name.value.decode(), "driver": version.value, "capability": capability}

    # ----------------------------------------------------------------------------------------------- memory ---
    def allocate(self, size: int) -> int:
        """The address of at least `size` bytes, a multiple of 256."""
        address = C.c_uint64()
        self._call("cuMemAlloc_v2", C.byref(address), C.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", C.c_uint64(address))

    def write(self, address: int, data: bytes) -> None:
        if data:
            self._call("cuMemcpyHtoD_v2", C.c_uint64(address), C.c_char_p(data), C.c_size_t(len(data)))

    def read(self, address: int, size: int) -> bytes:
        out = C.create_string_buffer(max(size, 1))
        if size:
            self._call("cuMemcpyDtoH_v2", out, C.c_uint64(address), C.c_size_t(size))
        return out.raw[:size]

    # -------------------------------------------------------------------------------------------- launching ---
    def encode(
        self,
        dtype: int,
        address: int,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        element_strides: Sequence[int],
        swizzle: int,
        oob_fill: int,
    ) -> bytes:
        """cuTensorMapEncodeTiled."""
        rank = len(dims)
        room = _AlignedMap()
        base = C.addressof(room)
        at = -base % 64
        self._call(
            "cuTensorMapEncodeTiled",
            C.c_void_p(base + at),
            C.c_int(dtype),
            C.c_uint32(rank),
            C.c_void_p(address),
            (C.c_uint64 * rank)(*dims),
            (C.c_uint64 * max(rank - 1, 1))(*strides),
            (C.c_uint32 * rank)(*box),
            (C.c_uint32 * rank)(*element_strides),
            *[C.c_int(value) for value in (0, swizzle, 0, oob_fill)],
        )
        return C.string_at(base + at, 128)

    def load(self, image: bytes) -> int:
        """A module from a cubin, or from PTX, which the driver compiles."""
        module, log = C.c_void_p(), C.create_string_buffer(4096)
        options = (C.c_int * 2)(ERROR_LOG, ERROR_LOG_BYTES)
        values = (C.c_void_p * 2)(C.addressof(log), len(log))
        data = C.create_string_buffer(image)  # PTX has to end with a zero
        try:
            self._call("cuModuleLoadDataEx", C.byref(module), data, C.c_uint(2), options, values)
        except DriverError as error:
            raise DriverError(f"{error} {log.value.decode(errors='replace')}") from None
        return module.value

    def unload(self, module: int) -> None:
        self._call("cuModuleUnload", C.c_void_p(module))

    def launch(
        self,
        module: int,
        entry: str,
        grid: Sequence[int],
        block: Sequence[int],
        cluster: Sequence[int],
        shared_bytes: int,
        params: Sequence[bytes],
    ) -> None:
        """Runs a kernel to completion; `cluster` is (0, 0, 0) where the kernel says itself what it needs."""
        function = C.c_void_p()
        self._call("cuModuleGetFunction", C.byref(function), C.c_void_p(module), C.c_char_p(entry.encode()))
        self._call("cuFuncSetAttribute", function, C.c_int(MAX_DYNAMIC_SHARED), C.c_int(shared_bytes))
        config = _LaunchConfig((C.c_uint * 3)(*grid), (C.c_uint * 3)(*block), shared_bytes, None, None, 0)
        if cluster[0]:
            if cluster[0] * cluster[1] * cluster[2] > 8:
                self._call("cuFuncSetAttribute", function, C.c_int(NON_PORTABLE_CLUSTER), C.c_int(1))
            attribute = _LaunchAttribute(CLUSTER_DIMENSION, b"", (C.c_uint * 3)(*cluster), b"")
            config.attributes, config.num_attributes = C.pointer(attribute), 1
        values = [C.create_string_buffer(value, len(value)) for value in params]
        pointers = (C.c_void_p * max(len(values), 1))(*map(C.addressof, values))
        self._call("cuLaunchKernelEx", C.byref(config), function, pointers, None)
        self._call("cuCtxSynchronize")
