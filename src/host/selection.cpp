#include "selection.h"

#include <algorithm>
#include <cmath>

namespace deep_gemm {

namespace {

constexpr double kClockGHz = 1.7;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* reason_against(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits) {
    if (row.gran_k != problem.gran_k) return "another gran_k";
    if (row.scaling == kScaling1D2D && (problem.sfa.gran_mn != 1 || problem.sfb.gran_mn != 128)) {
        return "needs scales of A per row and of B per 128 x 128 block";
    }
    if (row.cluster_size() > limits.num_sms) return "a cluster of more CTAs than SMs may be used";
    if (row.block_m() % limits.block_m_multiple_of != 0) return "block_m is not the multiple asked for";
    if (row.block_n() % limits.block_n_multiple_of != 0) return "block_n is not the multiple asked for";
    return nullptr;
}

double cost_us(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits) {
    const int64_t rows = row.swap_ab ? problem.n : problem.m;
    const int64_t cols = row.swap_ab ? problem.m : problem.n;
    const int64_t tiles = ceil_div(rows, row.block_rows * row.row_ctas) *
                          ceil_div(cols, row.block_cols * row.col_ctas);
    const int64_t clusters = std::min<int64_t>(tiles, resident_clusters(row.cluster_size(), limits.num_sms));
    const int64_t waves = ceil_div(tiles, clusters);
    const double k_blocks = std::ceil(ceil_div(problem.k, 128) / static_cast<double>(row.split_k));

    // Clocks of one K block in one CTA: tensor core, promotion, and shared-memory fill from L2.
    const double warpgroups = row.block_rows / 64;
    const double tensor = warpgroups * 4 * std::max(row.block_cols / 2.0, 16.0);
    const double serial = 4 * std::max(row.block_cols / 2.0, 16.0) + row.block_cols / 2.0 + 120;
    const double bytes = 128.0 * (static_cast<double>(row.block_rows) / row.col_ctas +
                                  static_cast<double>(row.block_cols) / row.row_ctas);
    const double fill = bytes / 56;
    const double block_clocks = std::max({tensor * 1.15, serial, fill});
    const double epilogue = 700 + row.block_rows * row.block_cols * (problem.d_type == DataType::kFloat32 ? 0.12 : 0.04) +
                            (row.split_k > 1 ? 1200 : 0);
    const double compute = waves * (k_blocks * block_clocks + epilogue);

    // Device memory: each operand once, D once. A CTA takes part in it only as far as it loads by itself.
    const double unique = static_cast<double>(problem.m) * problem.k + static_cast<double>(problem.n) * problem.k +
                          static_cast<double>(problem.m) * problem.n * size_of(problem.d_type);
    const double busy = static_cast<double>(clusters * row.cluster_size());
    const double bytes_per_clock = std::min(4.0e3 / kClockGHz * 0.9, busy * 40);
    const double memory = unique / bytes_per_clock;

    return (std::max(compute, memory) + 0.15 * std::min(compute, memory) + 3000) / (kClockGHz * 1000);
}

}  // namespace

std::string row_name(const GemmRow& row) {
    std::string name = row.scaling == kScaling1D2D ? "sm90_fp8_1d2d" : "sm90_fp8_1d1d";
    name += "_m" + std::to_string(row.block_m()) + "n" + std::to_string(row.block_n());
    if (row.gran_k != 128) name += "_gran" + std::to_string(row.gran_k);
    if (row.swap_ab) name += "_swap";
    if (row.row_ctas > 1) name += "_rows" + std::to_string(row.row_ctas);
    if (row.col_ctas > 1) name += "_cols" + std::to_string(row.col_ctas);
    if (row.split_k > 1) name += "_splitk" + std::to_string(row.split_k);
    if (row.ctas_per_sm > 1) name += "_2perSM";
    return name;
}

int resident_clusters(int cluster_size, int num_sms) {
    // A cluster does not cross the groups of 16 or 18 SMs that share a part of the chip: on an H200 clusters of 4 or 8
    // reach 120 of 132 SMs (cudaOccupancyMaxActiveClusters).
    const int reachable = cluster_size <= 2 ? num_sms : num_sms - num_sms / 11;
    return std::max(1, reachable / cluster_size);
}

std::vector<Candidate> rate_rows(std::span<const GemmRow> rows, const GemmProblem& problem,
                                 const SelectionLimits& limits) {
    std::vector<Candidate> candidates;
    for (size_t i = 0; i < rows.size(); ++i) {
        const char* reason = reason_against(rows[i], problem, limits);
        candidates.push_back({static_cast<int>(i), reason ? 0 : cost_us(rows[i], problem, limits), reason});
    }
    return candidates;
}

int select_row(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits) {
    int best = -1;
    double best_cost = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (reason_against(rows[i], problem, limits) != nullptr) continue;
        const double cost = cost_us(rows[i], problem, limits);
        if (best < 0 || cost < best_cost) {
            best = static_cast<int>(i);
            best_cost = cost;
        }
    }
    return best;
}

}  // namespace deep_gemm
