"""Operand layouts of tensor-core instructions, written from the PTX ISA as definitions to test against.

Nothing here is shared with the emulator's C++: that is the point. Sections are named as in PTX ISA 9.0.
"""

from __future__ import annotations

import numpy as np

# "Shared Memory Matrix Layout", canonical layouts. A 128-bit element T is 16 bytes; the swizzle `Swizzle<B, 4, 3>`
# exclusive-ors address bits [4, 4 + B) with bits [7, 7 + B).
SWIZZLE_BITS = {0: 0, 32: 1, 64: 2, 128: 3}


def swizzled(address: int, span: int) -> int:
    """The byte address at which an element of a matrix with a `span`-byte swizzle lies."""
    bits = SWIZZLE_BITS[span]
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


def operand_address(mn: int, k_byte: int, span: int, lbo: int, sbo: int) -> int:
    """K-major: ((8, m), (T, 2k)) : ((span, SBO), (1, T)), without swizzle ((16 bytes, SBO), (1, LBO))."""
    if span == 0:
        return mn % 8 * 16 + mn // 8 * sbo + k_byte % 16 + k_byte // 16 * lbo
    assert np.all(k_byte < span)
    return swizzled(mn % 8 * span + mn // 8 * sbo + k_byte, span)


def operand_address_mn(mn_byte: int, k: int, span: int, lbo: int, sbo: int) -> int:
    """MN-major: ((T, span / T, m), (8, k)) : ((1, T, LBO), (span, SBO)), without swizzle ((1, T, SBO), (T, LBO))."""
    if span == 0:
        return mn_byte % 16 + mn_byte // 16 * sbo + k % 8 * 16 + k // 8 * lbo
    return swizzled(mn_byte % span + mn_byte // span * lbo + k % 8 * span + k // 8 * sbo, span)


def operand_address_mn_32(mn_byte: int, k: int, lbo: int, sbo: int) -> int:
    """MN-major 32-bit types of tcgen05, "128B swizzling with 32B atomicity": atoms of 128 bytes by 4 rows of K."""
    address = mn_byte % 128 + mn_byte // 128 * lbo + k % 4 * 128 + k // 4 * sbo
    return address ^ (address >> 7 & 3) << 5


def operand_image(x: np.ndarray, span: int, mn_major: bool, lbo: int, sbo: int, size: int) -> np.ndarray:
    """Shared memory that holds the operand x [MN, K] at offset 0; bytes that belong to nothing are 0xFF."""
    image = np.full(size, 0xFF, np.uint8)
    item = x.dtype.itemsize
    raw = np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, item)
    for mn in range(x.shape[0]):
        for k in range(x.shape[1]):
            if mn_major:
                at = operand_address_mn(mn * item, k, span, lbo, sbo)
            else:
                at = operand_address(mn, k * item, span, lbo, sbo)
            image[at : at + item] = raw[mn, k]
    return image


def wgmma_descriptor(span: int, lbo: int, sbo: int) -> int:
    """ "Matrix Descriptor Format" of wgmma for an operand at address 0."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    return lbo >> 4 << 16 | sbo >> 4 << 32 | mode << 62


def tcgen05_descriptor(span: int, lbo: int, sbo: int) -> int:
    """ "Shared memory descriptor" of tcgen05 for an operand at address 0."""
    mode = {0: 0, 128: 2, 64: 4, 32: 6}[span]
    return lbo >> 4 << 16 | sbo >> 4 << 32 | 0b001 << 46 | mode << 61


def wgmma_fragment(n: int) -> tuple[np.ndarray, np.ndarray]:
    """ "Register Fragments for wgmma.mma_async.m64nNk*", D: row and column of [thread, register]."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    lane = thread % 32
    return thread // 32 * 16 + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


def wgmma_fragment_a(k: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """ "Register Fragments", A in registers: row and column of [thread, element]; 32 / bits elements per register."""
    per = 32 // bits
    thread, e = np.arange(128)[:, None], np.arange(4 * per)[None, :]
    lane, register = thread % 32, e // per
    row = thread // 32 * 16 + lane // 4 + register % 2 * 8
    return row, lane % 4 * per + e % per + register // 2 * (k // 2)


def tcgen05_instruction(m: int, n: int, a: str, b: str, *, mn_a=0, mn_b=0, negate_a=0, negate_b=0) -> int:
    """ "Instruction descriptor" of tcgen05.mma, kinds f16, tf32 and f8f6f4, FP32 accumulator."""
    formats = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
    fields = {4: 1, 7: formats[a], 10: formats[b], 13: negate_a, 14: negate_b, 15: mn_a, 16: mn_b, 17: n >> 3}
    return sum(value << bit for bit, value in fields.items()) | m >> 4 << 24


def tcgen05_accumulator(m: int, n: int, ctas: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ "Data path layout organization": CTA, lane and column of element [row, col] of D.

    One CTA: 128 rows in 128 lanes (layout D), or 64 rows, 16 in each quarter of the lanes (layout F). Two CTAs: 128
    rows in each (layout A), or 64 rows in each, the second half of the columns in lanes 64 to 127 (layout B).
    """
    row, col = np.broadcast_arrays(np.arange(m)[:, None], np.arange(n)[None, :])
    per_cta = m // ctas
    cta, row = row // per_cta, row % per_cta
    if per_cta == 128:
        return cta, row, col
    if ctas == 1:
        return cta, row // 16 * 32 + row % 16, col
    return cta, row + 64 * (col >= n // 2), col % (n // 2)


def tcgen05_scaled_instruction(
    m: int, n: int, a: str, b: str, sfa_id: int, sfb_id: int, *, packed: bool = False, ue8m0: int = 1, mn_a=0, mn_b=0
) -> int:
    """ "Instruction descriptor", kinds mxf8f6f4 and (packed) mxf4 and mxf4nvf4: always an FP32 accumulator."""
    formats = {"e2m1": 1} if packed else {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}
    fields = {4: sfb_id, 7: formats[a], 10: formats[b], 15: mn_a, 16: mn_b, 17: n >> 3, 23: ue8m0, 29: sfa_id}
    return sum(value << bit for bit, value in fields.items()) | m >> 7 << 27


def tcgen05_scale_words(scales: np.ndarray, sf_id: int, filler: np.ndarray) -> np.ndarray:
    """ "Scale factor layout in tensor memory": words of [32 lanes, column], from codes of [row, block of K].

    The scale factors of row r lie in lane r % 32 and column r / 32, those of successive blocks of K in successive bytes
    from byte sf_id; other bytes are filler's. The same 32 lanes are needed in each quarter of tensor memory.
    """
    words = filler.astype(np.uint8).reshape(32, -1, 4).copy()
    row, block = np.indices(scales.shape)
    words[row % 32, row // 32, sf_id + block] = scales
    return words.view(np.uint32)[:, :, 0]


FORMATS = {"e4m3": (4, 3, 7), "e5m2": (5, 2, 15), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e2m1": (2, 1, 1)}


def minifloat(code: np.ndarray, dtype: str) -> np.ndarray:
    """ "Alternate floating point data formats": values of finite codes."""
    exponent_bits, fraction_bits, bias = FORMATS[dtype]
    code = code.astype(np.int64)
    fraction = (code & (1 << fraction_bits) - 1) / 2.0**fraction_bits
    exponent = code >> fraction_bits & (1 << exponent_bits) - 1
    magnitude = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    return np.where(code >> exponent_bits + fraction_bits & 1, -magnitude, magnitude)


def packed_codes(codes: np.ndarray, dtype: str, *, packed: bool = False) -> np.ndarray:
    """ "Packing formats" in shared memory: bytes of the last dimension of codes.

    8-bit types take a byte. Of kinds f8f6f4 and mxf8f6f4, 16 elements of 4 or 6 bits lie densely at the start of 16
    bytes, the rest is padding (here ones); of kinds mxf4 and mxf4nvf4 (packed) 32 elements of 4 bits fill 16 bytes.
    """
    bits = sum(FORMATS[dtype][:2]) + 1
    if bits == 8:
        return codes.astype(np.uint8)
    group = 32 if packed else 16
    stream = codes.reshape(*codes.shape[:-1], -1, group, 1) >> np.arange(bits) & 1
    stream = stream.reshape(*stream.shape[:-2], group * bits)
    out = np.ones((*stream.shape[:-1], 128), np.uint8)
    out[..., : group * bits] = stream
    return np.packbits(out, axis=-1, bitorder="little").reshape(*codes.shape[:-1], -1)
