// From a row's index to its kernel, in whichever shard that is.
#pragma once

#include <utility>

namespace deep_gemm {

// The kernel of a table's row: row i is in shard i % DG_NUM_SHARDS, where Shard<shard>::find(i) knows it.
template <template <int> class Shard, int... kShard>
const void* find_in_shards(int row, std::integer_sequence<int, kShard...>) {
    // Not static: g++ 12 makes one symbol of such arrays of all files, though their Shards are in unnamed namespaces.
    const void* (*const find[])(int) = {&Shard<kShard>::find...};
    return find[row % DG_NUM_SHARDS](row);
}

template <template <int> class Shard>
const void* find_in_shards(int row) {
    return find_in_shards<Shard>(row, std::make_integer_sequence<int, DG_NUM_SHARDS>());
}

}  // namespace deep_gemm
