#include "product.h"

#include <algorithm>
#include <limits>

#include "../host/cast.h"
#include "../host/gemm.h"
#include "../host/gemm_sm100.h"
#include "../host/knobs.h"
#include "../host/selection_cache.h"

namespace deep_gemm::ops {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One or two granularities to choose from.
struct Choices {
    std::array<int64_t, 2> values = {};
    int count = 0;

    Choices() = default;
    Choices(std::initializer_list<int64_t> list) {
        for (int64_t value : list) push_back(value);
    }
    void push_back(int64_t value) { values[count++] = value; }
    const int64_t* begin() const { return values.data(); }
    const int64_t* end() const { return values.data() + count; }
};

// "3", or "3 or 5" where two choices differ.
std::string unique_sizes(const std::vector<int64_t>& sizes) {
    const bool differ = sizes.size() > 1 && sizes[1] != sizes[0];
    return text(sizes[0]) + (differ ? " or " + text(sizes[1]) : "");
}

int64_t scale_columns(int64_t k, int64_t gran_k, bool packed) {
    const int64_t columns = ceil_div(k, gran_k);
    return packed ? ceil_div(columns, 4) : columns;
}

[[noreturn]] void fail_scales(const char* op, const char* arg, const TensorInfo& sf, std::span<const Dim> dims,
                              const Choices& grans_mn, const Choices& grans_k) {
    const bool packed = sf.scalar_type() == ScalarType::Int;
    std::string all_names, all_sizes;
    for (const Dim& dim : dims) {
        std::string names;
        std::vector<int64_t> sizes;
        const auto add = [&](const std::string& name, int64_t size) {
            names += (names.empty() ? "" : " or ") + name;
            sizes.push_back(size);
        };
        const auto per = [&](int64_t gran) { return "ceil(" + std::string(dim.name) + " / " + text(gran) + ")"; };
        if (dim.kind == Dim::kMN) {
            for (int64_t gran : grans_mn) add(gran == 1 ? dim.name : per(gran), ceil_div(dim.size, gran));
        } else if (dim.kind == Dim::kK) {
            for (int64_t gran : grans_k) add(per(packed ? gran * 4 : gran), scale_columns(dim.size, gran, packed));
        } else {
            add(dim.name, dim.size);
        }
        all_names += (all_names.empty() ? "" : ", ") + names;
        all_sizes += (all_sizes.empty() ? "" : ", ") + unique_sizes(sizes);
    }
    fail(op, arg, "shape", text(sf.sizes()), "[" + all_names + "] = [" + all_sizes + "]");
}

// Granularities that explain the shape of `sf`: along MN, and all that fit along K.
std::pair<int64_t, Choices> match_scales(const char* op, const char* arg, const TensorInfo& sf,
                                         std::span<const Dim> dims, const Choices& grans_mn, const Choices& grans_k) {
    const bool packed = sf.scalar_type() == ScalarType::Int;
    int64_t gran_mn = 0;
    Choices fit_k;
    bool groups_fit = true;
    for (size_t i = 0; i < dims.size(); ++i) {
        const int64_t size = sf.size(i);
        if (dims[i].kind == Dim::kMN) {
            for (int64_t gran : grans_mn) {
                if (gran_mn == 0 && size == ceil_div(dims[i].size, gran)) gran_mn = gran;
            }
        } else if (dims[i].kind == Dim::kK) {
            for (int64_t gran : grans_k) {
                if (size == scale_columns(dims[i].size, gran, packed)) fit_k.push_back(gran);
            }
        } else {
            groups_fit = groups_fit && size == dims[i].size;
        }
    }
    if (!groups_fit || gran_mn == 0 || fit_k.count == 0) fail_scales(op, arg, sf, dims, grans_mn, grans_k);
    return {gran_mn, fit_k};
}

int64_t size_along(const TensorInfo& x, int axis) { return axis < 0 ? 1 : x.size(axis); }
int64_t stride_along(const TensorInfo& x, int axis) { return axis < 0 ? 0 : x.stride(axis); }

// FP4 as FP8, in `scratch`.
Operand expand_operand(const char* op, const TensorInfo& x, Axes axes, cudaStream_t stream, OwnedTensor& scratch) {
    const int64_t groups = size_along(x, axes.group), mn = x.size(axes.mn), k = size_along_k(x, axes);
    const int64_t aligned = ceil_to(k, 32);
    const std::array<int64_t, 3> sizes = {groups, mn, aligned}, strides = {mn * aligned, aligned, 1};
    scratch.reset(new_empty_strided(sizes, strides, ScalarType::Float8_e4m3fn, x.get()));
    cast::ExpandFp4Problem problem;
    problem.x = x.data_ptr();
    problem.x_stride = x.stride(axes.mn);
    problem.x_batch_stride = stride_along(x, axes.group);
    problem.out = TensorInfo(scratch.get()).data_ptr();
    problem.out_stride = aligned;
    problem.out_batch_stride = strides[0];
    problem.rows = mn;
    problem.cols = k;
    problem.batch = groups;
    check_enqueued(cast::launch_expand_fp4(problem, stream, knobs().pdl), op, "expanding FP4");
    return {problem.out, aligned, strides[0]};
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Scales

void check_scales(const char* op, const char* arg, const TensorInfo& sf, int64_t rank) {
    check_dtype(op, arg, sf, {ScalarType::Float, ScalarType::Float8_e8m0fnu, ScalarType::Int});
    check_rank(op, arg, sf, rank);
}

Granularities match_recipe(const char* op, const TensorInfo& sfa, std::span<const Dim> dims_a, const TensorInfo& sfb,
                           std::span<const Dim> dims_b, const Recipe& recipe, bool or_mixed) {
    struct Pair {
        int64_t a, b;  // granularities along K
    };
    Choices grans_m = {1, 128}, grans_n = {1, 128};
    std::vector<Pair> pairs = {{128, 128}, {32, 32}};
    if (or_mixed) pairs.push_back({128, 32});
    if (recipe) {
        const std::vector<int64_t>& r = *recipe;
        const auto is_mn = [](int64_t gran) { return gran == 1 || gran == 128; };
        const bool sized = r.size() == 3 || (r.size() == 4 && or_mixed);
        const Pair wanted = sized ? Pair{r[2], r.back()} : Pair{};
        const auto is_wanted = [&](const Pair& pair) { return pair.a == wanted.a && pair.b == wanted.b; };
        if (!sized || !is_mn(r[0]) || !is_mn(r[1]) || std::none_of(pairs.begin(), pairs.end(), is_wanted)) {
            fail(op, "recipe", "value", text(std::span(r.data(), r.size())),
                 "[1 or 128, 1 or 128, 128 or 32]" +
                     std::string(or_mixed ? " or [1 or 128, 1 or 128, 128, 32]" : ""));
        }
        grans_m = {r[0]};
        grans_n = {r[1]};
        pairs = {wanted};
    }
    // The granularities of one operand that are left, and the pairs that fit.
    const auto choices = [&](int64_t Pair::*member) {
        Choices result;
        for (const Pair& pair : pairs) {
            if (std::find(result.begin(), result.end(), pair.*member) == result.end()) result.push_back(pair.*member);
        }
        return result;
    };
    const auto keep = [&](int64_t Pair::*member, const Choices& fit) {
        std::erase_if(pairs, [&](const Pair& pair) { return std::find(fit.begin(), fit.end(), pair.*member) == fit.end(); });
    };
    const auto [gran_m, fit_a] = match_scales(op, "sfa", sfa, dims_a, grans_m, choices(&Pair::a));
    keep(&Pair::a, fit_a);  // what sfa rules out is no longer on offer
    const auto [gran_n, fit_b] = match_scales(op, "sfb", sfb, dims_b, grans_n, choices(&Pair::b));
    keep(&Pair::b, fit_b);
    // Scales of K <= 32 fit all and mean the same; packed words hold up to four scales, so beyond that it makes a
    // difference.
    if (pairs.size() > 1 && (sfa.scalar_type() == ScalarType::Int || sfb.scalar_type() == ScalarType::Int)) {
        const auto k = std::find_if(dims_a.begin(), dims_a.end(), [](const Dim& dim) { return dim.kind == Dim::kK; });
        if (k->size > 32) {
            std::string expected;
            for (size_t i = 0; i < pairs.size(); ++i) {
                expected += (i == 0 ? "" : i + 1 == pairs.size() ? " or " : ", ");
                expected += "[gran_m, gran_n, " + text(pairs[i].a) +
                            (pairs[i].a == pairs[i].b ? "]" : ", " + text(pairs[i].b) + "]");
            }
            fail(op, "recipe", "value", "None", expected,
                 pairs.size() == 2 ? "packed scales fit both here" : "packed scales fit all here");
        }
    }
    return {gran_m, gran_n, pairs[0].a, pairs[0].b};
}

ScaleTensor prepare_scales(const char* op, const TensorInfo& sf, Axes axes, int64_t mn, int64_t gran_mn, bool per_row,
                           int64_t gran_k, int64_t k, cudaStream_t stream, OwnedTensor& scratch, int64_t k_rows,
                           bool packed, int k_repeat, const int32_t* row_counts) {
    const int64_t groups = size_along(sf, axes.group), k_groups = ceil_div(k, gran_k);
    const int64_t columns = packed ? ceil_div(k_groups, 4) : k_groups;
    const int64_t stride_mn = sf.stride(axes.mn), stride_k = sf.stride(axes.k);
    const int64_t stride_group = stride_along(sf, axes.group);
    const cast::ScaleType type = sf.scalar_type() == ScalarType::Float ? cast::ScaleType::kFloat32
                                 : sf.scalar_type() == ScalarType::Int ? cast::ScaleType::kPackedUE8M0
                                                                           : cast::ScaleType::kE8M0;
    const cast::ScaleType wanted = packed ? cast::ScaleType::kPackedUE8M0 : cast::ScaleType::kFloat32;
    const bool repeat = per_row && gran_mn == 128;
    const bool strides_fit = (columns == 1 || (stride_k % 4 == 0 && stride_k >= mn)) &&
                             (groups == 1 || (stride_group % 4 == 0 && stride_group >= mn));
    const bool tma_readable = (stride_mn == 1 || mn == 1) && strides_fit && k_rows <= columns &&
                              reinterpret_cast<uintptr_t>(sf.data_ptr()) % 16 == 0;
    if (type == wanted && !repeat && k_repeat == 1 && (!per_row || tma_readable)) {
        return {static_cast<const float*>(sf.data_ptr()), stride_mn, stride_k, static_cast<int>(gran_mn),
                stride_group};
    }
    cast::ScaleLayoutProblem problem;
    problem.batch = groups;
    problem.mn = repeat ? mn : sf.size(axes.mn);
    problem.mn_repeat = repeat ? 128 : 1;
    problem.k_repeat = k_repeat;
    problem.row_counts = row_counts;
    const int64_t aligned = ceil_to(problem.mn, 4), rows = std::max(columns, k_rows);
    const std::array<int64_t, 3> sizes = {groups, rows, aligned}, strides = {rows * aligned, aligned, 1};
    scratch.reset(new_empty_strided(sizes, strides, packed ? ScalarType::Int : ScalarType::Float, sf.get()));
    problem.src = sf.data_ptr();
    problem.src_type = type;
    problem.dst_type = wanted;
    problem.src_batch_stride = stride_group;
    problem.src_mn_stride = stride_mn;
    problem.src_k_stride = stride_k;
    problem.dst = TensorInfo(scratch.get()).data_ptr();
    problem.dst_batch_stride = strides[0];
    problem.dst_k_stride = aligned;
    problem.k_sf = k_groups;
    check_enqueued(cast::launch_scale_layout(problem, stream, knobs().pdl), op, "laying out scales");
    return {static_cast<const float*>(problem.dst), 1, aligned, repeat ? 1 : static_cast<int>(gran_mn), strides[0]};
}

// ---------------------------------------------------------------------------------------------------------------------
// Operands

void check_operand_layout(const char* op, const char* arg, const TensorInfo& x, bool by_tma) {
    by_tma ? check_tma_readable(op, arg, x) : check_inner_stride(op, arg, x, "to_tma_aligned");
}

void check_operand_dtype(const char* op, const char* arg, const TensorInfo& x, ScalarType dtype, bool or_fp4) {
    if (or_fp4) {
        check_dtype(op, arg, x, {dtype, ScalarType::Byte, ScalarType::Char, ScalarType::Float4_e2m1fn_x2});
    } else {
        check_dtype(op, arg, x, {dtype});
    }
}

bool is_fp4(const TensorInfo& x) {
    return x.scalar_type() != ScalarType::Float8_e4m3fn && x.scalar_type() != ScalarType::BFloat16;
}

int64_t size_along_k(const TensorInfo& x, Axes axes) { return x.size(axes.k) * (is_fp4(x) ? 2 : 1); }

Operand prepare_operand(const char* op, const TensorInfo& x, Axes axes, cudaStream_t stream, OwnedTensor& scratch,
                        bool sm100, bool keep_fp4) {
    if (is_fp4(x) && !keep_fp4) return expand_operand(op, x, axes, stream, scratch);
    const bool k_major = axes.k == x.dim() - 1;
    const int row_axis = k_major ? axes.mn : axes.k;
    // The stride of a single row is never used, but the tensor map wants a multiple of 16 bytes, of 32 with FP4.
    const int64_t stride = x.size(row_axis) > 1 ? x.stride(row_axis) : ceil_to(x.size(x.dim() - 1), 32);
    const bool tma_readable = stride % 16 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
    if (k_major || x.scalar_type() == ScalarType::BFloat16 || (sm100 && tma_readable)) {
        const int64_t elements = is_fp4(x) ? 2 : 1;
        return {x.data_ptr(), stride * elements, stride_along(x, axes.group) * elements, !k_major, is_fp4(x)};
    }
    const int64_t groups = size_along(x, axes.group), k = x.size(axes.k), mn = x.size(axes.mn);
    const int64_t aligned = ceil_to(k, 16);
    const std::array<int64_t, 3> sizes = {groups, mn, aligned}, strides = {mn * aligned, aligned, 1};
    scratch.reset(new_empty_strided(sizes, strides, ScalarType::Float8_e4m3fn, x.get()));
    cast::TransposeProblem problem;
    problem.x = x.data_ptr();
    problem.x_stride = x.stride(axes.k);
    problem.x_batch_stride = stride_along(x, axes.group);
    problem.out = TensorInfo(scratch.get()).data_ptr();
    problem.out_stride = aligned;
    problem.out_batch_stride = strides[0];
    problem.rows = k;
    problem.cols = mn;
    problem.batch = groups;
    check_enqueued(cast::launch_transpose_fp8(problem, stream, knobs().pdl), op, "transposing an operand");
    return {problem.out, aligned, strides[0]};
}

void set_operands(GemmProblem& problem, const Operand& a, const Operand& b) {
    problem.a = a.data;
    problem.a_stride = a.row_stride;
    problem.a_group_stride = a.group_stride;
    problem.b = b.data;
    problem.b_stride = b.row_stride;
    problem.b_group_stride = b.group_stride;
    problem.a_mn_major = a.mn_major;
    problem.b_mn_major = b.mn_major;
    problem.a_is_fp4 = a.is_fp4;
    problem.b_is_fp4 = b.is_fp4;
}

void check_fp4_unpackable(const char* op, const char* arg, const TensorInfo& x, int64_t k) {
    if (!is_fp4(x)) return;
    if (k % 128 != 0) fail(op, arg, "K", k, "a multiple of 128", "FP4");
    for (int64_t axis = x.dim() - 2; axis >= 0; --axis) {
        if (x.size(axis) <= 1 || x.stride(axis) % 32 == 0) continue;
        const char* what = axis == x.dim() - 2 ? "row stride" : "group stride";
        fail(op, arg, what, std::to_string(x.stride(axis)) + " bytes", "a multiple of 32 bytes", "FP4");
    }
    const int64_t past = reinterpret_cast<uintptr_t>(x.data_ptr()) % 32;
    if (past != 0) fail(op, arg, "base address", std::to_string(past) + " modulo 32 bytes", int64_t{0}, "FP4");
}

namespace {

SelectionLimits selection_limits(int device) {
    SelectionLimits limits;
    limits.num_sms = usable_sms(device);
    limits.block_m_multiple_of = knobs().block_m_multiple_of;
    limits.block_n_multiple_of = knobs().block_n_multiple_of;
    return limits;
}

// Cost of a product of FP4 as it is, or folded. Scales of A as they will be.
double fp4_cost_us(const GemmProblem& problem, const SelectionLimits& limits) {
    const Choice direct = choose_row_cached(gemm_rows(), problem, limits);
    double cost = direct.row < 0 ? std::numeric_limits<double>::infinity() : direct.cost_us;
    if (can_fold_fp4(problem)) {
        const Choice folded = choose_row_cached(gemm_rows(), folded_fp4(problem), limits);
        if (folded.row >= 0) cost = std::min(cost, folded.cost_us + fold_fp4_us(problem));
    }
    return cost;
}

// Whether A of a product of FP4 is to become BF16; `scaled`: with its scales. A forced row is one of one form.
bool takes_bf16_tokens(const GemmProblem& problem, bool scaled, const SelectionLimits& limits) {
    if (problem.gran_k != 128 && !scaled) return false;
    const GemmProblem bf16 = bf16_fp4(problem, scaled);
    const int forced = knobs().forced_row;
    if (forced >= 0) {
        return forced < static_cast<int>(gemm_rows().size()) && operand_mismatch(gemm_rows()[forced], bf16) == nullptr;
    }
    const Choice choice = choose_row_cached(gemm_rows(), bf16, limits);
    return choice.row >= 0 && choice.cost_us + bf16_tokens_us(problem) < fp4_cost_us(problem, limits);
}

void make_bf16_tokens(const char* op, GemmProblem& problem, const TensorInfo& sfa, Axes axes, const Granularities& grans,
                      bool scaled, OwnedTensor& tokens, cudaStream_t stream) {
    const bool masked = problem.layout == GroupLayout::kMasked;
    const std::array<int64_t, 3> sizes = {masked ? problem.num_groups : 1, problem.m, problem.k};
    const std::array<int64_t, 3> strides = {sizes[1] * sizes[2], sizes[2], 1};
    tokens.reset(new_empty_strided(sizes, strides, ScalarType::BFloat16, sfa.get()));
    cast::Bf16TokensProblem cast;
    cast.x = problem.a;
    cast.x_stride = problem.a_stride;
    cast.x_batch_stride = problem.a_group_stride;
    if (scaled) {
        cast.sf = sfa.data_ptr();
        cast.sf_is_packed = sfa.scalar_type() == ScalarType::Int;
        cast.sf_mn_stride = sfa.stride(axes.mn);
        cast.sf_k_stride = sfa.stride(axes.k);
        cast.sf_batch_stride = stride_along(sfa, axes.group);
        cast.gran_mn = static_cast<int>(grans.m);
        cast.gran_k = static_cast<int>(grans.k);
    }
    cast.out = TensorInfo(tokens.get()).data_ptr();
    cast.out_stride = strides[1];
    cast.out_batch_stride = strides[0];
    cast.rows = problem.m;
    cast.cols = problem.k;
    cast.batch = sizes[0];
    if (masked) cast.rows_of_group = problem.group_layout;
    check_enqueued(cast::launch_bf16_tokens(cast, stream, knobs().pdl), op, "converting tokens");
    problem = bf16_fp4(problem, scaled);
    problem.a = cast.out;
    problem.a_stride = cast.out_stride;
    problem.a_group_stride = cast.out_batch_stride;
}

}  // namespace

void set_scales(const char* op, GemmProblem& problem, const TensorInfo& sfa, Axes axes_a, OwnedTensor& scratch_a,
                const TensorInfo& sfb, Axes axes_b, OwnedTensor& scratch_b, OwnedTensor& tokens, const Granularities& grans,
                cudaStream_t stream, bool sm100) {
    problem.sfb_is_packed =
        !sm100 && problem.b_is_fp4 && sfb.scalar_type() != ScalarType::Float && problem.k % 128 == 0;
    // SM90 has kernels for A's scales per 128 and B's, packed, per 32. Elsewhere A's are repeated.
    const int64_t gran_k = problem.sfb_is_packed ? grans.k : grans.k_b;
    problem.gran_k = static_cast<int>(gran_k);
    const bool per_row = sm100 || problem.sfb_is_packed || !grans.is_1d2d();
    problem.sfb = prepare_scales(op, sfb, axes_b, problem.n, grans.n, per_row, grans.k_b, problem.k, stream, scratch_b, 0,
                                 sm100 || problem.sfb_is_packed);
    if (problem.sfb_is_packed) {
        const SelectionLimits limits = selection_limits(sfa.get_device_index());
        const bool scalable = sfa.scalar_type() != ScalarType::Float;
        if (scalable && takes_bf16_tokens(problem, true, limits)) {
            return make_bf16_tokens(op, problem, sfa, axes_a, grans, true, tokens, stream);
        }
        if (takes_bf16_tokens(problem, false, limits)) {
            make_bf16_tokens(op, problem, sfa, axes_a, grans, false, tokens, stream);
        }
    }
    problem.sfa = prepare_scales(op, sfa, axes_a, problem.m, grans.m, true, gran_k, problem.k, stream, scratch_a, 0, sm100,
                                 static_cast<int>(grans.k / gran_k),
                                 problem.layout == GroupLayout::kMasked ? problem.group_layout : nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Results

void check_out_dtype(const char* op, ScalarType dtype) {
    if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Float) {
        fail(op, "out_dtype", "value", text(dtype), "bfloat16 or float32");
    }
}

void check_result(const char* op, const char* names, const char* last_name, std::span<const int64_t> shape,
                  const TensorInfo* c, ScalarType out_dtype, const TensorInfo* out) {
    const auto has_shape = [](const TensorInfo& x, std::span<const int64_t> expected) {
        const auto sizes = x.sizes();
        return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
    };
    if (out) {
        check_dtype(op, "out", *out, {ScalarType::BFloat16, ScalarType::Float});
        if (!has_shape(*out, shape)) {
            fail(op, "out", "shape", text(out->sizes()), std::string(names) + " = " + text(shape));
        }
        check_inner_stride(op, "out", *out, nullptr);
        check_rows_apart(op, "out", *out);
    }
    if (!c) return;
    const ScalarType dtype = out ? out->scalar_type() : out_dtype;
    if (c->scalar_type() != dtype) {
        fail(op, "c", "dtype", text(c->scalar_type()), text(dtype), "the dtype of the result");
    }
    if (!has_shape(*c, shape) && !has_shape(*c, shape.last(1))) {
        fail(op, "c", "shape", text(c->sizes()),
             std::string(names) + " or [" + last_name + "] = " + text(shape) + " or " + text(shape.last(1)));
    }
    check_inner_stride(op, "c", *c, nullptr);
}

Result::Result(std::span<const int64_t> shape, ScalarType dtype, const TensorInfo& like, const TensorInfo* given_out)
    : out(given_out), fresh_dtype(dtype), sizes{}, strides{} {
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        sizes[i] = shape[i];
        strides[i] = out ? out->stride(i) : stride;
        stride *= std::max<int64_t>(shape[i], 1);
    }
    if (out) return;
    allocated.reset(new_empty_strided(shape, std::span(strides).first(shape.size()), dtype, like.get()));
}

void Result::zero() const { STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(handle())); }

void Result::fill(const TensorInfo* c) const {
    if (c == nullptr) return zero();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(handle(), c->get(), 0));
}

