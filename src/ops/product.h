// What the operators of all products share: arguments from the stack, scales matched to operands, operands and scales in
// the form that kernels read, results, the launch. Checks have the texts of deep_gemm_ops/_checks.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../host/gemm_problem.h"
#include "check.h"
#include "stream.h"
#include "tensor_info.h"

namespace deep_gemm::ops {

inline int64_t ceil_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------------------------------
// Arguments

using Recipe = std::optional<std::vector<int64_t>>;

// Boxed arguments, in the order of the schema; each has to be taken once, since the stack owns nothing afterwards.
// TORCH_BOX would wrap each tensor in a torch::stable::Tensor, an allocation each, and a small GEMM is over in few
// microseconds.
class Arguments {
public:
    explicit Arguments(const StableIValue* stack) : stack_(stack) {}

    template <class T>
    T take() {
        return torch::stable::detail::to<T>(stack_[next_++]);
    }
    OwnedTensor take_tensor() { return OwnedTensor(take<AtenTensorHandle>()); }

private:
    const StableIValue* stack_;
    int next_ = 0;
};

inline void return_tensor(StableIValue* stack, OwnedTensor result) {
    stack[0] = torch::stable::detail::from(result.release());
}

// A tensor argument that may be absent.
class OptionalTensor {
public:
    OptionalTensor() = default;
    explicit OptionalTensor(std::optional<Tensor> tensor) : tensor_(std::move(tensor)) {
        if (tensor_) info_.emplace(*tensor_);
    }
    OptionalTensor(const OptionalTensor&) = delete;
    const TensorInfo* get() const { return info_ ? &*info_ : nullptr; }

private:
    std::optional<Tensor> tensor_;
    std::optional<TensorInfo> info_;
};

// A tensor argument with what is known of it.
struct TensorArgument {
    explicit TensorArgument(OwnedTensor tensor) : owned(std::move(tensor)), info(owned.get()) {}
    OwnedTensor owned;
    TensorInfo info;
};

// ---------------------------------------------------------------------------------------------------------------------
// Scales

// A dimension of an operand, which its scales follow: along M or N and along K they are fewer.
struct Dim {
    enum Kind { kMN, kK, kGroup };  // kGroup: a scale for each
    Kind kind;
    const char* name;
    int64_t size;
};

struct Granularities {
    int64_t m = 1, n = 1, k = 1;
    int64_t k_b = 1;  // of B's scales; only where B is FP4 it may differ: 32, and k 128

