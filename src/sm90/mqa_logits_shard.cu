// A share of the table's kernels: rows DG_SHARD, DG_SHARD + DG_NUM_SHARDS, ... One object file is built per shard.
#include <utility>

#include "mqa_logits_dispatch.h"
#include "mqa_logits_kernel.cuh"

namespace deep_gemm::sm90 {

namespace {

template <int kRowIndex>
constexpr const void* kernel_if_mine() {
    if constexpr (kRowIndex % DG_NUM_SHARDS == DG_SHARD) {
        constexpr bool kValid = invalid_reason(kMqaRows[kRowIndex]) == nullptr;
        static_assert(kValid, "src/sm90/mqa_logits_instances.h has a row that cannot be compiled: "
                              "see invalid_reason() in mqa_logits_traits.h");
        if constexpr (kValid) return reinterpret_cast<const void*>(&sm90_fp8_mqa_logits<kRowIndex>);
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
const void* mqa_kernel_in_shard<DG_SHARD>(int row) {
    return find(row, std::make_integer_sequence<int, kNumMqaRows>());
}

}  // namespace deep_gemm::sm90
