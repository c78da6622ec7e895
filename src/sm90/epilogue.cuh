// From FP32 accumulators to D: optional C or bias, one rounding, then TMA stores or predicated stores.
#pragma once

#include <cuda_bf16.h>

#include "../device/gemm_params.h"
#include "../device/ptx_memory.cuh"
#include "../device/ptx_tma.cuh"
#include "../device/tile_scheduler.cuh"
#include "gemm_traits.h"
#include "wgmma.cuh"

namespace deep_gemm::sm90 {

// Stores kStoreCols columns of a consumer warpgroup's parts of 64 rows. Accumulator layout: wgmma.cuh.
template <class Traits>
class Epilogue {
public:
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr bool kSwapAB = kLayout.row.swap_ab;
    static constexpr int kRowParts = kLayout.row_parts();
    static constexpr int kStoreCols = kLayout.store_cols();
    static constexpr int kColGroups = kStoreCols / 8;
    static constexpr int kBoxCols = kLayout.box_cols();
    static constexpr int kBoxBytes = kLayout.box_bytes();
    static constexpr int kBoxes = kLayout.boxes_per_part();
    static constexpr int kStagedBoxes = kLayout.staged_boxes();  // of each part
    static constexpr bool kHasGroups = kLayout.has_groups() || kLayout.is_k_grouped();
    static constexpr bool kMGrouped = kLayout.row.grouping == Grouping::kMGrouped;
    static constexpr bool kHasHeads = kLayout.row.grouping == Grouping::kBatched;
    using Staging = uint8_t[kRowParts][kStagedBoxes][kBoxBytes];

    // `rows`, `col`: the parts' first rows and their first column, in rows and columns of the instruction.
    __device__ __forceinline__ static void store(const GemmParams& params, const WorkTile& work, Staging& staging,
                                                 int barrier_id, const int (&rows)[kRowParts], int col, int thread,
                                                 float (&values)[kRowParts][kColGroups * 4]) {
        const int lane = thread % 32;
        const int thread_row = thread / 32 * 16 + lane / 4;
        const int thread_col = col + lane % 4 * 2;
        if constexpr (kMGrouped) {
            if (work.group_end < work.store_end) {
#pragma unroll
                for (int part = 0; part < kRowParts; ++part) {
                    clear_padding(work.group_end, rows[part] + thread_row, thread_col, values[part]);
                }
            }
        } else if (params.c != nullptr) {
#pragma unroll
            for (int part = 0; part < kRowParts; ++part) {
                if (params.d_is_float) {
                    add_c<float>(params, work, rows[part] + thread_row, thread_col, values[part]);
                } else {
                    add_c<__nv_bfloat16>(params, work, rows[part] + thread_row, thread_col, values[part]);
                }
            }
        }
        if constexpr (kLayout.stages_float()) {
            if (params.output_mode != kStoreDirect && params.d_is_float) {
                store_tma<float>(params, work, staging, barrier_id, rows, col, thread, values);
                return;
            }
        }
        if (params.output_mode == kStoreTma) {
            store_tma<__nv_bfloat16>(params, work, staging, barrier_id, rows, col, thread, values);
            return;
        }
#pragma unroll
        for (int part = 0; part < kRowParts; ++part) {
            if (params.d_is_float) {
                store_direct<float>(params, work, rows[part] + thread_row, thread_col, values[part]);
            } else {
                store_direct<__nv_bfloat16>(params, work, rows[part] + thread_row, thread_col, values[part]);
            }
        }
    }

private:
    // The group's part of C or D.
    template <class Element>
    __device__ __forceinline__ static Element* of_group(Element* matrix, int64_t group_stride, const WorkTile& work) {
        if constexpr (kHasGroups) return matrix + work.token_group * group_stride;
        return matrix;
    }

    // Where the rows of D end that this tile may store.
    __device__ __forceinline__ static int end_of_rows(const GemmParams& params, const WorkTile& work) {
        if constexpr (kMGrouped) return work.store_end;
        return params.m;
    }

    // Where a column of the product lies in D.
    __device__ __forceinline__ static int d_col(const GemmParams& params, int col) {
        if constexpr (kHasHeads) return column_of_result(params.heads, col);
        return col;
    }

