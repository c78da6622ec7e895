// A share of the table's kernels: rows DG_SHARD, DG_SHARD + DG_NUM_SHARDS, ... One object file is built per shard.
#include <utility>

#include "gemm_kernel.cuh"
#include "gemm_dispatch.h"

namespace deep_gemm::sm90 {

namespace {

template <int kRowIndex>
constexpr const void* kernel_if_mine() {
    if constexpr (kRowIndex % DG_NUM_SHARDS == DG_SHARD) {
        return reinterpret_cast<const void*>(&sm90_fp8_gemm<kRowIndex>);
    } else {
        return nullptr;
    }
}

template <int... kRowIndex>
const void* find(int row, std::integer_sequence<int, kRowIndex...>) {
    static const void* const kKernels[] = {kernel_if_mine<kRowIndex>()...};
    return kKernels[row];
}

}  // namespace

template <>
const void* gemm_kernel_in_shard<DG_SHARD>(int row) {
    return find(row, std::make_integer_sequence<int, kNumGemmRows>());
}

}  // namespace deep_gemm::sm90
