"""What a host launcher needs: an encoder to call, raw parameter bytes, raw addresses. And the profile's arithmetic."""

import ctypes
import io

import numpy as np

import ptx_emulator
from ptx_emulator.profile import bounds, print_profile, profile
from ptx_emulator.testing import expect, kernels, module

ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 4,
)


def encode(out, array, box, strides=None):
    """Calls the encoder as C++ would."""
    function = ENCODE(ptx_emulator.encode_tiled_function())
    rows, cols = array.shape
    strides = (ctypes.c_uint64 * 1)(strides or array.strides[0])
    ones = (ctypes.c_uint32 * 2)(1, 1)
    dims, boxes = (ctypes.c_uint64 * 2)(cols, rows), (ctypes.c_uint32 * 2)(*box)
    return function(out, ptx_emulator.DTYPE["s32"], 2, array.ctypes.data, dims, strides, boxes, ones, 0, 0, 2, 0)


def test_encoder_fills_the_callers_buffer():
    a, out = np.arange(1024, dtype=np.int32).reshape(32, 32), np.zeros((2, 32, 32), np.int32)
    blob = ctypes.create_string_buffer(192)
    at = -ctypes.addressof(blob) % 64
    assert encode(ctypes.addressof(blob) + at, a, (32, 16)) == 0 and ptx_emulator.last_error() == ""
    raw = blob.raw[at : at + 128]
    assert raw == ptx_emulator.tensor_map(a, "s32", [32, 16]).blob
    params = [raw, out.ctypes.data.to_bytes(8, "little")]
    buffers = [(a.ctypes.data, a.nbytes, "a", True), (out.ctypes.data, out.nbytes)]
    kernels("tma").launch("multicast", 2, 64, params, buffers=buffers)
    assert (out == a).all()
    expect("global_bounds", kernels("tma").launch, "multicast", 2, 64, params, buffers=buffers[:1])


def test_encoder_refuses_like_the_driver():
    a = np.zeros((32, 32), np.int32)
    blob = ctypes.create_string_buffer(128)
    assert encode(blob, a, (32, 300)) == 1 and "box dimension 1 is 300" in ptx_emulator.last_error()
    assert encode(blob, a, (32, 16), strides=100) == 1 and "not a multiple of 16" in ptx_emulator.last_error()


def test_encode_tiled_writes_to_an_address():
    a, blob = np.zeros((32, 32), np.int32), ctypes.create_string_buffer(128)
    m = ptx_emulator.encode_tiled("s32", 2, a, (32, 32), (128,), (32, 16), out=ctypes.addressof(blob))
    assert blob.raw == m.blob
    expect("tensormap", ptx_emulator.encode_tiled, "s32", 2, a, (32, 32), (8,), (32, 16))


def test_read_only_buffers():
    mod = module(".reg .b64 %a; ld.param.u64 %a, [out]; st.global.u32 [%a], 1;")
    out = np.zeros(4, np.int32)
    mod.launch("k", 1, 32, [out.ctypes.data], buffers=[(out.ctypes.data, 16, "out")])
    text = expect("global_readonly", mod.launch, "k", 1, 32, [out.ctypes.data], buffers=[(out.ctypes.data, 16, "x", 1)])
    assert "memory x" in text


def test_large_modules_load_fast():
    """A library's PTX holds dozens of kernels; only those that are launched are decoded."""
    body = "\n".join(f"add.u32 %r{i % 50}, %r{(i + 1) % 50}, {i};" for i in range(20_000))
    text = ".version 9.0\n.target sm_90a\n.address_size 64\n" + "".join(
        f".visible .entry k{i}()\n{{\n.reg .b32 %r<50>;\n{body}\nret;\n}}\n" for i in range(4)
    )
    mod = ptx_emulator.Module(text)
    assert mod.entries == ["k0", "k1", "k2", "k3"] and mod.info("k2")["instructions"] >= 20_000
    assert mod.launch("k1", 1, 32, []).warp_instrs == 20_001


def test_profile_separates_blocks_tiles_and_start():
    names = ["tensor", "integer", "bulk", "bulk_load_bytes", "gmem_loads", "global", "polls"]

    def run(tiles, blocks):
        consumer = dict.fromkeys(names, 0) | {"tensor": 4 * tiles * blocks, "integer": 7 + tiles * (5 + 3 * blocks)}
        producer = dict.fromkeys(names, 0) | {"bulk": 2 * tiles * blocks, "bulk_load_bytes": 64 * tiles * blocks}
        one = {0: producer, **dict.fromkeys(range(4, 8), consumer)}
        warps = {w: {k: 2 * v for k, v in c.items()} for w, c in one.items()}  # of two CTAs
        total = {n: sum(c[n] for c in warps.values()) for n in names}
        return {"total": total, "warps": warps, "ctas": {0: {}, 1: {}}}

    producer, consumer = profile(run, (2, 5), (4, 9))
    assert (producer.name, consumer.name, consumer.warps) == ("copy producer", "consumer", [4, 5, 6, 7])
    assert consumer.per_block == {"tensor": 4, "integer": 3} and consumer.per_tile == {"integer": 5}
    assert consumer.fixed == {"integer": 7} and producer.per_block == {"bulk": 2, "bulk_load_bytes": 64}
    text = io.StringIO()
    print_profile([producer, consumer], 128 * 128 * 128, file=text)
    assert "consumer (4-7)" in text.getvalue() and "512 cycles of the tensor cores" in text.getvalue()
    info = {"block_m": 128, "block_n": 128, "block_k": 128, "swap_ab": False}
    want = {"tensor": 512, "issue": 7, "shared": 384, "bytes per tensor clock": 0.125}
    assert bounds([producer, consumer], info) == want
    assert bounds([producer, consumer], info, 10)["issue"] == 75