    // From a column of the product to the next one, in D.
    __device__ __forceinline__ static int d_distance(const GemmParams& params, int col) {
        if constexpr (kHasHeads) return d_col(params, col + 1) - d_col(params, col);
        return 1;
    }

    // Boxes of FP32 have half the columns of BF16 ones.
    template <class Element>
    __device__ __forceinline__ static void store_tma(const GemmParams& params, const WorkTile& work, Staging& staging,
                                                     int barrier_id, const int (&rows)[kRowParts], int col, int thread,
                                                     const float (&values)[kRowParts][kColGroups * 4]) {
        constexpr int kElementBoxes = kBoxes * static_cast<int>(sizeof(Element)) / 2;
        constexpr int kElementCols = kBoxCols * 2 / static_cast<int>(sizeof(Element));
#pragma unroll
        for (int first_box = 0; first_box < kElementBoxes; first_box += kStagedBoxes) {
            // The staging memory is free once the stores before, often the previous tile's, have read it.
            if (thread == 0) ptx::tma_store_wait_read<0>();
            ptx::named_barrier_sync(barrier_id, 128);
#pragma unroll
            for (int part = 0; part < kRowParts; ++part) {
                if constexpr (kSwapAB) {
                    stage_transposed(staging[part][0], thread, values[part]);
                } else if constexpr (sizeof(Element) == 4) {
                    stage_float(staging[part][0], first_box, thread, values[part]);
                } else {
                    stage(staging[part][0], first_box, thread, values[part]);
                }
            }
            ptx::fence_async_shared();
            ptx::named_barrier_sync(barrier_id, 128);
            const auto for_each_box = [&](auto&& visit) {
#pragma unroll
                for (int part = 0; part < kRowParts; ++part) {
#pragma unroll
                    for (int box = 0; box < kStagedBoxes; ++box) {
                        const int first_col = kSwapAB ? rows[part] : col + (first_box + box) * kElementCols;
                        visit(staging[part][box], kSwapAB ? col : rows[part], first_col);
                    }
                }
            };
            if (ends_inside(params, work)) {
                for_each_box([&](const uint8_t* box, int row, int first_col) {
                    copy_box(params, work, box, row, first_col, thread);
                });
            } else if (thread == 0) {
                for_each_box([&](const uint8_t* box, int row, int first_col) {
                    if constexpr (!kHasGroups) {
                        ptx::tma_store_2d(params.d_map, box, first_col, row);
                    } else if (kLayout.stages_float() && params.output_mode == kAddTma) {
                        ptx::tma_add_3d(params.d_map, box, first_col, row, work.token_group);
                    } else {
                        ptx::tma_store_3d(params.d_map, box, d_col(params, first_col), row, work.token_group);
                    }
                });
                ptx::tma_store_commit();
            }
        }
    }

    // Boxes of 64 rows and 32 columns of FP32, a row of 128 bytes swizzled as TMA expects it. A thread has two columns of
    // each eight; odd rows write the eights in another order, so that the rows of half a warp lie in different banks.
    __device__ __forceinline__ static void stage_float(uint8_t* boxes, int first_box, int thread,
                                                       const float (&values)[kColGroups * 4]) {
        const int lane = thread % 32;
        const int d_row = thread / 32 * 16 + lane / 4;
        const bool is_odd = d_row % 2 != 0;
        uint8_t* row = boxes + d_row * 128 + lane % 2 * 8;
#pragma unroll
        for (int i = 0; i < kStagedBoxes * 4; ++i) {
            const int box = i / 4, turn = i % 4;
            const float* low = values + ((first_box + box) * 4 + turn % 2) * 4;  // of two eights, two apart
            const float* high = low + 2 * 4;
            const bool is_high = is_odd ^ (turn >= 2);
            const int chunk = ((turn % 2 + 2 * is_high) * 2 + lane % 4 / 2) ^ (d_row % 8);
            auto* slot = reinterpret_cast<float2*>(row + box * kBoxBytes + chunk * 16);
            slot[0] = is_high ? make_float2(high[0], high[1]) : make_float2(low[0], low[1]);
            slot[8 * 128 / sizeof(float2)] = is_high ? make_float2(high[2], high[3]) : make_float2(low[2], low[3]);
        }
    }

