#include <vector>

#include "../host/knobs.h"
#include "cast_checks.h"
#include "cast_ops.h"

namespace deep_gemm::ops {

namespace {

bool is_packed(const Tensor& sf) { return sf.scalar_type() == ScalarType::Int; }

cast::ScaleType scale_type(const Tensor& sf) {
    return is_packed(sf)                                        ? cast::ScaleType::kPackedUE8M0
           : sf.scalar_type() == ScalarType::Float8_e8m0fnu ? cast::ScaleType::kE8M0
                                                                : cast::ScaleType::kFloat32;
}

void check_scales_rank(const char* op, const Tensor& sf) {
    if (sf.dim() != 2 && sf.dim() != 3) fail(op, "sf", "rank", sf.dim(), "2 or 3");
    constexpr const char* kDimensions[] = {"groups", "MN", "K groups"};
    for (int64_t i = 0; i < sf.dim(); ++i) check_size(op, "sf", kDimensions[i + 3 - sf.dim()], sf.size(i));
}

// `shape` with its second last dimension contiguous and the one after it 16-byte aligned.
std::vector<int64_t> mn_major_strides(const std::vector<int64_t>& shape) {
    const int64_t columns = shape.back(), aligned = align_4(shape[shape.size() - 2]);
    if (shape.size() == 3) return {aligned * columns, 1, aligned};
    return {1, aligned};
}

// Copies `sf` with k_sf scales along K to an MN-major tensor of mn rows, allocated here when absent.
Tensor run_layout(const char* op, const Tensor& sf, int64_t mn, int64_t k_sf, int mn_repeat, bool to_packed,
                  const Tensor* given_out, bool round_up = false) {
    const bool batched = sf.dim() == 3;
    std::vector<int64_t> shape = {mn, to_packed ? ceil_div(k_sf, 4) : k_sf};
    if (batched) shape.insert(shape.begin(), sf.size(0));
    const std::vector<int64_t> strides = mn_major_strides(shape);
    const ScalarType dtype = to_packed ? ScalarType::Int : ScalarType::Float;
    if (given_out) {
        check_device(op, "out", *given_out, sf, "sf");
        check_dtype(op, "out", *given_out, {dtype});
        check_shape(op, "out", *given_out, "the shape of the result", shape);
        check_exact_strides(op, "out", *given_out, strides);
    }

    const DeviceGuard guard(sf.get_device_index());
    Tensor out = given_out ? *given_out : empty_strided(shape, strides, dtype, sf);
    if (out.numel() == 0) return out;
    cast::ScaleLayoutProblem problem;
    problem.src = sf.data_ptr();
    problem.src_type = scale_type(sf);
    problem.src_batch_stride = batched ? sf.stride(0) : 0;
    problem.src_mn_stride = sf.stride(sf.dim() - 2);
    problem.src_k_stride = sf.stride(sf.dim() - 1);
    problem.dst = out.data_ptr();
    problem.dst_type = to_packed ? cast::ScaleType::kPackedUE8M0 : cast::ScaleType::kFloat32;
    problem.dst_batch_stride = batched ? strides[0] : 0;
    problem.dst_k_stride = strides.back();
    problem.batch = batched ? sf.size(0) : 1;
    problem.mn = mn;
    problem.k_sf = k_sf;
    problem.mn_repeat = mn_repeat;
    problem.round_up = round_up;
    check_launch(cast::launch_scale_layout(problem, current_stream(sf), knobs().pdl), op, "sf");
    return out;
}

Tensor run_mn_major(const char* op, const Tensor& sf, bool to_packed, const Tensor* given_out, bool round_up = false) {
    check_dtype(op, "sf", sf, {ScalarType::Float});
    check_scales_rank(op, sf);
    return run_layout(op, sf, sf.size(sf.dim() - 2), sf.size(sf.dim() - 1), 1, to_packed, given_out, round_up);
}

Tensor run_expand(const Tensor& sf, int64_t k_sf, const Tensor* given_out) {
    const char* op = "expand_ue8m0";
    check_dtype(op, "sf", sf, {ScalarType::Float8_e8m0fnu, ScalarType::Int});
    check_scales_rank(op, sf);
    if (k_sf < 0 || k_sf > kMaxSize) fail(op, "k_sf", "value", k_sf, "0 to " + std::to_string(kMaxSize));
    const auto sizes = sf.sizes();
    std::vector<int64_t> expected(sizes.begin(), sizes.end());
    expected.back() = is_packed(sf) ? ceil_div(k_sf, 4) : k_sf;
    if (!has_shape(sf, expected)) {
        const std::string leading = sf.dim() == 3 ? "[G, MN, " : "[MN, ";
        fail_shape(op, "sf", sf, leading + (is_packed(sf) ? "ceil(k_sf / 4)]" : "k_sf]"), expected);
    }
    return run_layout(op, sf, sf.size(sf.dim() - 2), k_sf, 1, false, given_out);
}

}  // namespace

Tensor get_mn_major_tma_aligned_tensor(Tensor sf) {
    return run_mn_major("get_mn_major_tma_aligned_tensor", sf, false, nullptr);
}

void get_mn_major_tma_aligned_tensor_out(Tensor sf, Tensor out) {
    run_mn_major("get_mn_major_tma_aligned_tensor", sf, false, &out);
}

Tensor get_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, bool round_up) {
    return run_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, true, nullptr, round_up);
}

