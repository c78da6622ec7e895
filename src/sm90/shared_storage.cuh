// Shared memory of one CTA.
#pragma once

#include "../device/ptx_mbarrier.cuh"
#include "gemm_traits.h"

namespace deep_gemm::sm90 {

template <class Traits>
struct alignas(1024) SharedStorage {
    static constexpr GemmLayout kLayout = Traits::kLayout;
    static constexpr int kStages = kLayout.num_stages();

    // One stage of the ring. Swizzled tiles start on multiples of 1024 bytes.
    uint8_t rows[kStages][kLayout.row_tile_bytes()];  // FP8 [block_rows][128]
    uint8_t cols[kStages][kLayout.col_tile_bytes()];  // FP8 [block_cols][128]

    // BF16 result on its way to TMA, a part for each consumer warpgroup.
    uint8_t staging[kLayout.num_consumer_warpgroups()][kLayout.staging_bytes() / kLayout.num_consumer_warpgroups()];

    // Split K: FP32 parts of this CTA's slice, [source CTA][4-value group][consumer thread].
    float4 reduce[kLayout.reduce_bytes() / 16 + (kLayout.reduce_bytes() == 0)];

    float row_scales[kStages][kLayout.k_groups()][align_up(kLayout.row_scales(), 4)];
    float col_scales[kStages][kLayout.k_groups()][align_up(kLayout.col_scales(), 4)];

    ptx::Barrier full[kStages];
    ptx::Barrier empty[kStages];
    ptx::Barrier reduce_full;
    ptx::Barrier reduce_empty;
};

}  // namespace deep_gemm::sm90
