// Products of two matrices: FP8, FP4 and BF16, and FP8 with columns written head by head.
#include "product.h"

#include "gemm_ops.h"

namespace deep_gemm::ops {

namespace {

constexpr const char* kFP8Names[] = {"fp8_gemm_nt", "fp8_gemm_nn", "fp8_gemm_tn", "fp8_gemm_tt"};
constexpr const char* kFP8FP4Names[] = {"fp8_fp4_gemm_nt", "fp8_fp4_gemm_nn", "fp8_fp4_gemm_tn", "fp8_fp4_gemm_tt"};
constexpr const char* kBF16Names[] = {"bf16_gemm_nt", "bf16_gemm_nn", "bf16_gemm_tn", "bf16_gemm_tt"};

constexpr bool a_is_k_major(Layout layout) { return layout == Layout::kNT || layout == Layout::kNN; }
constexpr bool b_is_k_major(Layout layout) { return layout == Layout::kNT || layout == Layout::kTT; }

// [left, mid, right] of a head's columns; all 0 where the result has no gaps.
struct Heads {
    int64_t left = 0, mid = 0, right = 0;

    bool any() const { return left + right > 0; }
    int64_t width() const { return left + mid + right; }
};

Heads check_head_splits(const char* op, const std::vector<int64_t>& splits) {
    bool fits = splits.size() == 3;
    for (int64_t part : splits) fits = fits && part >= 0 && part <= kMaxSize;
    if (!fits || splits[0] + splits[2] == 0 || splits[0] + splits[2] > kMaxSize) {
        fail(op, "head_splits", "value", text(std::span(splits.data(), splits.size())),
             "[left, mid, right], none negative, with left + right positive");
    }
    return {splits[0], splits[1], splits[2]};
}

// Zeros `width` columns of each head, from `first` on.
void zero_columns(const Result& result, const Heads& parts, int64_t first, int64_t width) {
    if (width == 0) return;
    const std::array<int64_t, 3> sizes = {result.sizes[0], result.sizes[1] / parts.width(), width};
    const std::array<int64_t, 3> strides = {result.strides[0], parts.width(), 1};
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(result.handle(), 3, sizes.data(), strides.data(), first, &handle));
    const OwnedTensor columns(handle);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(columns.get()));
}

