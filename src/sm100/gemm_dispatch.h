// From a row's index to its kernel, across the shards.
#pragma once

namespace deep_gemm::sm100 {

// Defined by shard kShard; null where the row belongs to another one. A missing shard does not link.
template <int kShard>
const void* gemm_kernel_in_shard(int row);

}  // namespace deep_gemm::sm100
