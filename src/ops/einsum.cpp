// Products of batches of matrices, written as expressions.
#include "product.h"

#include <cstring>

#include "gemm_ops.h"

namespace deep_gemm::ops {

namespace {

// The dimensions of both operands and of the result, a letter each, and what they are in each: see Axes. The result's are
// its group, M and N.
struct Expression {
    const char* text;
    const char *dims_a, *dims_b, *dims_out;
    const char* names;  // of the result's shape
    Axes a, b, out;
    bool sums;  // the groups' products are summed
};

constexpr Expression kBHR = {"bhr,hdr->bhd", "bhr", "hdr", "bhd", "[b, h, d]", {1, 0, 2}, {0, 1, 2}, {1, 0, 2}, false};
constexpr Expression kBHD = {"bhd,hdr->bhr", "bhd", "hdr", "bhr", "[b, h, r]", {1, 0, 2}, {0, 2, 1}, {1, 0, 2}, false};
constexpr Expression kHDR = {"bhd,bhr->hdr", "bhd", "bhr", "hdr", "[h, d, r]", {1, 2, 0}, {1, 2, 0}, {0, 1, 2}, false};
constexpr Expression kBMK = {"bmk,bnk->mn", "bmk", "bnk", "mn", "[m, n]", {0, 1, 2}, {0, 1, 2}, {-1, 0, 1}, true};

constexpr std::array<Expression, 3> kBF16Expressions = {kBMK, kBHR, kBHD};
constexpr std::array<Expression, 3> kFP8Expressions = {kBHR, kBHD, kHDR};

// A letter as a string with a life of its own.
const char* letter(char c) {
    static constexpr char kLetters[] = "b\0d\0h\0k\0m\0n\0r";
    for (const char* p = kLetters; p < kLetters + sizeof(kLetters); p += 2) {
        if (*p == c) return p;
    }
    return "?";
}

// Sizes of the letters of an expression.
class Sizes {
public:
    void set(char c, int64_t size) { sizes_[c - 'a'] = size; }
    int64_t operator[](char c) const { return sizes_[c - 'a']; }

private:
    std::array<int64_t, 26> sizes_ = {};
};

std::array<Dim, 3> scale_dims(const char* dims, Axes axes, const Sizes& sizes) {
    std::array<Dim, 3> result = {};
    for (int i = 0; i < 3; ++i) {
        const Dim::Kind kind = i == axes.k ? Dim::kK : i == axes.group ? Dim::kGroup : Dim::kMN;
        result[i] = {kind, letter(dims[i]), sizes[dims[i]]};
    }
    return result;
}

// Checks everything, then runs. `sfa` and `sfb` are there for FP8 operands.
OwnedTensor run(const char* op, const std::string& expr, const TensorInfo& a, const TensorInfo* sfa,
                const TensorInfo& b, const TensorInfo* sfb, const TensorInfo* c, ScalarType out_dtype,
                const Recipe& recipe, const TensorInfo* out) {
    const bool is_fp8 = sfa != nullptr;
    const ScalarType dtype = is_fp8 ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
    const std::array<Expression, 3>& known = is_fp8 ? kFP8Expressions : kBF16Expressions;
    const Expression* expression = nullptr;
    for (const Expression& candidate : known) {
        if (expr == candidate.text) expression = &candidate;
    }
    if (expression == nullptr) {
        fail(op, "expr", "value", expr, one_of({known[0].text, known[1].text, known[2].text}));
    }

    check_dtype(op, "a", a, {dtype});
    check_rank(op, "a", a, 3);
    check_dtype(op, "b", b, {dtype});
    check_rank(op, "b", b, 3);
    if (is_fp8) {
        check_scales(op, "sfa", *sfa, 3);
        check_scales(op, "sfb", *sfb, 3);
    }
    check_device(op, "b", b, a, "a");
    if (is_fp8) {
        check_device(op, "sfa", *sfa, a, "a");
        check_device(op, "sfb", *sfb, a, "a");
    }
    if (c) check_device(op, "c", *c, a, "a");
    if (out) check_device(op, "out", *out, a, "a");
    if (!out) check_out_dtype(op, out_dtype);

    const char *dims_a = expression->dims_a, *dims_b = expression->dims_b, *dims_out = expression->dims_out;
    for (int i = 0; i < 3; ++i) check_size(op, "a", letter(dims_a[i]), a.size(i));
    for (int i = 0; i < 3; ++i) check_size(op, "b", letter(dims_b[i]), b.size(i));
    Sizes sizes;
    for (int i = 0; i < 3; ++i) sizes.set(dims_a[i], a.size(i));
    for (int i = 0; i < 3; ++i) {
        const char name = dims_b[i];
        if (std::strchr(dims_a, name) == nullptr) sizes.set(name, b.size(i));
        if (b.size(i) != sizes[name]) {
            fail(op, "b", letter(name), b.size(i), sizes[name], std::string("the ") + name + " of a");
        }
    }
    // SM90's tensor cores read 16-bit operands in both orders, 8-bit ones K-major only.
    check_operand_layout(op, "a", a, !is_fp8 || expression->a.k == 2);
    check_operand_layout(op, "b", b, !is_fp8 || expression->b.k == 2);
    Granularities grans;
    if (is_fp8) {
        grans = match_recipe(op, *sfa, scale_dims(dims_a, expression->a, sizes), *sfb,
                             scale_dims(dims_b, expression->b, sizes), recipe);
    }
    const size_t rank = std::strlen(dims_out);
    std::array<int64_t, 3> shape = {};
    for (size_t i = 0; i < rank; ++i) shape[i] = sizes[dims_out[i]];
    const std::span<const int64_t> result_shape = std::span(shape).first(rank);
    check_result(op, expression->names, letter(dims_out[rank - 1]), result_shape, c, out_dtype, out);

    const int device = a.get_device_index();
    const DeviceGuard guard(device);
    Result result(result_shape, out_dtype, a, out);
    const int64_t groups = a.size(expression->a.group), m = a.size(expression->a.mn), k = a.size(expression->a.k);
    const int64_t n = b.size(expression->b.mn);
    if (m == 0 || n == 0 || (groups == 0 && !expression->sums)) return std::move(result.allocated);
    if (k == 0 || groups == 0) {
        result.fill(c);
        return std::move(result.allocated);
    }
    const bool sm100 = check_architecture(op, device);

    const cudaStream_t stream = current_stream(device);
    GemmProblem problem;
    problem.grouping = expression->sums ? Grouping::kSummed : Grouping::kBatched;
    problem.num_groups = groups;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    OwnedTensor scratch_a, scratch_b, scratch_sfa, scratch_sfb;
    set_operands(problem, prepare_operand(op, a, expression->a, stream, scratch_a, sm100),
                 prepare_operand(op, b, expression->b, stream, scratch_b, sm100));
    if (is_fp8) {
        problem.gran_k = static_cast<int>(grans.k);
        problem.sfa =
            prepare_scales(op, *sfa, expression->a, m, grans.m, true, grans.k, k, stream, scratch_sfa, 0, sm100);
        problem.sfb = prepare_scales(op, *sfb, expression->b, n, grans.n, sm100 || !grans.is_1d2d(), grans.k, k, stream,
                                     scratch_sfb, 0, sm100);
    } else {
        problem.operands = OperandType::kBF16;
        problem.a_mn_major = expression->a.k != 2;
        problem.b_mn_major = expression->b.k != 2;
    }
    set_result(problem, result, expression->out, c);
    run_product(op, problem, a, stream);
    return std::move(result.allocated);
}

}  // namespace

template <bool kFP8>
void einsum(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto expr = arguments.take<std::string>();
    if constexpr (kFP8) {
        const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
            sfb(arguments.take_tensor());
        const OptionalTensor c(arguments.take<std::optional<Tensor>>());
        const auto out_dtype = arguments.take<ScalarType>();
        const auto recipe = arguments.take<Recipe>();
        return_tensor(stack, run("fp8_einsum", expr, a.info, &sfa.info, b.info, &sfb.info, c.get(), out_dtype, recipe,
                                 nullptr));
    } else {
        const TensorArgument a(arguments.take_tensor()), b(arguments.take_tensor());
        const OptionalTensor c(arguments.take<std::optional<Tensor>>());
        const auto out_dtype = arguments.take<ScalarType>();
        return_tensor(stack, run("einsum", expr, a.info, nullptr, b.info, nullptr, c.get(), out_dtype, std::nullopt,
                                 nullptr));
    }
}

template <bool kFP8>
void einsum_out(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto expr = arguments.take<std::string>();
    if constexpr (kFP8) {
        const TensorArgument a(arguments.take_tensor()), sfa(arguments.take_tensor()), b(arguments.take_tensor()),
            sfb(arguments.take_tensor());
        const OptionalTensor c(arguments.take<std::optional<Tensor>>());
        const auto recipe = arguments.take<Recipe>();
        const TensorArgument out(arguments.take_tensor());
        run("fp8_einsum", expr, a.info, &sfa.info, b.info, &sfb.info, c.get(), ScalarType::BFloat16, recipe,
            &out.info);
    } else {
        const TensorArgument a(arguments.take_tensor()), b(arguments.take_tensor());
        const OptionalTensor c(arguments.take<std::optional<Tensor>>());
        const TensorArgument out(arguments.take_tensor());
        run("einsum", expr, a.info, nullptr, b.info, nullptr, c.get(), ScalarType::BFloat16, std::nullopt, &out.info);
    }
}

template void einsum<true>(StableIValue*, uint64_t, uint64_t);
template void einsum<false>(StableIValue*, uint64_t, uint64_t);
template void einsum_out<true>(StableIValue*, uint64_t, uint64_t);
template void einsum_out<false>(StableIValue*, uint64_t, uint64_t);

}  // namespace deep_gemm::ops
