// From a row's index to its kernel, across the shards.
#pragma once

namespace deep_gemm::sm90 {

// Defined by shard kShard; null where the row belongs to another one. A missing shard does not link.
template <int kShard>
const void* mqa_kernel_in_shard(int row);

const void* mqa_metadata_kernel();

}  // namespace deep_gemm::sm90
