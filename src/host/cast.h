// Launch functions of the casts, transpositions and scale-factor layout kernels. Every one enqueues at most one kernel
// on `stream` and returns the launch's error; empty problems launch nothing. Pointers are device memory. Strides and
// sizes are in elements. `pdl` asks for programmatic dependent launch behind the previous kernel of the stream.
//
// Numerics of the casts (all IEEE float32, no fast-math), bit for bit those of deep_gemm_ops.reference:
//   amax = max(1e-4, max |x|) over the group; a NaN in the group makes amax NaN, and so the scale and every value of it
//   sf = amax / 448, rounded up to a power of two for the UE8M0 formats (Inf and NaN stay, byte 0xFF when packed)
//   value = e4m3(x * (1 / sf)), nearest even, saturating; NaN is written as 0x7F
// and for FP4 sf = amax / 6, value = e2m1(x * (1 / sf)), nearest even; NaN is written as 6.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm_problem.h"

namespace deep_gemm::cast {

enum class InputType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

enum class ScaleFormat : int {
    kFloat32 = 0,       // float32
    kUE8M0Float32 = 1,  // float32 powers of two
    kUE8M0Packed = 2,   // int32, four consecutive groups a word, lowest byte first, unused bytes zero
};

struct CastProblem {
    const void* x = nullptr;  // [rows, cols], columns contiguous
    InputType x_type = InputType::kBFloat16;
    int64_t rows = 0, cols = 0;
    int64_t x_stride = 0;     // between rows
    void* out = nullptr;      // [rows, cols] E4M3, columns contiguous
    int64_t out_stride = 0;   // between rows
    void* sf = nullptr;       // float or int32, see below; the other stride is 1
    int64_t sf_stride = 0;
    int gran_k = 128;         // 128 or 32
    ScaleFormat sf_format = ScaleFormat::kFloat32;
    int num_sms = 0;          // to use, where a kernel's CTAs walk over tiles; 0: one tile each
};

// A scale per row and gran_k columns: sf[row + group * sf_stride]; packed: word [row + (group / 4) * sf_stride].
cudaError_t launch_per_token_cast(const CastProblem& problem, cudaStream_t stream, bool pdl);

// The same of silu(gate) * up * weight: x is [rows, 2 * cols] BF16, gate in the first cols columns, up in the others.
// With `clamped`, gate is at most clamp and up between -clamp and clamp. topk_weights: a float for each row, or null.
struct SwigluProblem {
    CastProblem cast;
    const float* topk_weights = nullptr;
    int64_t weight_stride = 1;
    bool clamped = false;
    float clamp = 0;
};
cudaError_t launch_swiglu_cast(const SwigluProblem& problem, cudaStream_t stream, bool pdl);

// What stands between the two products of an expert's backward pass, all BF16: from x = [gate | up] and the gradient of
// silu(gate) * up * weight that product and the gradients of x and of the row weights (sums along rows, float32).
struct SwigluBackwardProblem {
    const void* x = nullptr;     // [rows, 2 * cols], columns contiguous, as in all
    int64_t x_stride = 0;        // between rows
    const void* grad = nullptr;  // [rows, cols]
    int64_t grad_stride = 0;
    const float* row_weights = nullptr;  // [rows], or null
    int64_t weight_stride = 1;
    void* grad_x = nullptr;      // [rows, 2 * cols]
    int64_t grad_x_stride = 0;
    void* weighted = nullptr;    // [rows, cols]
    int64_t weighted_stride = 0;
    float* grad_row_weights = nullptr;  // [rows]
    int64_t rows = 0, cols = 0;
};
cudaError_t launch_swiglu_backward(const SwigluBackwardProblem& problem, cudaStream_t stream, bool pdl);

// As launch_per_token_cast, to FP4: out is [rows, cols / 2] bytes, the even column's value in the low half; cols is
// even.
cudaError_t launch_per_token_cast_fp4(const CastProblem& problem, cudaStream_t stream, bool pdl);

// A scale per gran_k rows and column: sf[group * sf_stride + column]; packed: word [(group / 4) * sf_stride + column].
cudaError_t launch_per_channel_cast(const CastProblem& problem, cudaStream_t stream, bool pdl);

// A scale per 128 rows and gran_k columns: sf[block_row + group * sf_stride]; packed as for per_token.
cudaError_t launch_per_block_cast(const CastProblem& problem, cudaStream_t stream, bool pdl);

// Both the values as they lie and their transposed copy, out_t [cols, rows], in one read of x. gran_k is 128.
struct TransposedCastProblem {
    CastProblem cast;
    void* out_t = nullptr;    // E4M3, rows contiguous; fastest on a multiple of 16 bytes with a stride of such
    int64_t out_t_stride = 0;
    void* sf_t = nullptr;     // as sf, of the transposed matrix
    int64_t sf_t_stride = 0;
};

// out and sf as launch_per_token_cast; out_t has a scale per column of x and 128 rows: sf_t[column + group *
// sf_t_stride].
cudaError_t launch_per_token_cast_with_transpose(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl);

// out and sf as launch_per_block_cast; out_t has the same values and scales: sf_t[block_column + block_row *
// sf_t_stride].
cudaError_t launch_per_block_cast_with_transpose(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl);

// out_t and sf_t of the two above alone. `out` and `sf` are not used.
cudaError_t launch_per_channel_cast_transposed(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl);
cudaError_t launch_per_block_cast_transposed(const TransposedCastProblem& problem, cudaStream_t stream, bool pdl);

// FP4 as FP8, exactly: x is [rows, cols / 2] bytes with the even column's value in the low half, out [rows, cols] E4M3, or
// `batch` of them. x and its strides are multiples of 16 bytes, out and its strides of 32; what follows a row of out up to a
// multiple of 32 bytes is overwritten.
struct ExpandFp4Problem {
    const void* x = nullptr;
    int64_t x_stride = 0;        // bytes between rows
    int64_t x_batch_stride = 0;
    void* out = nullptr;
    int64_t out_stride = 0;      // bytes between rows
    int64_t out_batch_stride = 0;
    int64_t rows = 0, cols = 0;
    int64_t batch = 1;
};
cudaError_t launch_expand_fp4(const ExpandFp4Problem& problem, cudaStream_t stream, bool pdl);

// FP4 with UE8M0 scales per 32 columns as FP8 with an FP32 scale per block of 128 x 128: out = value * 2^(s - largest + 6),
// block_sf = 2^(largest - 6), `largest` being the largest scale in the block whose values are not all zero (16 at a time). That
// is exact where no other scale is more than 2^14 smaller. Where one is, its values become zero and the block's `inexact` is 1,
// otherwise 0. A scale that is NaN makes its values NaN. cols is a multiple of 128; x, out and their strides of 16 bytes.
// Groups that have no rows of A are left out, their `inexact` is 0.
struct FoldFp4Problem {
    const void* x = nullptr;
    int64_t x_stride = 0;        // bytes between rows
    int64_t x_batch_stride = 0;
    const void* sf = nullptr;    // words of four scales: word (row, k / 128) at row + k / 128 * sf_stride
    int64_t sf_stride = 0;       // words
    int64_t sf_batch_stride = 0;
    void* out = nullptr;
    int64_t out_stride = 0;      // bytes between rows
    int64_t out_batch_stride = 0;
    float* block_sf = nullptr;   // [batch, row_blocks(), col_blocks()]
    uint8_t* inexact = nullptr;  // the same, then zeros up to inexact_bytes(); 16-byte aligned
    int64_t rows = 0, cols = 0;
    int64_t batch = 1;
    const int32_t* group_layout = nullptr;  // null: all groups have rows. Otherwise for each where it ends, or how many
    bool ends = false;                      // rows it has

