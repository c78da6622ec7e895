// Transposition of one 128 x 128 tile of 8-bit elements by a CTA of 256 threads.
//
// Warp w reads rows 16w .. 16w + 15, each lane 4 bytes (4 columns) of every row, so that a warp-wide load is 128
// contiguous bytes and needs 4-byte alignment only. 4 x 4 byte transpositions in registers give each lane 16 consecutive
// rows of 4 columns, which it writes to shared memory as 16 bytes a column. Output rows of 128 bytes are then read back 16
// bytes a thread.
//
// Shared memory: column c is 128 bytes at 128 c; its 16-byte chunk i is at place i ^ ((c / 4) % 8). Both the write (8
// lanes: 8 values of c / 4, one chunk) and the read (8 lanes: one column, 8 chunks) then touch all 32 banks once.
#pragma once

#include <cstdint>

#include "cast/memory.cuh"

namespace deep_gemm::cast {

inline constexpr int kTile = 128;
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kRowsPerWarp = kTile / kWarps;
// in[i] holds columns 0..3 of row i, out[j] rows 0..3 of column j.
__device__ __forceinline__ void transpose_4x4(const uint32_t (&in)[4], uint32_t (&out)[4]) {
    const uint32_t a = __byte_perm(in[0], in[1], 0x5140), b = __byte_perm(in[2], in[3], 0x5140);  // columns 0 and 1
    const uint32_t c = __byte_perm(in[0], in[1], 0x7362), d = __byte_perm(in[2], in[3], 0x7362);  // columns 2 and 3
    out[0] = __byte_perm(a, b, 0x5410), out[1] = __byte_perm(a, b, 0x7632);
    out[2] = __byte_perm(c, d, 0x5410), out[3] = __byte_perm(c, d, 0x7632);
}

// The first `valid` bytes at p, one by one; the others are 0.
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* p, int64_t valid) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < valid) word |= load_1(p + i) << (8 * i);
    return word;
}

using TransposeTile = uint4[kTile][kTile / 16];  // [column][rows], swizzled

// Transposes a tile of a matrix with rows of x_stride bytes, by all of a CTA: out[c, r] = x[r, c] for the `cols` columns
// of the tile, which are columns col_0 and on of rows that end before col_end. Of its rows the first `rows` exist; those
// up to `out_rows` are written as zeros. x and out point to the tile's first element.
//
// kInAligned: x and its stride are multiples of 4 bytes. kOutAligned: out and its stride are multiples of 16 bytes.
template <bool kInAligned, bool kOutAligned>
__device__ __forceinline__ void transpose_tile(TransposeTile& tile, const uint8_t* x, int64_t x_stride, int rows,
                                               int cols, int64_t col_0, int64_t col_end, uint8_t* out,
                                               int64_t out_stride, int out_rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp * kRowsPerWarp, col = lane * 4;
    x += row * x_stride + col;
    uint32_t words[kRowsPerWarp];
    if constexpr (kInAligned) {
        if (row + kRowsPerWarp <= rows && col + 4 <= cols) {
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) words[i] = load_4(x + i * x_stride);
        } else {
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) {
                words[i] = 0;
                if (row + i < rows && col + 4 <= cols)
                    words[i] = load_4(x + i * x_stride);
                else if (row + i < rows)
                    words[i] = load_bytes(x + i * x_stride, cols - col);
            }
        }
    } else {
        // Two aligned words around the four bytes where both lie inside the row, else byte by byte.
        uint32_t high[kRowsPerWarp];
        const uint32_t shift_0 = reinterpret_cast<uintptr_t>(x) & 3, shift_step = x_stride & 3;
        const int64_t before = col_0 + col, valid = col_end - before;
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
            const int shift = (shift_0 + i * shift_step) & 3;
            const uint8_t* p = x + i * x_stride;
            words[i] = high[i] = 0;
            if (row + i < rows && shift <= before && 8 - shift <= valid) {
                words[i] = load_4(p - shift);
                high[i] = load_4(p - shift + 4);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
            const int shift = (shift_0 + i * shift_step) & 3;
            words[i] = __funnelshift_r(words[i], high[i], 8 * shift);
            if (row + i < rows && !(shift <= before && 8 - shift <= valid))
                words[i] = load_bytes(x + i * x_stride, valid);
        }
    }
    uint4 columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t in[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        uint32_t out[4];
        transpose_4x4(in, out);
#pragma unroll
        for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(&columns[j])[i] = out[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[col + j][warp ^ (lane % 8)] = columns[j];
    __syncthreads();

    if constexpr (kOutAligned) {
        const int chunk = threadIdx.x % 8;
        const int valid = out_rows - chunk * 16;
#pragma unroll
        for (int i = 0; i < kTile * 8 / kThreads; ++i) {
            const int c = threadIdx.x / 8 + i * (kThreads / 8);
            if (c >= cols || valid <= 0) continue;
            const uint4 value = tile[c][chunk ^ (c / 4 % 8)];
            uint8_t* p = out + c * out_stride + chunk * 16;
            if (valid >= 16) {
                *reinterpret_cast<uint4*>(p) = value;
            } else {
                const uint32_t part[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int b = 0; b < 15; ++b)
                    if (b < valid) p[b] = static_cast<uint8_t>(part[b / 4] >> (8 * (b % 4)));
            }
        }
    } else {
        // A warp writes a column's 128 bytes as the aligned words that lie inside, plus the bytes at both ends. Lane l
        // has the word that starts at byte 4 l - shift of the column's 128 bytes; lane 31 adds the one after the last.
        for (int c = warp; c < cols; c += kWarps) {
            uint8_t* p = out + c * out_stride;
            const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(p) & 3);
            const uint32_t* column = reinterpret_cast<const uint32_t*>(&tile[c][0]);
            const int swizzle = c / 4 % 8 * 4;
            const uint32_t own = column[lane ^ swizzle];  // bytes 4 lane .. 4 lane + 3
            const uint32_t previous = __shfl_up_sync(0xffffffff, own, 1);
            const uint32_t word = shift == 0 ? own : __funnelshift_l(previous, own, 8 * shift);
            const int begin = 4 * lane - shift;
            if (begin >= 0 && begin + 4 <= out_rows) {
                *reinterpret_cast<uint32_t*>(p + begin) = word;
            } else {
#pragma unroll
                for (int b = 0; b < 4; ++b)
                    if (begin + b >= 0 && begin + b < out_rows) p[begin + b] = static_cast<uint8_t>(word >> (8 * b));
            }
            if (lane == 31) {
#pragma unroll
                for (int b = 0; b < 3; ++b)
                    if (b < shift && begin + 4 + b < out_rows)
                        p[begin + 4 + b] = static_cast<uint8_t>(own >> (8 * (4 - shift + b)));
            }
        }
    }
}

}  // namespace deep_gemm::cast
