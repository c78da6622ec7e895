// A share of the table's kernels: rows DG_SHARD, DG_SHARD + DG_NUM_SHARDS, ... One object file is built per shard.
#include <utility>

#include "gemm_kernel.cuh"
#include "gemm_dispatch.h"

namespace deep_gemm::sm100 {

namespace {

template <int kRowIndex>
constexpr const void* kernel_if_mine() {
    if constexpr (kRowIndex % DG_NUM_SHARDS == DG_SHARD) {
        // Here rather than in the kernel: the compiler says this, with the row's index, and nothing that follows from it.
        constexpr bool kValid = invalid_reason(kGemmRows[kRowIndex]) == nullptr;
        static_assert(kValid, "src/sm100/gemm_instances.h has a row that cannot be compiled: "
                              "see invalid_reason() in gemm_traits.h");
        if constexpr (kValid) return reinterpret_cast<const void*>(&sm100_gemm<kRowIndex>);
    }
    return nullptr;
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

}  // namespace deep_gemm::sm100