void set_result(GemmProblem& problem, const Result& result, Axes axes, const TensorInfo* c) {
    // Strides of dimensions of one element are never used, but may keep the kernel from storing in one piece.
    const int64_t n = result.sizes[axes.k];
    const auto row_stride = [&](int64_t stride) { return result.sizes[axes.mn] > 1 ? stride : n; };
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(result.handle(), &problem.d));
    problem.d_stride = row_stride(result.strides[axes.mn]);
    problem.d_type = result.dtype() == ScalarType::Float ? DataType::kFloat32 : DataType::kBFloat16;
    const bool groups = axes.group >= 0 && result.sizes[axes.group] > 1;
    if (groups) problem.d_group_stride = result.strides[axes.group];
    if (c == nullptr) return;
    problem.c = c->data_ptr();
    if (c->dim() == 1) return;  // a bias: strides of 0
    problem.c_stride = row_stride(c->stride(axes.mn));
    if (groups) problem.c_group_stride = c->stride(axes.group);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch

bool check_architecture(const char* op, int device) {
    const int capability = compute_capability(device);
    if (capability != 90 && capability != 100) {
        fail(op, "a", "architecture", "sm_" + std::to_string(capability), "sm_90 or sm_100");
    }
    return capability == 100;
}

void check_enqueued(cudaError_t error, const char* op, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + what + " failed: " + cudaGetErrorString(error));
    }
}

