#include "tma.hpp"

#include <algorithm>

#include "numerics.hpp"

namespace ptx_emulator {

namespace {
// Bits per element in global memory.
u32 elementBits(TmaType t) {
    switch (t) {
        case TmaType::U8: return 8;
        case TmaType::U16:
        case TmaType::F16:
        case TmaType::BF16: return 16;
        case TmaType::U64:
        case TmaType::S64:
        case TmaType::F64: return 64;
        case TmaType::U4_ALIGN8:
        case TmaType::U4_ALIGN16: return 4;
        case TmaType::U6_ALIGN16: return 6;
        default: return 32;
    }
}
// Unpacked sub-byte types put every 16 elements into a 16-byte slot of shared
// memory (PTX ISA "Sub-byte types in tensor copies": b4x16_p64, b6x16_p32).
bool unpacked(TmaType t) { return t == TmaType::U4_ALIGN16 || t == TmaType::U6_ALIGN16; }
u32 rowSmemBytes(const TensorMap& t) { return unpacked(t.type) ? t.box[0] : t.box[0] * elementBits(t.type) / 8; }
u32 swizzleSpan(TmaSwizzle s) {
    return s == TmaSwizzle::None ? 0 : s == TmaSwizzle::B32 ? 32 : s == TmaSwizzle::B64 ? 64 : 128;
}
// Rows of a box narrower than the swizzle's span are as far apart as that, as an H200 lays them out.
u32 rowPitch(const TensorMap& t) { return std::max(rowSmemBytes(t), swizzleSpan(t.swizzle)); }
u32 boxRows(const TensorMap& t) {
    u32 n = 1;
    for (u32 i = 1; i < t.rank; i++) n *= (t.box[i] + t.elementStride[i] - 1) / t.elementStride[i];
    return n;
}
}  // namespace

std::string encodeTiled(void* map, int type, u32 rank, u64 address, const u64* dims, const u64* strides, const u32* box,
                        const u32* es, int interleave, int swizzle, int, int oobFill) {
    TensorMap t{};
    t.magic = TensorMap::kMagic;
    if (type < 0 || type > 15) return strf("data type %d", type);
    if (rank < 1 || rank > 5) return strf("rank %u", rank);
    if (interleave) return "interleaved layouts are not modelled";
    if (swizzle < 0 || swizzle > 6) return strf("swizzle %d", swizzle);
    if (TmaSwizzle(swizzle) == TmaSwizzle::B128_ATOM32_FLIP8)
        return "the 128B_ATOM_32B_FLIP_8B swizzle is not modelled";
    t.type = TmaType(type);
    t.rank = u8(rank);
    t.swizzle = TmaSwizzle(swizzle);
    t.nanFill = u8(oobFill);
    t.address = address;
    if (address % (unpacked(t.type) ? 32 : 16))
        return strf("global address %#lx is not 16-byte aligned (32 for unpacked types)", address);
    for (u32 i = 0; i < rank; i++) {
        if (dims[i] < 1 || dims[i] > (u64(1) << 32)) return strf("dimension %u is %lu", i, dims[i]);
        if (box[i] < 1 || box[i] > 256) return strf("box dimension %u is %u (1..256)", i, box[i]);
        if (es[i] < 1 || es[i] > 8) return strf("element stride %u is %u (1..8)", i, es[i]);
        t.dim[i] = u32(dims[i] - 1);  // 2^32 is legal
        t.box[i] = u16(box[i]);
        t.elementStride[i] = u8(es[i]);
        if (i) {
            if (strides[i - 1] % 16 || strides[i - 1] >= (u64(1) << 40))
                return strf("stride %u is %lu bytes, not a multiple of 16 below 2^40", i - 1, strides[i - 1]);
            t.stride[i] = strides[i - 1];
        }
    }
    u32 inner = rowSmemBytes(t);
    if (inner % 16) return strf("inner box dimension is %u bytes, not a multiple of 16", inner);
    if (swizzleSpan(t.swizzle) && inner > swizzleSpan(t.swizzle))
        return strf("inner box dimension is %u bytes, more than the swizzle span %u", inner, swizzleSpan(t.swizzle));
    if (unpacked(t.type) && dims[0] % 128)
        return "inner dimension of an unpacked sub-byte type must be a multiple of 128";
    std::memset(map, 0, 128);
    std::memcpy(map, &t, sizeof t);
    return "";
}

TensorMap readTensorMap(Warp& w, int lane, u64 a) {
    if (a % 64) w.m->fault(&w, lane, "tensormap", strf("tensor map at %#lx is not 64-byte aligned", a));
    TensorMap t;
    const u8* p = resolve(w, lane, Space::Generic, a, 64, false);
    resolve(w, lane, Space::Generic, a + 64, 64, false);
    std::memcpy(&t, p, sizeof t);
    if (t.magic != TensorMap::kMagic) w.m->fault(&w, lane, "tensormap", strf("no tensor map at %#lx", a));
    return t;
}

u32 tmaBoxBytes(const TensorMap& t) { return boxRows(t) * rowPitch(t); }

void tmaBoxPieces(const TensorMap& t, u32 offset, const std::function<void(u32, u32)>& piece) {
    u32 bytes = rowSmemBytes(t), pitch = rowPitch(t);
    if (bytes == pitch) return piece(offset, tmaBoxBytes(t));
    for (u32 r = 0; r < boxRows(t); r++)
        for (u32 k = 0; k < bytes; k += 16) piece(tmaSwizzleOffset(t.swizzle, offset + r * pitch + k), 16);
}

// Completion counts the bytes that carry data: padding between rows or of unpacked sub-byte types is not included (which
// an H200 confirms for the former, shipped kernels expect of the latter).
u32 tmaTxBytes(const TensorMap& t) {
    u32 n = boxRows(t) * rowSmemBytes(t);
    return unpacked(t.type) ? n * elementBits(t.type) / 8 : n;
}

bool tmaStartAligned(const TensorMap& t, i32 innermost) { return i64(innermost) * elementBits(t.type) % 128 == 0; }

// Swizzles permute 16-byte (or 32/64-byte) chunks by XOR with address bits 7..9,
// PTX ISA "Tensor swizzling modes".
u32 tmaSwizzleOffset(TmaSwizzle s, u32 a) {
    switch (s) {
        case TmaSwizzle::None: return a;
        case TmaSwizzle::B32: return a ^ ((a >> 3) & 0x10);
        case TmaSwizzle::B64: return a ^ ((a >> 3) & 0x30);
        case TmaSwizzle::B128: return a ^ ((a >> 3) & 0x70);
        case TmaSwizzle::B128_ATOM32: return a ^ ((a >> 2) & 0x60);
        case TmaSwizzle::B128_ATOM32_FLIP8: break;  // rejected by encodeTiled
        case TmaSwizzle::B128_ATOM64: return a ^ ((a >> 1) & 0x40);
    }
    return a;
}

namespace {
// Calls row(index of the box row, gmem row address, row is in bounds) for every
// row of the box.
template <class F>
void eachRow(const TensorMap& t, const i32* coord, F row) {
    u32 n[5] = {1, 1, 1, 1, 1};
    for (u32 i = 1; i < t.rank; i++) n[i] = (t.box[i] + t.elementStride[i] - 1) / t.elementStride[i];
    u32 index = 0;
    for (u32 e = 0; e < n[4]; e++)
        for (u32 d = 0; d < n[3]; d++)
            for (u32 c = 0; c < n[2]; c++)
                for (u32 b = 0; b < n[1]; b++) {
                    u32 at[5] = {0, b, c, d, e};
                    bool ok = true;
                    u64 addr = t.address;
                    for (u32 i = 1; i < t.rank; i++) {
                        i64 x = i64(coord[i]) + i64(at[i]) * t.elementStride[i];
                        ok &= x >= 0 && x <= i64(t.dim[i]);
                        addr += u64(x) * t.stride[i];
                    }
                    row(index++, addr, ok);
                }
}
struct RowSpan {
    u32 lo, hi;
};  // in-bounds elements of the box row
RowSpan innerSpan(const TensorMap& t, i32 x0) {
    i64 size = i64(t.dim[0]) + 1;
    i64 lo = std::clamp<i64>(-i64(x0), 0, t.box[0]), hi = std::clamp<i64>(size - x0, 0, t.box[0]);
    return {u32(lo), u32(std::max(lo, hi))};
}
void nanFill(const TensorMap& t, u8* p, u32 bytes) {
    if (t.type == TmaType::F16)
        for (u32 i = 0; i + 1 < bytes; i += 2) {
            u16 v = 0x7fff;
            std::memcpy(p + i, &v, 2);
        }
    else if (t.type == TmaType::BF16)
        for (u32 i = 0; i + 1 < bytes; i += 2) {
            u16 v = 0x7fff;
            std::memcpy(p + i, &v, 2);
        }
    else if (elementBits(t.type) == 32)
        for (u32 i = 0; i + 3 < bytes; i += 4) {
            u32 v = 0x7fffffff;
            std::memcpy(p + i, &v, 4);
        }
}
}  // namespace

void tmaLoadTile(Machine& m, const TensorMap& t, const i32* coord, Cta* dst, u32 smemAddr, const TileReads& reads) {
    auto source = [&](u64 a, u32 bytes) {
        const u8* p = m.global(nullptr, -1, a, bytes, false);
        if (reads) reads(a, bytes);
        return p;
    };
    u32 bits = elementBits(t.type), rowBytes = rowSmemBytes(t);
    RowSpan span = innerSpan(t, coord[0]);
    std::vector<u8> row(rowBytes);
    eachRow(t, coord, [&](u32 index, u64 rowAddr, bool ok) {
        std::fill(row.begin(), row.end(), 0);
        if (t.nanFill) nanFill(t, row.data(), rowBytes);
        if (ok && span.hi > span.lo) {
            if (t.elementStride[0] != 1) {
                u32 eb = bits / 8;
                for (u32 k = 0, x = 0; x < t.box[0]; x += t.elementStride[0], k++) {
                    if (x < span.lo || x >= span.hi) continue;
                    u64 a = rowAddr + u64(i64(coord[0]) + x) * eb;
                    std::memcpy(&row[k * eb], source(a, eb), eb);
                }
            } else if (!unpacked(t.type)) {
                u32 begin = span.lo * bits / 8, bytes = (span.hi - span.lo) * bits / 8;
                u64 a = rowAddr + u64((i64(coord[0]) + span.lo) * i64(bits) / 8);
                std::memcpy(&row[begin], source(a, bytes), bytes);
            } else {
                for (u32 x = span.lo; x < span.hi; x += 16) {  // 16 elements per slot
                    u32 bytes = 16 * bits / 8;
                    u64 a = rowAddr + u64((i64(coord[0]) + x) * i64(bits) / 8);
                    std::memcpy(&row[x], source(a, bytes), bytes);
                }
            }
        }
        u32 base = smemAddr + index * rowPitch(t);
        for (u32 k = 0; k < rowBytes; k += 16)
            std::memcpy(&dst->smem[tmaSwizzleOffset(t.swizzle, base + k)], &row[k], std::min(16u, rowBytes - k));
    });
}

std::vector<TileWrite> tmaGatherTile(Machine& m, const TensorMap& t, const i32* coord, Cta* src, u32 smemAddr) {
    (void)m;
    u32 bits = elementBits(t.type), rowBytes = rowSmemBytes(t);
    RowSpan span = innerSpan(t, coord[0]);
    std::vector<TileWrite> out;
    if (unpacked(t.type) || t.elementStride[0] != 1)
        throw EmuError("unsupported", "[unsupported] tensor store of this type or element stride");
    std::vector<u8> row(rowBytes);
    eachRow(t, coord, [&](u32 index, u64 rowAddr, bool ok) {
        if (!ok || span.hi <= span.lo) return;
        u32 base = smemAddr + index * rowPitch(t);
        for (u32 k = 0; k < rowBytes; k += 16)
            std::memcpy(&row[k], &src->smem[tmaSwizzleOffset(t.swizzle, base + k)], std::min(16u, rowBytes - k));
        // Elements beyond the tensor are left out by units of 16 bytes, as an H200 does: a row that ends within one is
        // written up to the unit's end.
        u32 begin = span.lo * bits / 8, bytes = std::min(alignUp(span.hi * bits / 8, 16), rowBytes) - begin;
        u64 a = rowAddr + u64((i64(coord[0]) + span.lo) * i64(bits) / 8);
        out.push_back({a, std::vector<u8>(row.begin() + begin, row.begin() + begin + bytes)});
    });
    return out;
}

// op: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; -1 plain store
void tmaReduce(Machine& m, const TensorMap& t, int op, const std::vector<TileWrite>& writes) {
    for (auto& wr : writes) {
        u8* p = m.global(nullptr, -1, wr.addr, u32(wr.data.size()), true);
        const u8* s = wr.data.data();
        size_t n = wr.data.size();
        if (op < 0) {
            std::memcpy(p, s, n);
            continue;
        }
        auto each = [&]<class T>(T, auto f) {
            for (size_t i = 0; i + sizeof(T) <= n; i += sizeof(T)) {
                T a, b;
                std::memcpy(&a, p + i, sizeof(T));
                std::memcpy(&b, s + i, sizeof(T));
                T r = f(a, b);
                std::memcpy(p + i, &r, sizeof(T));
            }
        };
        auto pick = [&](auto a, auto b) {
            return op == 1 ? std::min(a, b) : op == 2 ? std::max(a, b) : decltype(a)(a + b);
        };
        auto integer = [&](auto a, auto b) {
            return op == 3   ? decltype(a)(a & b)
                   : op == 4 ? decltype(a)(a | b)
                   : op == 5 ? decltype(a)(a ^ b)
                             : pick(a, b);
        };
        switch (t.type) {
            case TmaType::F32:
            case TmaType::F32_FTZ:
            case TmaType::TF32:
            case TmaType::TF32_FTZ: each(float(), pick); break;
            case TmaType::F64: each(double(), pick); break;
            case TmaType::BF16:
                each(u16(), [&](u16 a, u16 b) {
                    return floatToBf16(float(pick(double(bf16ToFloat(a)), double(bf16ToFloat(b)))));
                });
                break;
            case TmaType::F16:
                each(u16(),
                     [&](u16 a, u16 b) { return doubleToHalf(pick(double(halfToFloat(a)), double(halfToFloat(b)))); });
                break;
            case TmaType::U32: each(u32(), integer); break;
            case TmaType::S32: each(i32(), integer); break;
            case TmaType::U64: each(u64(), integer); break;
            case TmaType::S64: each(i64(), integer); break;
            default: throw EmuError("unsupported", "[unsupported] tensor reduction of this element type");
        }
    }
}

}  // namespace ptx_emulator
