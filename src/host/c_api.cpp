// The C functions that deep_gemm_ops/_capi.py calls: knobs, the table, selection, and a GEMM on a caller's backend.
#include <sstream>
#include <string>

#include "callback_backend.h"
#include "gemm.h"
#include "gemm_sm100.h"
#include "knobs.h"
#include "prenorm_gemm.h"

#define DG_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace deep_gemm;

constexpr const char* kGroupings[] = {"dense", "m_grouped", "k_grouped", "batched", "summed"};

std::string json_row(int index, int row_idx, const GemmRow& row) {
    const bool sm100 = row.arch == 100;
    const RowResources resources = sm100 ? sm100_row_resources(row) : row_resources(row);
    const char* scaling = row.scaling == kScaling1D2D    ? "1d2d"
                          : row.scaling == kScaling1D1D  ? "1d1d"
                          : row.scaling == kUE8M0Scaling ? "ue8m0"
                                                         : "none";
    const bool is_bf16 = row.operands == OperandType::kBF16;
    const bool has_fp4 = sm100 ? !is_bf16 : row.operands == OperandType::kFP8FP4;
    const char* family = is_bf16                                 ? "bf16_gemm"
                         : row.operands == OperandType::kBF16FP4 ? "bf16_fp4_gemm"
                         : has_fp4                               ? "fp8_fp4_gemm"
                                                                 : "fp8_gemm";
    std::ostringstream json;
    json << "{\"index\": " << index << ", \"name\": \"" << row_name(row) << "\", \"arch\": \"" << (sm100 ? "sm_100a" : "sm_90a") << "\""
         << ", \"family\": \""  << family << "\""
         << ", \"kernel\": \"" << (sm100 ? "sm100" : "sm90") << "_gemmILi" << row_idx << "E\""
         << ", \"block_m\": " << row.block_m() << ", \"block_n\": " << row.block_n()
         << ", \"block_k\": " << row.block_k() << ", \"a_mn_major\": " << (row.a_mn_major ? "true" : "false")
         << ", \"b_mn_major\": " << (row.b_mn_major ? "true" : "false")
         << ", \"swap_ab\": " << (row.swap_ab ? "true" : "false") << ", \"row_ctas\": " << row.row_ctas
         << ", \"col_ctas\": " << row.col_ctas << ", \"cluster_size\": " << row.cluster_size() << ", \"split_k\": "
         << row.split_k << ", \"k_warpgroups\": " << row.k_warpgroups << ", \"overlaps_promotion\": "
         << (row.overlaps_promotion() ? "true" : "false") << ", \"scaling\": \""
         << scaling << "\", \"gran_k\": " << row.gran_k
         << ", \"grouping\": \"" << kGroupings[static_cast<int>(row.grouping)] << "\""
         << ", \"num_stages\": " << resources.num_stages << ", \"shared_bytes\": " << resources.shared_bytes
         << ", \"num_threads\": " << resources.num_threads << "}";
    return json.str();
}

SelectionLimits limits_from_knobs(int num_sms) {
    SelectionLimits limits;
    limits.num_sms = num_sms;
    limits.block_m_multiple_of = knobs().block_m_multiple_of;
    limits.block_n_multiple_of = knobs().block_n_multiple_of;
    return limits;
}

}  // namespace

DG_EXPORT int dg_get_num_sms() { return knobs().num_sms; }
DG_EXPORT void dg_set_num_sms(int value) { knobs().num_sms = value; }
DG_EXPORT int dg_get_tc_util() { return knobs().tc_util; }
DG_EXPORT void dg_set_tc_util(int percent) { knobs().tc_util = percent; }
DG_EXPORT int dg_get_pdl() { return knobs().pdl; }
DG_EXPORT void dg_set_pdl(int enabled) { knobs().pdl = enabled != 0; }
DG_EXPORT int dg_get_mk_alignment() { return knobs().mk_alignment; }
DG_EXPORT void dg_set_mk_alignment(int value) { knobs().mk_alignment = value; }
DG_EXPORT int dg_get_block_m_multiple_of() { return knobs().block_m_multiple_of; }
DG_EXPORT int dg_get_block_n_multiple_of() { return knobs().block_n_multiple_of; }
DG_EXPORT void dg_set_block_size_multiple_of(int m, int n) {
    knobs().block_m_multiple_of = m;
    knobs().block_n_multiple_of = n;
}
DG_EXPORT int dg_get_forced_instance() { return knobs().forced_row; }
DG_EXPORT void dg_force_instance(int index) { knobs().forced_row = index; }

