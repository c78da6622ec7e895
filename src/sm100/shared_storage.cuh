// Shared memory of one CTA.
#pragma once

#include <type_traits>

#include "../device/ptx_mbarrier.cuh"
#include "../device/tile_scheduler.cuh"
#include "gemm_traits.h"

namespace deep_gemm::sm100 {

template <class Traits>
struct alignas(1024) SharedStorage {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kStages = kLayout.num_stages();

    // One stage of the ring. Swizzled tiles start on multiples of 1024 bytes.
    uint8_t rows[kStages][kLayout.row_tile_bytes()];
    uint8_t cols[kStages][kLayout.col_tile_bytes()];

    // The result on its way to memory, [epilogue warp][buffer]; a box of 128 bytes a row is swizzled over 1024.
    static constexpr int kBoxBytes = kLayout.row.swap_ab ? 16 : kStoreBufferBytes;
    alignas(1024) uint8_t boxes[kLayout.row.swap_ab ? 1 : kEpilogueWarps][kStoreBuffers][kBoxBytes];

    // Packed UE8M0 words, a ring of its own: those of rows, then those of columns.
    alignas(128) uint32_t scales[kStages][kLayout.scaled() ? kLayout.scale_words() : 4];

    // Split K: FP32 parts of this CTA's slice, [source CTA][epilogue warp][4 columns][lane].
    float4 reduce[kLayout.reduce_bytes() / 16 + (kLayout.reduce_bytes() == 0)];

    ptx::Barrier full[kStages];
    ptx::Barrier empty[kStages];
    ptx::Barrier scales_full[kStages];
    ptx::Barrier scales_ready[kStages];
    ptx::Barrier scales_empty[kStages];
    ptx::Barrier ends_full[kStages];
    ptx::Barrier accumulator_full[kAccumulators];
    ptx::Barrier accumulator_empty[kAccumulators];
    ptx::Barrier reduce_full[kEpilogueWarps];
    ptx::Barrier reduce_empty[kEpilogueWarps];
    uint32_t tensor_memory;

    // M-grouped: tiles for all roles, and what is needed to find them. K-grouped: each group's part of K.
    struct Nothing {};
    std::conditional_t<kLayout.is_m_grouped(), typename Traits::MGroups::Storage, Nothing> groups;
    std::conditional_t<kLayout.is_k_grouped(), typename Traits::KGroups::Storage, Nothing> k_groups;
};

}  // namespace deep_gemm::sm100