    // Whether the tile's last rows are the next group's, which TMA would overwrite. It leaves out what lies outside of D.
    __device__ __forceinline__ static bool ends_inside(const GemmParams& params, const WorkTile& work) {
        if constexpr (!kMGrouped) return false;
        return work.store_end < min((kSwapAB ? work.col : work.row) + kLayout.row.block_m(), params.m);
    }

    // A staged box, whose first element is (row, col) of the product: the threads copy its rows of this group, each the
    // same 16 bytes of several rows.
    __device__ __forceinline__ static void copy_box(const GemmParams& params, const WorkTile& work, const uint8_t* box,
                                                    int row, int col, int thread) {
        constexpr int kRowBytes = kBoxCols * 2;
        constexpr int kChunks = kRowBytes / 16;
        constexpr int kRows = 128 / kChunks;  // that all threads copy at once
        constexpr int kPasses = (kLayout.box_rows() + kRows - 1) / kRows, kAtOnce = kPasses < 4 ? kPasses : 4;
        const int count = min(work.store_end - row, kLayout.box_rows());
        const int chunk = thread % kChunks, first = col + chunk * 8;
        const bool is_whole = first + 8 <= params.n;
        auto* d = of_group(static_cast<__nv_bfloat16*>(params.d), params.d_group_stride, work) + first;
#pragma unroll 1
        for (int begin = thread / kChunks; begin < count; begin += kAtOnce * kRows) {
            uint4 values[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int box_row = min(begin + i * kRows, kLayout.box_rows() - 1);
                const int swizzle = box_row / (128 / kRowBytes) % kChunks;
                values[i] = *reinterpret_cast<const uint4*>(box + box_row * kRowBytes + (chunk ^ swizzle) * 16);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int box_row = begin + i * kRows;
                if (box_row >= count) break;
                __nv_bfloat16* destination = d + (row + box_row) * params.d_stride;
                if (is_whole) {
                    *reinterpret_cast<uint4*>(destination) = values[i];
                } else {
                    const uint32_t words[] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
                    for (int element = 0; element < 8; ++element) {
                        if (first + element < params.n) {
                            destination[element] = __ushort_as_bfloat16(words[element / 2] >> element % 2 * 16 & 0xffff);
                        }
                    }
                }
            }
        }
    }

    // Rows of D from `end` on are padding.
    __device__ __forceinline__ static void clear_padding(int end, int thread_row, int thread_col,
                                                         float (&values)[kColGroups * 4]) {
        for_each_pair(thread_row, thread_col, [&](int i, int row, int col) {
            if ((kSwapAB ? col : row) >= end) values[i] = 0;
            if ((kSwapAB ? col + 1 : row) >= end) values[i + 1] = 0;
        });
    }

    // Boxes of 64 rows and kBoxCols columns, swizzled as TMA expects it for its row of kBoxCols * 2 bytes.
    __device__ __forceinline__ static void stage(uint8_t* boxes, int first_box, int thread,
                                                 const float (&values)[kColGroups * 4]) {
        constexpr int kRowBytes = kBoxCols * 2;
        const int lane = thread % 32;
        const int d_row = thread / 32 * 16 + lane % 16;
        const int swizzle = d_row / (128 / kRowBytes) % (kRowBytes / 16);
        const uint32_t row_address = ptx::smem_address(boxes) + d_row * kRowBytes;
#pragma unroll
        for (int i = 0; i < kStagedBoxes * kBoxCols / 8; i += 2) {
            const int j = first_box * (kBoxCols / 8) + i;
            const int box = i * 8 / kBoxCols;
            const int chunk = (j % (kBoxCols / 8) + lane / 16) ^ swizzle;
            ptx::stmatrix_x4(row_address + box * kBoxBytes + chunk * 16, pack(values, j, 0), pack(values, j, 2),
                             pack(values, j + 1, 0), pack(values, j + 1, 2));
        }
    }

    // With swapped operands the 64 x kStoreCols values are kStoreCols rows and 64 columns of D: transposed 8x8 matrices.
    __device__ __forceinline__ static void stage_transposed(uint8_t* box, int thread,
                                                            const float (&values)[kColGroups * 4]) {
        const int lane = thread % 32;
        const int chunk = thread / 32 * 2 + lane / 8 % 2;  // 16 bytes: 8 of this warp's 16 columns of D
        const uint32_t base = ptx::smem_address(box);
#pragma unroll
        for (int j = 0; j < kColGroups; j += 2) {
            const int d_row = (j + lane / 16) * 8 + lane % 8;
            const uint32_t address = base + d_row * 128 + ((chunk ^ (d_row % 8)) * 16);
            if (j + 1 < kColGroups) {
                ptx::stmatrix_x4_transposed(address, pack(values, j, 0), pack(values, j, 2), pack(values, j + 1, 0),
                                            pack(values, j + 1, 2));
            } else {
                ptx::stmatrix_x2_transposed(address, pack(values, j, 0), pack(values, j, 2));
            }
        }
    }