    int64_t row_blocks() const { return (rows + 127) / 128; }
    int64_t col_blocks() const { return cols / 128; }
    int64_t inexact_bytes() const { return (batch * row_blocks() * col_blocks() + 15) / 16 * 16; }
};
cudaError_t launch_fold_fp4(const FoldFp4Problem& problem, cudaStream_t stream, bool pdl);

// FP8 as BF16, in the order of K that SM90's rows for BF16 by FP4 take (cast/bf16_tokens.cu). With `sf`, UE8M0 scales per row, or 128
// rows, and 32 or 128 columns, values are multiplied by them. cols is a multiple of 128, x and its strides of 16 bytes, out and
// its strides of 16 elements.
struct Bf16TokensProblem {
    const void* x = nullptr;
    int64_t x_stride = 0;        // between rows
    int64_t x_batch_stride = 0;
    const void* sf = nullptr;    // E8M0 bytes, or words of four along K; or null
    bool sf_is_packed = false;
    int64_t sf_mn_stride = 0;    // of bytes or words
    int64_t sf_k_stride = 0;
    int64_t sf_batch_stride = 0;
    int gran_mn = 1, gran_k = 128;
    void* out = nullptr;
    int64_t out_stride = 0;      // elements between rows
    int64_t out_batch_stride = 0;
    int64_t rows = 0, cols = 0;
    int64_t batch = 1;
    const int32_t* rows_of_group = nullptr;  // [batch]: rows from there on are left out
};
cudaError_t launch_bf16_tokens(const Bf16TokensProblem& problem, cudaStream_t stream, bool pdl);

// Rows of x belong to groups whose bounds only the device knows. Bounds are clamped to the rows of x and to what came
// before them.
struct KGroups {
    const int32_t* ends = nullptr;  // [num_groups]: what `layout` says
    int64_t ends_stride = 1;
    int64_t num_groups = 0;
    int64_t rows = 0;               // of x
    GroupLayout layout = GroupLayout::kSizes;  // or kPsum, kOffsets
    int64_t alignment = 1;          // of kPsum

