// What selection (selection.cpp) asks of a row for SM100. No Blackwell GPU has run these kernels: the constants are the
// hardware's published rates, none is a measurement.
#include <algorithm>
#include <cmath>

#include "../sm100/gemm_traits.h"
#include "gemm_sm100.h"

namespace deep_gemm {

namespace {

constexpr double kClockGHz = 1.85;          // of a B200 under load; all clocks below are of this rate
constexpr double kStepClocks = 0.5;         // tensor core: an instruction of 128 rows and 32 bytes of K, per column
constexpr double kSharedBytes = 128;        // per clock and SM, read by the tensor core
constexpr double kFillBytes = 64;           // per clock and SM, from L2
constexpr double kMemoryBytes = 8.0e3 / kClockGHz;  // per clock, from and to device memory: 8 TB/s
constexpr double kTensorReadBytes = 512;    // per clock and SM, from tensor memory: 16 for each of 32 lanes
constexpr double kStoreBytes = 32;          // per clock and SM, to L2

// Guesses, to rank rows: as on SM90, where they were measured.
constexpr double kLaunchClocks = 4500;      // before the first K block and after the last store
constexpr double kFirstBlockClocks = 1000;  // of a tile whose loads are not hidden behind the tile before
constexpr double kTileClocks = 200;         // between the last K block of a tile and the first one of the next
constexpr double kClusterClocks = 1500;     // clusters, whose CTAs start and end together
constexpr double kReduceClocks = 700;       // split K: to meet the other CTAs of a tile
constexpr double kReduceColumnClocks = 16;  // more of them per column of the tile

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double together(double a, double b) { return std::sqrt(std::sqrt(a * a * a * a + b * b * b * b)); }

}  // namespace

std::string sm100_row_name(const GemmRow& row) {
    std::string name = row.scaling == kNoScaling ? "sm100_bf16" : "sm100_mx";
    name += "_m" + std::to_string(row.swap_ab ? row.tile_cols() : row.tile_rows()) + "n" +
            std::to_string(row.swap_ab ? row.tile_rows() : row.tile_cols());
    name += grouping_suffix(row.grouping);
    if (row.swap_ab) name += "_swap";
    if (row.row_ctas > 1) name += "_pair";
    if (row.split_k > 1) name += "_splitk" + std::to_string(row.split_k);
    return name;
}

const char* sm100_reason_against(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits) {
    if (row.operands != problem.operands) return row.operands == OperandType::kBF16 ? "for BF16" : "for FP8 and FP4";
    if (row.grouping != grouping_of(problem)) return "another kind of groups";
    if (!fits_alignment(row, problem)) return "its tiles do not divide the alignment of the groups";
    const sm100::GemmLayout layout{row};
    if (layout.has_ragged_k() && !layout.scaled() && !(problem.a_mn_major && problem.b_mn_major)) {
        return "for MN-major operands";
    }
    if (layout.has_ragged_k() && problem.a_mn_major != problem.b_mn_major) return "for operands in one order";
    const bool cols_mn_major = row.swap_ab ? problem.a_mn_major : problem.b_mn_major;
    // The rows' 128 are as many spans as they need to be.
    if (cols_mn_major && sm100::mn_major_span(layout.own_cols(), layout.element_bytes()) == 0) {
        return "too few columns for an MN-major operand";
    }
    if (row.cluster_size() > limits.num_sms) return "a cluster of more CTAs than SMs may be used";
    if (row.block_m() % limits.block_m_multiple_of != 0) return "block_m is not the multiple asked for";
    if (row.block_n() % limits.block_n_multiple_of != 0) return "block_n is not the multiple asked for";
    return nullptr;
}

double sm100_cost_us(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits) {
    const sm100::GemmLayout layout{row};
    // K-grouped: each group has its part of K. Summed: all groups share the tiles, and K adds up.
    const int64_t m = expected_rows(problem), n = problem.n, groups = problem.num_groups;
    const int64_t k = row.grouping == Grouping::kKGrouped ? ceil_div(problem.k, groups)
                      : row.grouping == Grouping::kSummed ? problem.k * groups
                                                          : problem.k;
    const int64_t results = row.grouping == Grouping::kSummed ? 1 : groups;
    const int64_t tiles = ceil_div(n, row.tile_n()) * (row.grouping == Grouping::kMGrouped
                                                           ? tiles_along_m(row, problem)
                                                           : ceil_div(m, row.tile_m()) * results);
    const int64_t resident = resident_clusters(row.cluster_size(), limits.num_sms);
    const double d_bytes = size_of(problem.d_type);

    // A K block of a CTA: products, operands out of shared memory and into it. A pair's CTAs read their halves of the
    // columns once, for both.
    const double stage_bytes = layout.row_tile_bytes() + layout.col_tile_bytes();
    const double products = sm100::kSteps * kStepClocks * row.block_cols;
    const double block = std::max({products, stage_bytes / kSharedBytes, stage_bytes / kFillBytes});

    // A tile, whose epilogue hides behind the next one's products if it is the shorter of the two.
    const double k_blocks = static_cast<double>(ceil_div(ceil_div(k, layout.block_k()), row.split_k));
    const double accumulator = sm100::kBlockRows * static_cast<double>(row.block_cols);
    double epilogue = 4 * accumulator / kTensorReadBytes + d_bytes * accumulator / row.split_k / kStoreBytes;
    if (row.split_k > 1) epilogue += kReduceClocks + kReduceColumnClocks * row.block_cols;
    const double tile = std::max(k_blocks * block + kTileClocks, epilogue);

    const double waves = static_cast<double>(ceil_div(tiles, resident));
    const double item = problem.operands == OperandType::kBF16 ? 2 : 1;
    const double bytes = static_cast<double>(results) *
                         (static_cast<double>(m) * k * (problem.a_is_fp4 ? 0.5 : item) +
                          static_cast<double>(n) * k * (problem.b_is_fp4 ? 0.5 : item) +
                          static_cast<double>(m) * n * d_bytes);
    const double used = static_cast<double>(std::min(tiles, resident)) * row.cluster_size() / limits.num_sms;
    const double memory = bytes / kMemoryBytes / std::min(1.0, 2 * used);  // half of the SMs can load at full rate
    const double start = kLaunchClocks + kFirstBlockClocks + (row.cluster_size() > 1 ? kClusterClocks : 0);
    const double clocks = start + epilogue + together(waves * tile, memory);
    return clocks / (kClockGHz * 1000);
}

}  // namespace deep_gemm