    __device__ __forceinline__ static uint32_t pack(const float (&values)[kColGroups * 4], int j, int first) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[4 * j + first], values[4 * j + first + 1]);
        return reinterpret_cast<const uint32_t&>(pair);
    }

    __device__ __forceinline__ static float to_float(float value) { return value; }
    __device__ __forceinline__ static float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

    // BF16 products have no totals beside the accumulators.
    __device__ __forceinline__ static float for_vector(const GemmParams& params, float value) {
        if constexpr (kLayout.is_bf16()) return value;
        return in_another_register(value, params.zero);
    }

    template <class Element>
    struct alignas(2 * sizeof(Element)) Pair {
        Element x, y;
    };

    // Calls visit(index of the first of two values, row, column) for this thread's pairs of neighbouring columns.
    template <class Visit>
    __device__ __forceinline__ static void for_each_pair(int thread_row, int thread_col, Visit&& visit) {
#pragma unroll
        for (int j = 0; j < kColGroups; ++j) {
            visit(4 * j, thread_row, thread_col + 8 * j);
            visit(4 * j + 2, thread_row + 8, thread_col + 8 * j);
        }
    }

    template <class Element>
    __device__ __forceinline__ static void add_c(const GemmParams& params, const WorkTile& work, int thread_row,
                                                 int thread_col, float (&values)[kColGroups * 4]) {
        const Element* c = of_group(static_cast<const Element*>(params.c), params.c_group_stride, work);
        for_each_pair(thread_row, thread_col, [&](int i, int row, int col) {
            if constexpr (kSwapAB) {
                if (row >= params.n) return;
                if (col < params.m) values[i] += to_float(c[col * params.c_stride + row]);
                if (col + 1 < params.m) values[i + 1] += to_float(c[(col + 1) * params.c_stride + row]);
            } else {
                if (row >= params.m) return;
                const Element* source = c + row * params.c_stride + col;
                if (params.d_pairs && col + 1 < params.n) {
                    const auto pair = *reinterpret_cast<const Pair<Element>*>(source);
                    values[i] += to_float(pair.x);
                    values[i + 1] += to_float(pair.y);
                } else {
                    if (col < params.n) values[i] += to_float(source[0]);
                    if (col + 1 < params.n) values[i + 1] += to_float(source[1]);
                }
            }
        });
    }

    template <class Element>
    __device__ __forceinline__ static void store_direct(const GemmParams& params, const WorkTile& work, int thread_row,
                                                        int thread_col, const float (&values)[kColGroups * 4]) {
        Element* d = of_group(static_cast<Element*>(params.d), params.d_group_stride, work);
        for_each_pair(thread_row, thread_col, [&](int i, int row, int col) {
            if constexpr (kSwapAB) {
                if (row >= params.n) return;
                const int d_row = d_col(params, row);
                if (col < end_of_rows(params, work)) d[col * params.d_stride + d_row] = static_cast<Element>(values[i]);
                if (col + 1 < end_of_rows(params, work)) {
                    d[(col + 1) * params.d_stride + d_row] = static_cast<Element>(values[i + 1]);
                }
            } else {
                if (row >= end_of_rows(params, work)) return;
                Element* destination = d + row * params.d_stride + d_col(params, col);
                const Pair<Element> pair{static_cast<Element>(for_vector(params, values[i])),
                                         static_cast<Element>(for_vector(params, values[i + 1]))};
                if (params.d_pairs && col + 1 < params.n) {
                    *reinterpret_cast<Pair<Element>*>(destination) = pair;
                } else {
                    if (col < params.n) destination[0] = pair.x;
                    if (col + 1 < params.n) destination[d_distance(params, col)] = pair.y;
                }
            }
        });
    }
};

}  // namespace deep_gemm::sm90