namespace {

// SM90: B as FP8 for the rows of FP8, and then those columns again for which that was not exact, if there are any: the device
// knows.
void run_folded(const char* op, const GemmProblem& problem, int row, const SelectionLimits& limits, const TensorInfo& like,
                cudaStream_t stream) {
    cast::FoldFp4Problem fold;
    fold.x = problem.b;
    fold.x_stride = problem.b_stride / 2;
    fold.x_batch_stride = problem.b_group_stride / 2;
    fold.sf = problem.sfb.data;
    fold.sf_stride = problem.sfb.stride_k;
    fold.sf_batch_stride = problem.sfb.stride_group;
    fold.rows = problem.n;
    fold.cols = problem.k;
    fold.batch = problem.num_groups;
    if (problem.layout != GroupLayout::kNone && problem.layout != GroupLayout::kIndices) {
        fold.group_layout = problem.group_layout;
        fold.ends = problem.layout != GroupLayout::kMasked;
    }
    OwnedTensor values, scales, flags;
    const auto allocate = [&](OwnedTensor& tensor, std::array<int64_t, 3> sizes, ScalarType type) {
        const std::array<int64_t, 3> strides = {sizes[1] * sizes[2], sizes[2], 1};
        tensor.reset(new_empty_strided(sizes, strides, type, like.get()));
        return TensorInfo(tensor.get()).data_ptr();
    };
    fold.out = allocate(values, {fold.batch, fold.rows, fold.cols}, ScalarType::Float8_e4m3fn);
    fold.out_stride = fold.cols;
    fold.out_batch_stride = fold.rows * fold.cols;
    fold.block_sf =
        static_cast<float*>(allocate(scales, {fold.batch, fold.row_blocks(), fold.col_blocks()}, ScalarType::Float));
    fold.inexact = static_cast<uint8_t*>(allocate(flags, {1, 1, fold.inexact_bytes()}, ScalarType::Byte));
    check_enqueued(cast::launch_fold_fp4(fold, stream, knobs().pdl), op, "folding FP4");

    GemmProblem fp8 = folded_fp4(problem);
    fp8.b = fold.out;
    fp8.b_stride = fold.out_stride;
    fp8.b_group_stride = fold.out_batch_stride;
    fp8.sfb = {fold.block_sf, fold.col_blocks(), 1, 128, fold.row_blocks() * fold.col_blocks()};
    DeviceBackend backend(like.get_device_index(), stream);
    run_gemm(fp8, limits, row, knobs().pdl, backend);
    GemmProblem again = problem;
    again.blocks_to_redo = fold.inexact;
    run_gemm(again, limits, choose_row_cached(gemm_rows(), problem, limits).row, knobs().pdl, backend);
}

}  // namespace

