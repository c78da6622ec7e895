// A GEMM, or a group of them, as the kernels see it: D[m, n] = sum_k A[m, k] * B[n, k] (+ C).
#pragma once

#include <cstdint>

#include "gemm_row.h"

namespace deep_gemm {

enum class DataType : int { kBFloat16 = 0, kFloat32 = 1 };

inline int size_of(DataType type) { return type == DataType::kBFloat16 ? 2 : 4; }

// What `group_layout`, int32 on the device, says of the groups. The host cannot check it: kernels clamp what they read, so
// that a wrong one costs wrong values, never memory outside the tensors.
enum class GroupLayout : int {
    kNone = 0,     // dense, batched
    kIndices = 1,  // [M]: the group of each row, or none where it is outside [0, G). M-grouped
    kPsum = 2,     // [G]: where each group ends; the next starts there, rounded up to group_alignment. M-grouped, k-grouped
    kOffsets = 3,  // [G]: where each group ends and the next one starts. M-grouped, k-grouped
    kMasked = 4,   // [G]: rows of each group that count, of A [G, M, K] and D [G, M, N]. M-grouped
    kSizes = 5,    // [G]: K of each group. K-grouped
};

// FP32 scale factors: the scale of row i and K group g is data[(i / gran_mn) * stride_mn + g * stride_k], further groups'
// are stride_group apart. Scales per row must be as TMA reads them: stride_mn 1, stride_k (and stride_group) a multiple of
// 4, data on a multiple of 16 bytes. Scales per block of 128 may have any strides in the recipe 1, 128, 128, and are
// otherwise repeated per row by the caller.
//
// SM100 takes packed UE8M0 words (int32) per row in their place, four K groups each: word (i, g / 4) is at
// i * stride_mn + (g / 4) * stride_k.
struct ScaleTensor {
    const float* data = nullptr;
    int64_t stride_mn = 0;     // elements
    int64_t stride_k = 0;      // elements
    int gran_mn = 1;           // 1 or 128
    int64_t stride_group = 0;  // elements; where each group has its own
};

struct GemmProblem {
    // K-grouped: k is that of all groups together. There BF16 operands are MN-major, groups as they lie; in K-major FP8 ones
    // each group starts on a multiple of 128 of K, with zeros behind its end, and k, a multiple of 128, counts them: 128 for
    // each row of scales. SM100 takes FP8 MN-major as BF16, too, with k / 128 + groups rows of scales, rounded up, that there
    // is room for. Masked, batched, summed: m and k are those of one group.
    int64_t m = 0, n = 0, k = 0;
    const void* a = nullptr;  // [m, k], or [k, m] where a_mn_major
    const void* b = nullptr;  // [n, k], or [k, n] where b_mn_major
    int64_t a_stride = 0;     // elements between rows, as stored
    int64_t b_stride = 0;
    ScaleTensor sfa, sfb;
    int gran_k = 128;         // 128 or 32
    void* d = nullptr;        // [m, n]
    int64_t d_stride = 0;     // elements between rows
    DataType d_type = DataType::kBFloat16;
    const void* c = nullptr;  // [m, n] with c_stride, or [n] with c_stride 0; of type d_type; may be d
    int64_t c_stride = 0;

    OperandType operands = OperandType::kFP8;
    bool a_mn_major = false;  // BF16, and FP8 on SM100; SM90's FP8 operands are K-major
    bool b_mn_major = false;

    Grouping grouping = Grouping::kDense;
    int64_t num_groups = 1;
    int64_t first_group = 0;     // k-grouped: the first that is wanted; those before it only have their part of K
    int64_t a_group_stride = 0;  // elements between groups, where each has its own A: masked, batched, summed
    int64_t b_group_stride = 0;  // ... its own B: m-grouped, batched, summed
    int64_t d_group_stride = 0;  // ... its own D (and C): masked, batched, k-grouped
    int64_t c_group_stride = 0;
    GroupLayout layout = GroupLayout::kNone;
    const int32_t* group_layout = nullptr;
    int group_alignment = 1;     // rows, of kIndices and kPsum
    int64_t expected_m = 0;      // rows of a group that the caller expects, for selection; 0: m / num_groups
    bool zero_padding = false;   // m-grouped: rows of D that belong to no group are set to zero, otherwise left alone

    // Columns of D: 0 none; otherwise each head's `head_left + head_right` columns of the product are written around
    // `head_mid` columns that are left alone.
    int head_left = 0, head_mid = 0, head_right = 0;

    // Packed E2M1 pairs, K-major, in place of FP8; strides count elements. SM100: K is a multiple of 128, data and strides of
    // 32 bytes. SM90: B alone, whose scales are per 32 of K, while A's gran_k may be 128 where those are packed.
    bool a_is_fp4 = false, b_is_fp4 = false;
    // SM90 with FP4: `sfb` are packed UE8M0 words as SM100 takes them; K is a multiple of 128. Then `operands` may be kBF16, A in
    // the order of cast/bf16_tokens.cu: gran_k 128, or 32 where A has no scales.
    bool sfb_is_packed = false;
    // SM90 with FP4: not all of D, but columns of those blocks of 128 rows of B alone where one is set, if any is:
    // [groups, ceil(n / 128), k / 128], then zeros up to a multiple of 16 bytes. On the device, 16-byte aligned.
    const uint8_t* blocks_to_redo = nullptr;
};

}  // namespace deep_gemm