// JSON array with one object per row of the tables, those of SM100 behind those of SM90; lives as long as the library.
DG_EXPORT const char* dg_instances() {
    static const std::string json = [] {
        std::string text = "[";
        int index = 0;
        for (const auto rows : {gemm_rows(), sm100_gemm_rows()}) {
            for (size_t i = 0; i < rows.size(); ++i, ++index) {
                if (index > 0) text += ",\n ";
                text += json_row(index, static_cast<int>(i), rows[i]);
            }
        }
        return text + "]";
    }();
    return json.c_str();
}

// JSON object {"row", "name", "candidates": [{"index", "name", "cost_us", "reason"}]} for a problem; row is -1 where none
// fits. Valid until the next call on the same thread.
DG_EXPORT const char* dg_select(int64_t m, int64_t n, int64_t k, int gran_m, int gran_n, int gran_k, int d_is_float,
                                int num_sms, int grouping, int layout, int64_t num_groups, int group_alignment,
                                int64_t expected_m, int is_bf16, int a_mn_major, int b_mn_major, int a_is_fp4,
                                int b_is_fp4, int sfb_is_packed, int arch) {
    static thread_local std::string json;
    GemmProblem problem;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    problem.sfa.gran_mn = gran_m;
    problem.sfb.gran_mn = gran_n;
    problem.gran_k = gran_k;
    problem.d_type = d_is_float ? DataType::kFloat32 : DataType::kBFloat16;
    problem.operands = is_bf16 ? OperandType::kBF16 : OperandType::kFP8;
    problem.a_mn_major = a_mn_major != 0;
    problem.b_mn_major = b_mn_major != 0;
    problem.grouping = static_cast<Grouping>(grouping);
    problem.layout = static_cast<GroupLayout>(layout);
    problem.num_groups = num_groups;
    problem.group_alignment = group_alignment;
    problem.expected_m = expected_m;
    problem.a_is_fp4 = a_is_fp4 != 0;
    problem.b_is_fp4 = b_is_fp4 != 0;
    problem.sfb_is_packed = sfb_is_packed != 0;
    const auto rows = arch == 100 ? sm100_gemm_rows() : gemm_rows();
    const int first = arch == 100 ? static_cast<int>(gemm_rows().size()) : 0;  // as dg_instances() counts
    const SelectionLimits limits = limits_from_knobs(num_sms);
    const int selected = select_row(rows, problem, limits);
    std::ostringstream text;
    text << "{\"row\": " << (selected < 0 ? selected : first + selected) << ", \"name\": \"" << (selected < 0 ? "" : row_name(rows[selected]))
         << "\", \"candidates\": [";
    const char* separator = "";
    for (const Candidate& candidate : rate_rows(rows, problem, limits)) {
        text << separator << "{\"index\": " << first + candidate.row << ", \"name\": \"" << row_name(rows[candidate.row])
             << "\", \"cost_us\": ";
        separator = ", ";
        if (candidate.reason == nullptr) {
            text << candidate.cost_us << ", \"reason\": null}";
        } else {
            text << "null, \"reason\": \"" << candidate.reason << "\"}";
        }
    }
    text << "]}";
    json = text.str();
    return json.c_str();
}

// Runs a problem on host memory through the callbacks; `row` counts as in dg_instances(). Returns 0, or 1 with the message
// in `error`.
DG_EXPORT int dg_run_gemm(const GemmProblem* problem, int row, int num_sms, EncodeTiledFunction encode,
                              LaunchCallback launch, char* error, size_t error_size) {
    return run_on_callbacks(encode, launch, error, error_size, [&](Backend& backend) {
        const int sm90_rows = static_cast<int>(gemm_rows().size());
        if (row < sm90_rows) {
            run_gemm(*problem, limits_from_knobs(num_sms), row, false, backend);
        } else {
            run_sm100_gemm(*problem, limits_from_knobs(num_sms), row - sm90_rows, false, backend);
        }
    });
}

// As a device chooses it that has room for as many clusters as its SMs make.
DG_EXPORT void dg_prenorm_plan(int64_t m, int64_t n, int64_t k, int arch, int num_sms, PrenormPlan* plan) {
    CallbackBackend backend(nullptr, nullptr);
    *plan = prenorm_plan(m, n, k, arch, num_sms, backend);
}

DG_EXPORT size_t dg_prenorm_workspace_bytes(int64_t m, int64_t n, int64_t num_splits) {
    return prenorm_workspace_bytes(m, n, num_splits);
}

// As dg_run_fp8_gemm.
DG_EXPORT int dg_run_prenorm_gemm(const PrenormGemmProblem* problem, int arch, int num_sms, EncodeTiledFunction encode,
                                  LaunchCallback launch, char* error, size_t error_size) {
    return run_on_callbacks(encode, launch, error, error_size, [&](Backend& backend) {
        run_prenorm_gemm(*problem, arch, num_sms, false, backend);
    });
}