void get_mn_major_tma_aligned_packed_ue8m0_tensor_out(Tensor sf, bool round_up, Tensor out) {
    run_mn_major("get_mn_major_tma_aligned_packed_ue8m0_tensor", sf, true, &out, round_up);
}

Tensor expand_ue8m0(Tensor sf, int64_t k_sf) { return run_expand(sf, k_sf, nullptr); }

void expand_ue8m0_out(Tensor sf, int64_t k_sf, Tensor out) { run_expand(sf, k_sf, &out); }

Tensor get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(Tensor sf, Tensor ks, int64_t gran_k) {
    const char* op = "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor";
    check_dtype(op, "sf", sf, {ScalarType::Float});
    check_rank(op, "sf", sf, 2);
    check_dtype(op, "ks", ks, {ScalarType::Int});
    check_rank(op, "ks", ks, 1);
    check_device(op, "ks", ks, sf, "sf");
    check_size(op, "sf", "K groups", sf.size(0));
    check_size(op, "sf", "MN", sf.size(1));
    check_gran_k(op, gran_k);

    const DeviceGuard guard(sf.get_device_index());
    const int64_t rows = sf.size(0), mn = sf.size(1), num_groups = ks.size(0);
    // The most words that any sizes need: the host does not know them.
    const std::vector<int64_t> shape = {(rows + 3 * num_groups) / 4, mn}, strides = {align_4(mn), 1};
    Tensor out = empty_strided(shape, strides, ScalarType::Int, sf);
    if (out.numel() == 0) return out;
    cast::GroupedPackProblem problem;
    problem.src = static_cast<const float*>(sf.data_ptr());
    problem.src_k_stride = sf.stride(0);
    problem.src_mn_stride = sf.stride(1);
    problem.sf_rows = rows;
    problem.mn = mn;
    problem.ks = static_cast<const int32_t*>(ks.data_ptr());
    problem.ks_stride = ks.stride(0);
    problem.num_groups = num_groups;
    problem.gran_k = static_cast<int>(gran_k);
    problem.dst = out.data_ptr();
    problem.dst_k_stride = strides[0];
    problem.dst_rows = shape[0];
    check_launch(cast::launch_k_grouped_pack_ue8m0(problem, current_stream(sf), knobs().pdl), op, "sf");
    return out;
}

Tensor transform_sf_into_required_layout(Tensor sf, int64_t mn, int64_t k, std::vector<int64_t> recipe,
                                         std::optional<int64_t> num_groups, std::optional<bool> is_sfa,
                                         bool disable_ue8m0_cast, bool round_up) {
    const char* op = "transform_sf_into_required_layout";
    check_dtype(op, "sf", sf, {ScalarType::Float, ScalarType::Float8_e8m0fnu, ScalarType::Int});
    const auto is_gran_mn = [](int64_t gran) { return gran == 1 || gran == 128; };
    int64_t gran_mn = 0;
    if (recipe.size() == 3) {
        if (!is_sfa) fail(op, "is_sfa", "value", "None", "True or False", "the recipe has three entries");
        gran_mn = recipe[*is_sfa ? 0 : 1];
    } else if (recipe.size() == 2) {
        if (is_sfa) fail(op, "is_sfa", "value", *is_sfa ? "True" : "False", "None", "the recipe has two entries");
        gran_mn = recipe[0];
    } else {
        fail(op, "recipe", "length", static_cast<int64_t>(recipe.size()), "2 or 3");
    }
    const int64_t gran_k = recipe.back();
    if (!is_gran_mn(recipe[0]) || (recipe.size() == 3 && !is_gran_mn(recipe[1])) || (gran_k != 128 && gran_k != 32)) {
        fail(op, "recipe", "value", text(std::span<const int64_t>(recipe)),
             recipe.size() == 3 ? "[1 or 128, 1 or 128, 128 or 32]" : "[1 or 128, 128 or 32]");
    }
    if (mn < 0 || mn > kMaxSize) fail(op, "mn", "value", mn, "0 to " + std::to_string(kMaxSize));
    if (k < 0 || k > kMaxSize) fail(op, "k", "value", k, "0 to " + std::to_string(kMaxSize));
    check_rank(op, "sf", sf, num_groups ? 3 : 2);
    const int64_t k_sf = ceil_div(k, gran_k);
    std::vector<int64_t> expected = {ceil_div(mn, gran_mn), is_packed(sf) ? ceil_div(k_sf, 4) : k_sf};
    if (num_groups) expected.insert(expected.begin(), *num_groups);
    if (!has_shape(sf, expected)) {
        const std::string leading = num_groups ? "[num_groups, " : "[";
        fail_shape(op, "sf", sf,
                   leading + (gran_mn == 1 ? "mn" : "ceil(mn / 128)") + ", ceil(k / " +
                       std::to_string(is_packed(sf) ? gran_k * 4 : gran_k) + ")]",
                   expected);
    }

    const DeviceGuard guard(sf.get_device_index());
    // SM90 reads float32 scales of either granularity, SM100 a packed scale for every row.
    const bool to_float =
        compute_capability() < 100 || (sf.scalar_type() == ScalarType::Float && disable_ue8m0_cast);
    if (to_float) return run_layout(op, sf, ceil_div(mn, gran_mn), k_sf, 1, false, nullptr);
    return run_layout(op, sf, mn, k_sf, static_cast<int>(gran_mn), true, nullptr, round_up);
}

}  // namespace deep_gemm::ops