    // In the recipe 1, 128, 128 the kernels read B's block scales as they lie.
    bool is_1d2d() const { return m == 1 && n == 128 && k == 128 && k_b == 128; }
};

// Those that the recipe gives or the shapes of the scales imply. `or_mixed`: B's may be finer along K than A's.
Granularities match_recipe(const char* op, const TensorInfo& sfa, std::span<const Dim> dims_a, const TensorInfo& sfb,
                           std::span<const Dim> dims_b, const Recipe& recipe, bool or_mixed = false);

// Scales are of a type that is accepted, and of this rank.
void check_scales(const char* op, const char* arg, const TensorInfo& sf, int64_t rank);

// Which dimension of a tensor is what; `group` is -1 where there is none.
struct Axes {
    int group, mn, k;
};
inline constexpr Axes kKMajor = {-1, 0, 1}, kMNMajor = {-1, 1, 0};
inline constexpr Axes kKMajorGroups = {0, 1, 2}, kMNMajorGroups = {0, 2, 1};

// Scales of an operand with `mn` rows as the kernels take them (see ScaleTensor): float32, and MN-major where there is
// one per row; or, `packed`, UE8M0 words. What is not so is brought into that form in `scratch` by one small kernel.
// There, K may have more `k_rows`, of scales or words, than there are in `sf`, which are then undefined. `gran_k` is that of
// the result, `k_repeat` times as fine as what there is. `row_counts`: [groups] on the device, rows that are needed.
ScaleTensor prepare_scales(const char* op, const TensorInfo& sf, Axes axes, int64_t mn, int64_t gran_mn, bool per_row,
                           int64_t gran_k, int64_t k, cudaStream_t stream, OwnedTensor& scratch, int64_t k_rows = 0,
                           bool packed = false, int k_repeat = 1, const int32_t* row_counts = nullptr);

// ---------------------------------------------------------------------------------------------------------------------
// Operands

// Where a matrix lies, or the first of several, in elements: rows as they are stored, K-major or not.
struct Operand {
    const void* data;
    int64_t row_stride, group_stride;
    bool mn_major = false;
    bool is_fp4 = false;
};

// An operand that the kernel reads as it lies, or one that is transposed first.
void check_operand_layout(const char* op, const char* arg, const TensorInfo& x, bool by_tma);

// FP8 or BF16 values; with `or_fp4` K-major FP8 operands may be FP4.
void check_operand_dtype(const char* op, const char* arg, const TensorInfo& x, ScalarType dtype, bool or_fp4);

// Packed pairs of E2M1 values, K-major.
bool is_fp4(const TensorInfo& x);

// K, of which a byte of FP4 holds two.
int64_t size_along_k(const TensorInfo& x, Axes axes);

// As the kernel reads it. SM90's FP8 tensor cores take K-major operands alone, so an MN-major one is transposed into
// `scratch`; BF16 ones stay as they are, on SM100 FP8 ones, too, where TMA can address their rows. FP4 becomes FP8 in
// `scratch` unless `keep_fp4`.
Operand prepare_operand(const char* op, const TensorInfo& x, Axes axes, cudaStream_t stream, OwnedTensor& scratch,
                        bool sm100 = false, bool keep_fp4 = false);

// What SM90's kernels make of B in FP4: they multiply it as it is where it has a scale for each 32 of K.
// What TMA needs to unpack FP4 on its way to SM100's shared memory, beyond what it needs of bytes.
void check_fp4_unpackable(const char* op, const char* arg, const TensorInfo& x, int64_t k);

inline bool sm90_keeps_fp4(const Granularities& grans) { return grans.k_b == 32; }

void set_operands(GemmProblem& problem, const Operand& a, const Operand& b);

// The scales of a problem whose sizes and operands are set. On SM90 those of FP4 B stay packed where they are UE8M0 and K
// permits, a quarter of FP32's bytes.
//
// There A may become BF16 in `tokens`, with its scales or without, where that is faster; everything but the result has to be set.
void set_scales(const char* op, GemmProblem& problem, const TensorInfo& sfa, Axes axes_a, OwnedTensor& scratch_a,
                const TensorInfo& sfb, Axes axes_b, OwnedTensor& scratch_b, OwnedTensor& tokens, const Granularities& grans,
                cudaStream_t stream, bool sm100 = false);

// ---------------------------------------------------------------------------------------------------------------------
// Results

void check_out_dtype(const char* op, ScalarType dtype);

// `out` of this shape, and `c` of it or of its last dimension; `names` and `last_name` say how these are called.
void check_result(const char* op, const char* names, const char* last_name, std::span<const int64_t> shape,
                  const TensorInfo* c, ScalarType out_dtype, const TensorInfo* out);

// A result: `out`, or a fresh contiguous tensor.
struct Result {
    Result(std::span<const int64_t> shape, ScalarType dtype, const TensorInfo& like, const TensorInfo* out);

    AtenTensorHandle handle() const { return out ? out->get() : allocated.get(); }
    ScalarType dtype() const { return out ? out->scalar_type() : fresh_dtype; }
    void zero() const;
    // `c`, or zeros: the product of empty operands.
    void fill(const TensorInfo* c) const;

    const TensorInfo* out;
    OwnedTensor allocated;  // empty where there is an `out`
    ScalarType fresh_dtype;
    std::array<int64_t, 3> sizes, strides;
};

// D (and C) of the problem; `axes` are the result's group, M and N.
void set_result(GemmProblem& problem, const Result& result, Axes axes, const TensorInfo* c);

// ---------------------------------------------------------------------------------------------------------------------
// Launch

// Throws where the device is none that the kernels are for. True for SM100, false for SM90.
bool check_architecture(const char* op, int device);

// Throws, naming `what` failed, unless it succeeded.
void check_enqueued(cudaError_t error, const char* op, const char* what);

// `like`: a tensor on the device, whose allocator memory comes from.
void run_product(const char* op, const GemmProblem& problem, const TensorInfo& like, cudaStream_t stream);

}  // namespace deep_gemm::ops