// Checks everything, then runs. `sfa` and `sfb` are there for FP8 operands, `head_splits` where columns have gaps. Returns
// the result, allocated here, unless `out` is there to write to. With `or_fp4` K-major operands may be FP4.
OwnedTensor run(const char* op, Layout layout, const TensorInfo& a, const TensorInfo* sfa, const TensorInfo& b,
                const TensorInfo* sfb, const TensorInfo* c, ScalarType out_dtype, const Recipe& recipe,
                const std::vector<int64_t>* head_splits, const TensorInfo* out, bool or_fp4 = false) {
    const bool a_k_major = a_is_k_major(layout), b_k_major = b_is_k_major(layout), is_fp8 = sfa != nullptr;
    const ScalarType dtype = is_fp8 ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;

    check_operand_dtype(op, "a", a, dtype, or_fp4 && a_k_major);
    check_rank(op, "a", a, 2);
    check_operand_dtype(op, "b", b, dtype, or_fp4 && b_k_major);
    check_rank(op, "b", b, 2);
    if (is_fp8) {
        check_scales(op, "sfa", *sfa, 2);
        check_scales(op, "sfb", *sfb, 2);
    }
    check_device(op, "b", b, a, "a");
    if (is_fp8) {
        check_device(op, "sfa", *sfa, a, "a");
        check_device(op, "sfb", *sfb, a, "a");
    }
    if (c) check_device(op, "c", *c, a, "a");
    if (out) check_device(op, "out", *out, a, "a");
    if (!out) check_out_dtype(op, out_dtype);
    const Heads heads = head_splits ? check_head_splits(op, *head_splits) : Heads{};

    const Axes axes_a = a_k_major ? kKMajor : kMNMajor, axes_b = b_k_major ? kKMajor : kMNMajor;
    check_size(op, "a", a_k_major ? "M" : "K", a.size(0));
    check_size(op, "a", a_k_major ? "K" : "M", a.size(1));
    check_size(op, "b", b_k_major ? "N" : "K", b.size(0));
    check_size(op, "b", b_k_major ? "K" : "N", b.size(1));
    const int64_t m = a.size(axes_a.mn), n = b.size(axes_b.mn), k = size_along_k(a, axes_a);
    if (size_along_k(b, axes_b) != k) fail(op, "b", "K", size_along_k(b, axes_b), k, "the K of a");
    check_operand_layout(op, "a", a, a_k_major || !is_fp8);
    check_operand_layout(op, "b", b, b_k_major || !is_fp8);

    Granularities grans;
    if (is_fp8) {
        const Dim m_dim = {Dim::kMN, "M", m}, n_dim = {Dim::kMN, "N", n}, k_dim = {Dim::kK, "K", k};
        const std::array<Dim, 2> dims_a = {a_k_major ? m_dim : k_dim, a_k_major ? k_dim : m_dim};
        const std::array<Dim, 2> dims_b = {b_k_major ? n_dim : k_dim, b_k_major ? k_dim : n_dim};
        grans = match_recipe(op, *sfa, dims_a, *sfb, dims_b, recipe, is_fp4(b));
    }
    int64_t columns = n;
    if (heads.any()) {
        const int64_t kept = heads.left + heads.right;
        if (n % kept != 0) fail(op, "b", "N", n, "a multiple of left + right = " + text(kept));
        columns = n / kept * heads.width();
        if (columns > kMaxSize) fail(op, "head_splits", "columns of the result", columns, "at most " + text(kMaxSize));
    }
    const std::array<int64_t, 2> shape = {m, columns};
    const char* names = heads.any() ? "[M, N / (left + right) * (left + mid + right)]" : "[M, N]";
    check_result(op, names, "N", shape, c, out_dtype, out);

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    Result result(shape, out_dtype, a, out);
    if (m == 0 || n == 0) return std::move(result.allocated);
    if (!out && heads.any()) zero_columns(result, heads, heads.left, heads.mid);
    if (k == 0) {
        if (heads.any()) {
            zero_columns(result, heads, 0, heads.left);
            zero_columns(result, heads, heads.left + heads.mid, heads.right);
        } else {
            result.fill(c);
        }
        return std::move(result.allocated);
    }
    const bool sm100 = check_architecture(op, device);
    if (sm100) {
        check_fp4_unpackable(op, "a", a, k);
        check_fp4_unpackable(op, "b", b, k);
    }

    const cudaStream_t stream = current_stream(device);
    GemmProblem problem;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    OwnedTensor scratch_a, scratch_b, scratch_sfa, scratch_sfb, tokens;
    set_operands(problem, prepare_operand(op, a, axes_a, stream, scratch_a, sm100, sm100),
                 prepare_operand(op, b, axes_b, stream, scratch_b, sm100, sm100 || sm90_keeps_fp4(grans)));
    if (is_fp8) {
        set_scales(op, problem, *sfa, axes_a, scratch_sfa, *sfb, axes_b, scratch_sfb, tokens, grans, stream, sm100);
    } else {
        problem.operands = OperandType::kBF16;
        problem.a_mn_major = !a_k_major;
        problem.b_mn_major = !b_k_major;
    }
    problem.head_left = static_cast<int>(heads.left);
    problem.head_mid = static_cast<int>(heads.mid);
    problem.head_right = static_cast<int>(heads.right);
    set_result(problem, result, kKMajor, c);
    run_product(op, problem, a, stream);
    return std::move(result.allocated);
}

}  // namespace

template <Layout kLayout>
void fp8_gemm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const auto out_dtype = arguments.take<ScalarType>();
    const auto recipe = arguments.take<Recipe>();
    return_tensor(stack, run(kFP8Names[static_cast<int>(kLayout)], kLayout, a.info, &sfa.info, b.info, &sfb.info,
                             c.get(), out_dtype, recipe, nullptr, nullptr));
}