    // Rows of scales, 128 rows of a group each, that are enough for any sizes.
    __host__ __device__ int64_t scale_rows() const { return rows / 128 + num_groups; }
};

// BF16, gran_k 128. As launch_per_channel_cast within each group: ceil(size / 128) rows of scales a group, group after
// group. sf has groups.scale_rows() rows; those after the last group are zero, and so are values of rows of no group.
cudaError_t launch_k_grouped_per_channel_cast(const CastProblem& problem, const KGroups& groups, cudaStream_t stream,
                                              bool pdl);

// The same values transposed, each group from a multiple of 128 on: out_t is [cols, 128 * groups.scale_rows()], row i
// of the scales sf_t belongs to columns 128 i .. 128 i + 127. What no row of x fills is zero. `out` and `sf` are not
// used.
cudaError_t launch_k_grouped_cast_k_major(const TransposedCastProblem& problem, const KGroups& groups,
                                          cudaStream_t stream, bool pdl);

// out[b, c, r] = x[b, r, c] for 8-bit elements, any strides. Fastest where x and its strides are multiples of 4 bytes
// and out and its strides multiples of 16 (a temporary for a GEMM operand should be: round the row stride up).
struct TransposeProblem {
    const void* x = nullptr;
    int64_t x_stride = 0, x_batch_stride = 0;      // bytes
    void* out = nullptr;
    int64_t out_stride = 0, out_batch_stride = 0;  // bytes
    int64_t rows = 0, cols = 0, batch = 1;         // of x
};
cudaError_t launch_transpose_fp8(const TransposeProblem& problem, cudaStream_t stream, bool pdl);

// FP8 values of K groups as the k-grouped product reads them: out [mn, 128 * groups.scale_rows()], each group from a multiple
// of 128 on, zeros behind its end up to the next multiple. Columns behind the last group are left alone.
struct KGroupedTransposeProblem {
    const void* x = nullptr;  // [groups.rows, mn]; flat: for each group [mn, its rows], group after group
    bool flat = false;
    int64_t x_stride = 0;     // bytes, between rows; not used where flat
    int64_t mn = 0;
    void* out = nullptr;      // on a multiple of 16 bytes
    int64_t out_stride = 0;   // bytes, a multiple of 16
};
cudaError_t launch_k_grouped_transpose_fp8(const KGroupedTransposeProblem& problem, const KGroups& groups,
                                           cudaStream_t stream, bool pdl);

enum class ScaleType : int { kFloat32 = 0, kE8M0 = 1, kPackedUE8M0 = 2 };

// Copies scales of any strides to MN-major form, dst[b * dst_batch_stride + k * dst_k_stride + mn], converting on the
// way. dst_type is kFloat32 or kPackedUE8M0. float32 that is not a positive power of two (0 included) packs to 0xFF,
// UE8M0's NaN; 0xFF expands to NaN. `mn_repeat` 128 gives each row of dst the scale of row mn / 128 of src, `k_repeat` 4 each
// scale along K that of k / 4.
struct ScaleLayoutProblem {
    const void* src = nullptr;
    ScaleType src_type = ScaleType::kFloat32;
    int64_t src_batch_stride = 0, src_mn_stride = 0, src_k_stride = 0;  // elements: floats, bytes or words
    void* dst = nullptr;
    ScaleType dst_type = ScaleType::kFloat32;
    int64_t dst_batch_stride = 0, dst_k_stride = 0;                     // elements: floats or words
    int64_t batch = 1;
    int64_t mn = 0;    // rows of dst
    int64_t k_sf = 0;  // scales along K of dst (four a word where packed)
    int mn_repeat = 1;
    int k_repeat = 1;
    const int32_t* row_counts = nullptr;  // [batch] on the device: dst rows from there on may stay as they are
    bool round_up = false;  // float32 to UE8M0: to the next power of two, instead of NaN
};
cudaError_t launch_scale_layout(const ScaleLayoutProblem& problem, cudaStream_t stream, bool pdl);

// Packs float32 scales of K groups of different sizes, [sf_rows, mn], so that no word holds scales of two groups.
// ks: [num_groups] int32 sizes along K on the device; group g has ceil(ks[g] / gran_k) rows of src. dst: [dst_rows, mn]
// words; dst_rows = (sf_rows + 3 * num_groups) / 4 bounds what any sizes need; rows after the last group are zero.
// Sizes that point outside src are clamped.
struct GroupedPackProblem {
    const float* src = nullptr;
    int64_t src_k_stride = 0, src_mn_stride = 0;
    int64_t sf_rows = 0, mn = 0;
    const int32_t* ks = nullptr;
    int64_t ks_stride = 1;
    int64_t num_groups = 0;
    int gran_k = 128;
    void* dst = nullptr;
    int64_t dst_k_stride = 0;
    int64_t dst_rows = 0;
};
cudaError_t launch_k_grouped_pack_ue8m0(const GroupedPackProblem& problem, cudaStream_t stream, bool pdl);

}  // namespace deep_gemm::cast
