// Tensor maps: a private 128-byte encoding of what cuTensorMapEncodeTiled takes,
// and the tile address generator shared by loads, stores and reductions.
#pragma once
#include "machine.hpp"

namespace ptx_emulator {

// Values match CUtensorMapDataType / CUtensorMapSwizzle of the CUDA driver API.
enum class TmaType : u8 {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    BF16,
    F32_FTZ,
    TF32,
    TF32_FTZ,
    U4_ALIGN8,
    U4_ALIGN16,
    U6_ALIGN16
};
enum class TmaSwizzle : u8 { None, B32, B64, B128, B128_ATOM32, B128_ATOM32_FLIP8, B128_ATOM64 };

struct TensorMap {
    u32 magic;
    TmaType type;
    u8 rank;
    TmaSwizzle swizzle;
    u8 interleave;
    u8 nanFill;
    u8 elementStride[5];
    u16 box[5];
    u32 dim[5];
    u64 address;
    u64 stride[5];  // bytes, of dimensions 1..4; stride[0] unused
    static constexpr u32 kMagic = 0x544d4150;
};
static_assert(sizeof(TensorMap) <= 128);

// Returns an error message, empty on success.
std::string encodeTiled(void* map, int type, u32 rank, u64 address, const u64* dims, const u64* strides, const u32* box,
                        const u32* elementStrides, int interleave, int swizzle, int l2promotion, int oobFill);

TensorMap readTensorMap(Warp& w, int lane, u64 genericAddress);

u32 tmaBoxBytes(const TensorMap& t);  // bytes the box occupies in shared memory, with padding between its rows
// piece(offset, bytes) for what a box at this offset has data in.
void tmaBoxPieces(const TensorMap& t, u32 offset, const std::function<void(u32, u32)>& piece);
// Whether a box that starts at this innermost coordinate starts on a multiple of 16 bytes.
bool tmaStartAligned(const TensorMap& t, i32 innermost);
u32 tmaTxBytes(const TensorMap& t);   // bytes reported to the mbarrier
u32 tmaSwizzleOffset(TmaSwizzle s, u32 smemAddress);

// One contiguous run of a box row: gmem address and smem address (unswizzled).
// reads(address, bytes) is told of each piece of global memory before it is read.
using TileReads = std::function<void(u64, u32)>;
void tmaLoadTile(Machine& m, const TensorMap& t, const i32* coord, Cta* dst, u32 smemAddr, const TileReads& reads);
// Gathers the in-bounds part of the tile from shared memory; apply() writes it.
struct TileWrite {
    u64 addr;
    std::vector<u8> data;
};
std::vector<TileWrite> tmaGatherTile(Machine& m, const TensorMap& t, const i32* coord, Cta* src, u32 smemAddr);
void tmaReduce(Machine& m, const TensorMap& t, int op, const std::vector<TileWrite>& writes);

}  // namespace ptx_emulator
