#include "selection_cache.h"

#include <array>
#include <cstddef>
#include <cstdint>

namespace deep_gemm {

namespace {

// All that selection may look at of a problem and its limits.
struct Key {
    const GemmRow* table;
    bool a_is_fp4, b_is_fp4, sfb_is_packed;
    int64_t m, n, k;
    int gran_m, gran_n, gran_k;
    OperandType operands;
    bool a_mn_major, b_mn_major;
    DataType d_type;
    bool has_c;
    int num_sms, block_m_multiple_of, block_n_multiple_of;
    Grouping grouping;
    GroupLayout layout;
    int64_t num_groups, expected_m;
    int group_alignment;

    bool operator==(const Key&) const = default;
};

struct Entry {
    Key key;
    Choice choice;
};

constexpr size_t kEntries = 256;

size_t slot_of(const Key& key) {
    const auto mix = [](uint64_t hash, int64_t value) { return (hash ^ value) * 0x9E3779B97F4A7C15u; };
    return mix(mix(mix(mix(0, key.expected_m), key.m), key.n), key.k) >> 56;
}
static_assert(kEntries == 1 << (64 - 56));

}  // namespace

Choice choose_row_cached(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits) {
    static thread_local std::array<Entry, kEntries> entries;  // all zero: no problem has M = 0
    const Key key = {rows.data(),
                     problem.a_is_fp4, problem.b_is_fp4, problem.sfb_is_packed,
                     problem.m,       problem.n,
                     problem.k,       problem.sfa.gran_mn,
                     problem.sfb.gran_mn, problem.gran_k,
                     problem.operands, problem.a_mn_major, problem.b_mn_major,
                     problem.d_type,  problem.c != nullptr,
                     limits.num_sms,  limits.block_m_multiple_of,
                     limits.block_n_multiple_of, grouping_of(problem),
                     problem.layout,  problem.num_groups,
                     problem.expected_m, problem.group_alignment};
    Entry& entry = entries[slot_of(key)];
    if (entry.key != key) entry = {key, choose_row(rows, problem, limits)};
    return entry.choice;
}

}  // namespace deep_gemm
