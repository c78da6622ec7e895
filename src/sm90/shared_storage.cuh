// Shared memory of one CTA.
#pragma once

#include <type_traits>

#include "../device/ptx_mbarrier.cuh"
#include "../device/tile_scheduler.cuh"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

template <class Traits>
struct alignas(1024) SharedStorage {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kStages = kLayout.num_stages();

    // One stage of the ring. Swizzled tiles start on multiples of 1024 bytes.
    // K-major [block_rows][128 bytes of K], or MN-major [block_rows / 64][K of the stage][64 elements along MN].
    uint8_t rows[kStages][kLayout.row_tile_bytes()];
    uint8_t cols[kStages][kLayout.col_tile_bytes()];

    // BF16 result on its way to TMA, [consumer warpgroup][64-row part][box].
    uint8_t staging[kLayout.row_warpgroups()][kLayout.row_parts()][kLayout.staged_boxes()]
                   [kLayout.box_bytes()];

    // Scales of a stage, [K group][row or column].
    alignas(128) uint8_t row_scales[kStages][kLayout.row_scale_pitch() + (kLayout.row_scale_bytes() == 0)];
    alignas(128) uint8_t col_scales[kStages][kLayout.col_scale_pitch() + (kLayout.col_scale_bytes() == 0)];

    // Block scales, [chunk][block][K block].
    static constexpr int kBlockScales = kLayout.num_block_scales() + !kLayout.has_block_scales();
    alignas(16) float block_scales[kScaleChunks][kBlockScales][kScaleChunk];

    // Split K: FP32 parts of this CTA's slice from the other CTAs, [CTA][4-value group][consumer thread].
    float4 reduce[kLayout.reduce_bytes() / 16 + (kLayout.reduce_bytes() == 0)];

    // Sums of the warpgroups that help with K blocks, [helper][4-value group][consumer thread].
    float4 helper_sums[kLayout.helper_bytes() / 16 + (kLayout.helper_bytes() == 0)];

    ptx::Barrier full[kStages];
    ptx::Barrier empty[kStages];
    ptx::Barrier scales_full[kScaleChunks];
    ptx::Barrier scales_empty[kScaleChunks];
    ptx::Barrier reduce_full;
    ptx::Barrier reduce_empty;

    // M-grouped: tiles for all roles, and what is needed to find them. K-grouped: each group's part of K.
    struct Nothing {};
    using Groups = typename MGroupedScheduler<kLayout.row.block_m(), kLayout.row.block_n(), kLayout.row.swap_ab>::Storage;
    std::conditional_t<kLayout.has_work_queue(), Groups, Nothing> groups;
    std::conditional_t<kLayout.is_k_grouped(), typename Traits::KGroups::Storage, Nothing> k_groups;
};

}  // namespace deep_gemm::sm90