template <Layout kLayout>
void fp8_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const auto recipe = arguments.take<Recipe>();
    const TensorArgument out(arguments.take_tensor());
    run(kFP8Names[static_cast<int>(kLayout)], kLayout, a.info, &sfa.info, b.info, &sfb.info, c.get(),
        ScalarType::BFloat16, recipe, nullptr, &out.info);
}

template <Layout kLayout>
void fp8_fp4_gemm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const auto out_dtype = arguments.take<ScalarType>();
    const auto recipe = arguments.take<Recipe>();
    return_tensor(stack, run(kFP8FP4Names[static_cast<int>(kLayout)], kLayout, a.info, &sfa.info, b.info, &sfb.info,
                             c.get(), out_dtype, recipe, nullptr, nullptr, true));
}

template <Layout kLayout>
void fp8_fp4_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const auto recipe = arguments.take<Recipe>();
    const TensorArgument out(arguments.take_tensor());
    run(kFP8FP4Names[static_cast<int>(kLayout)], kLayout, a.info, &sfa.info, b.info, &sfb.info, c.get(),
        ScalarType::BFloat16, recipe, nullptr, &out.info, true);
}

template <Layout kLayout>
void bf16_gemm(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), b(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const auto out_dtype = arguments.take<ScalarType>();
    return_tensor(stack, run(kBF16Names[static_cast<int>(kLayout)], kLayout, a.info, nullptr, b.info, nullptr, c.get(),
                             out_dtype, std::nullopt, nullptr, nullptr));
}

template <Layout kLayout>
void bf16_gemm_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), b(arguments.take_tensor());
    const OptionalTensor c(arguments.take<std::optional<Tensor>>());
    const TensorArgument out(arguments.take_tensor());
    run(kBF16Names[static_cast<int>(kLayout)], kLayout, a.info, nullptr, b.info, nullptr, c.get(),
        ScalarType::BFloat16, std::nullopt, nullptr, &out.info);
}

void fp8_gemm_nt_skip_head_mid(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const auto head_splits = arguments.take<std::vector<int64_t>>();
    const auto out_dtype = arguments.take<ScalarType>();
    const auto recipe = arguments.take<Recipe>();
    return_tensor(stack, run("fp8_gemm_nt_skip_head_mid", Layout::kNT, a.info, &sfa.info, b.info, &sfb.info, nullptr,
                             out_dtype, recipe, &head_splits, nullptr));
}

void fp8_gemm_nt_skip_head_mid_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
        sfb(arguments.take_tensor());
    const auto head_splits = arguments.take<std::vector<int64_t>>();
    const auto recipe = arguments.take<Recipe>();
    const TensorArgument out(arguments.take_tensor());
    run("fp8_gemm_nt_skip_head_mid", Layout::kNT, a.info, &sfa.info, b.info, &sfb.info, nullptr, ScalarType::BFloat16,
        recipe, &head_splits, &out.info);
}

#define DG_INSTANTIATE(LAYOUT)                                            \
    template void fp8_gemm<LAYOUT>(StableIValue*, uint64_t, uint64_t);      \
    template void fp8_gemm_out<LAYOUT>(StableIValue*, uint64_t, uint64_t);  \
    template void fp8_fp4_gemm<LAYOUT>(StableIValue*, uint64_t, uint64_t);     \
    template void fp8_fp4_gemm_out<LAYOUT>(StableIValue*, uint64_t, uint64_t); \
    template void bf16_gemm<LAYOUT>(StableIValue*, uint64_t, uint64_t);     \
    template void bf16_gemm_out<LAYOUT>(StableIValue*, uint64_t, uint64_t);
DG_INSTANTIATE(Layout::kNT)
DG_INSTANTIATE(Layout::kNN)
DG_INSTANTIATE(Layout::kTN)
DG_INSTANTIATE(Layout::kTT)
#undef DG_INSTANTIATE

}  // namespace deep_gemm::ops