void run_product(const char* op, const GemmProblem& problem, const TensorInfo& like, cudaStream_t stream) {
    const int device = like.get_device_index();
    const SelectionLimits limits = selection_limits(device);
    const bool sm100 = compute_capability(device) == 100;
    int row = knobs().forced_row;
    if (!sm100 && can_fold_fp4(problem)) {
        // A forced row is one of either form.
        const GemmProblem folded = folded_fp4(problem);
        const Choice fp8 = row < 0 ? choose_row_cached(gemm_rows(), folded, limits) : Choice{row, 0};
        const bool folds = row >= 0 ? row < static_cast<int>(gemm_rows().size()) && !operand_mismatch(gemm_rows()[row], folded)
                                    : fp8.row >= 0 && fp8.cost_us + fold_fp4_us(problem) <
                                                          choose_row_cached(gemm_rows(), problem, limits).cost_us;
        if (folds) return run_folded(op, problem, fp8.row, limits, like, stream);
    }
    if (row < 0) {
        row = choose_row_cached(sm100 ? sm100_gemm_rows() : gemm_rows(), problem, limits).row;
    } else if (sm100) {
        row -= static_cast<int>(gemm_rows().size());  // as dg_instances() counts
        if (row < 0) throw std::runtime_error("gemm: the forced row is one of sm_90a");
    }
    DeviceBackend backend(device, stream);
    (sm100 ? run_sm100_gemm : run_gemm)(problem, limits, row, knobs().pdl, backend);
}

}  // namespace deep_gemm::ops
