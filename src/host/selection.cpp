#include "selection.h"

#include <algorithm>
#include <cmath>

#include "gemm_sm100.h"

namespace deep_gemm {

namespace {

constexpr double kClockGHz = 1.98;    // of an SM that is not short of power; all clocks below are of this rate
constexpr double kColumnClocks = 2;   // tensor core: a K block of 64 rows, per column
constexpr double kLeastColumns = 32;  // an instruction of fewer columns takes as long

// What the cost model takes from measurements on an H200. bench/fit_selection.py fits these constants and shows how far choices
// made with them are from the fastest row. They serve to rank rows: a fit trades one for another, contention for promotion say, so
// that none of them is a measurement of what it stands for.
struct CostModel {
    double launch = 4085;             // clocks before the first K block and after the last store
    double cluster_launch = 645.2;    // more of them with clusters, whose CTAs start and end together
    double block_latency = 155.8;     // clocks of a K block to wait for a barrier and to read scales
    double unscaled_block = 172.2;    // BF16: clocks of a K block at least, from its barrier to the next one's
    double unscaled_fill_bytes = 62.56; // BF16: fill_bytes
    double unscaled_power = 0.35;     // BF16: power
    double result_latency = 17.35;    // clocks from a warpgroup's last instruction for the tensor core to its result
    double promotion = 0.03151;       // clocks per column to scale 64 rows of a K block and add them to the totals
    double promotion_load = 2.876;    // more of them with swapped operands, whose few columns wait for their scales
    double promotion_change = 3.512;  // clocks per 16 columns where the block scale may change behind each of them
    double overlap_latency = 141.3;   // clocks of a K block beside its products, where its promotion overlaps the next one's
    double contention = 1.096;        // part of the other warpgroups' multiplying and promotion that delays a warpgroup
    double outside_rows = 12.75;      // rows outside a matrix that all SMs together receive per clock
    double epilogue = 836.8;          // clocks of a tile's end: drained pipeline, staging, start of the next one
    double epilogue_column = 3.403;   // more of them per column of 64 BF16 rows
    double reduce = 97.69;            // split K: clocks to meet the other CTAs of a tile
    double reduce_column = 24.61;     // more of them per column of the tile
    double combine = 125.2;           // clocks to add up what warpgroups that take turns at the K blocks have
    double combine_column = 25.66;    // more of them per column of the tile
    double memory_bytes = 2556;       // bytes per clock from and to device memory
    double fill_bytes = 79.44;        // bytes per clock from L2 into an SM
    double fill_share = 0.08192;      // what a byte from L2 into an SM takes of the time that one from memory does
    double sm_share = 1.129;          // what an SM takes of the memory's bandwidth at most, times the number of SMs
    double last_wave = 0.2491;        // the share of the last wave's clusters, as a power of their number
    double power = 0.2967;            // more clocks where all tensor cores are busy all the time: the chip slows down
    double three_warpgroups = 0.9732; // clocks with them, which keep the tensor core busier, as a part of what the rest says
    double largest_bf16 = 1.022;      // likewise with BF16 tiles of 128 x 256 in full waves
    double four_share = 0.9266;       // likewise where four CTAs share tokens
    // FP4 weights, and scales per row of both operands, which no sweep has: fitted to other products before.
    double other_block_latency = 94;
    double other_result_latency = 79;
    double other_promotion = 0.78;
    double other_promotion_load = 2.0;
    double other_contention = 0.44;
    // FP4 weights: counted instructions of a warp for a K block of 64 rows, and clocks for each. Integer ones, most of the
    // expansion, issue every other clock; the number is from products with scales of A per 32 of K on an H200.
    double instruction = 1.75;
    double expansion = 140;           // loads, look-ups, addresses
    double expansion_promotion = 4.85; // more of them per column
    double fold = 185;                // the first with scales of A per 128 of K, and with those of B as a part of the values
    double fold_promotion = 1.75;     // more of them per column
    double bf16_expansion = 290;      // clocks, not fitted: 230 instructions, most of which no longer are integer ones
    double bf16_promotion = 1.2;      // ... per column with scales of A per 128 of K, not fitted
    double tokens_kernel = 2.5;       // us, not fitted: the start of the kernel that makes BF16 of tokens
    double small_kernels = 4.5;       // us, not fitted: the start of the kernel that folds, and one that finds nothing to do
};
constexpr CostModel kModel;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* reason_against(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits) {
    if (row.arch == 100) return sm100_reason_against(row, problem, limits);
    if (const char* reason = operand_mismatch(row, problem)) return reason;
    if (!fits_alignment(row, problem)) return "block_m does not divide the alignment of the groups";
    if (row.swap_ab && !row.has_fp4() && row.grouping != Grouping::kMGrouped &&
        problem.m > row.block_m()) {
        return "with swapped operands one tile holds all of M";
    }
    if (row.cluster_size() > limits.num_sms) return "a cluster of more CTAs than SMs may be used";
    if (row.block_m() % limits.block_m_multiple_of != 0) return "block_m is not the multiple asked for";
    if (row.block_n() % limits.block_n_multiple_of != 0) return "block_n is not the multiple asked for";
    return nullptr;
}

// Duration of two things at a time: the longer one, and more where they are alike and get in each other's way.
double together(double a, double b) {
    const double a2 = a * a, b2 = b * b;
    return std::sqrt(std::sqrt(a2 * a2 + b2 * b2));
}

// As block_clocks(), where the rows are FP4: the warpgroups' instructions, of which the promotion is a part, are many.
double fp4_block_clocks(const GemmRow& row, double tensor, const CostModel& model) {
    const bool bf16 = row.has_bf16_a();
    const double bytes = 68.0 * row.block_rows + (bf16 ? 256.0 : 128.0) * row.block_cols;
    const double warpgroups = row.block_rows / 64 * row.k_warpgroups;
    const bool folded = row.gran_k == 128;
    double issue = model.instruction *
                   (folded ? model.fold + model.fold_promotion * row.block_cols
                           : model.expansion + model.expansion_promotion * row.block_cols);
    if (bf16) issue = model.bf16_expansion + (folded ? model.bf16_promotion * row.block_cols : 0);
    // For the tensor core: BF16 sums without scales go on meanwhile.
    const double waits = bf16 && !folded ? 0 : folded || row.block_cols <= 32 ? 1 : 4;
    const double part = waits * model.other_result_latency + tensor / (row.block_rows / 64) +
                        issue * (1 + model.other_contention * (warpgroups - 1));
    const double chain = (model.other_block_latency + part) / row.k_warpgroups;
    return std::max({chain, issue * row.block_rows / 64, tensor, bytes / model.fill_bytes});
}

// Clocks of the tensor core for a K block of a tile that has `parts` times 64 rows.
double tensor_clocks(const GemmRow& row, double parts) {
    const double clocks = parts * kColumnClocks * std::max<double>(row.block_cols, kLeastColumns);
    return row.operands == OperandType::kBF16FP4 ? 2 * clocks : clocks;  // a K block of 128 elements, as one of FP8
}

// Clocks of a K block in a CTA whose operands are all inside their matrices: one warpgroup's chain of dependent steps,
// while the tensor core works for all warpgroups and the next K blocks arrive. `parts`: 64 rows of the tile each.
double block_clocks(const GemmRow& row, int parts, const CostModel& model) {
    const double tensor = tensor_clocks(row, parts);
    if (row.has_fp4()) return fp4_block_clocks(row, tensor, model);
    const double bytes = 128.0 * 64 * parts / row.col_ctas + 128.0 * row.block_cols / row.row_ctas;
    // BF16: instructions of one block wait in line behind those of the block before, and nothing is promoted.
    if (row.scaling == kNoScaling) return std::max(together(tensor, bytes / model.unscaled_fill_bytes), model.unscaled_block);
    const int warpgroups = row.block_rows == 256 ? std::min(parts, 2) : parts;  // of one K block
    const double others = static_cast<double>(parts) / ceil_div(parts, warpgroups) * row.k_warpgroups - 1;
    const double in_turn = static_cast<double>(ceil_div(parts, warpgroups));  // parts, one after the other
    const double multiply = tensor / parts;
    const double promotions = 128 / row.gran_k;
    const bool is_swept = row.scaling == kScaling1D2D;
    const double contended = 1 + (is_swept ? model.contention : model.other_contention) * others;
    double column = is_swept ? model.promotion : 2 * model.other_promotion;
    if (is_swept && !row.swap_ab && row.block_cols > 16 && row.block_cols % 32 != 0) column += model.promotion_change / 16;
    if (row.swap_ab) column += is_swept ? model.promotion_load : model.other_promotion_load;
    const double promote = promotions * column * row.block_cols;
    if (row.overlaps_promotion()) {
        return std::max({model.overlap_latency + std::max(multiply, promote) * contended, tensor, bytes / model.fill_bytes});
    }
    const double result = is_swept ? model.result_latency : model.other_result_latency;
    const double part = promotions * result + (multiply + promote) * contended;
    // Warpgroups that take turns each work through their own K blocks.
    const double chain =
        ((is_swept ? model.block_latency : model.other_block_latency) + in_turn * part) / row.k_warpgroups;
    return std::max({chain, tensor, bytes / model.fill_bytes});
}

// The rows of a group are not known, only about how many: visit(rows), for as many as a few groups might have.
template <class Visit>
void for_each_sample(const GemmProblem& problem, Visit&& visit) {
    for (int tenths = 7; tenths <= 13; ++tenths) visit(ceil_div(expected_rows(problem) * tenths, 10));
}

// M-grouped tiles without the parts that are beyond their group: means over tiles. The last one of several, which loads all of
// their weights again, takes as long as a whole one: with 32 groups of 192 rows tiles of 256 were 6 % faster than those of 192.
struct MeanTile {
    double parts;
    double block_clocks;
};

MeanTile mean_group_tile(const GemmRow& row, const GemmProblem& problem, const CostModel& model) {
    const int all_parts = row.block_rows / 64;
    int64_t tiles = 0, parts = 0;
    double clocks = 0;
    for_each_sample(problem, [&](int64_t rows) {
        const int64_t whole = rows / row.block_rows;
        const int rest = static_cast<int>(ceil_div(rows % row.block_rows, 64));
        tiles += whole + (rest > 0);
        parts += whole * all_parts + rest;
        const double of_whole = block_clocks(row, all_parts, model);
        clocks += whole * of_whole;
        if (rest > 0) clocks += whole > 0 ? of_whole : block_clocks(row, rest, model);
    });
    return {static_cast<double>(parts) / tiles, clocks / tiles};
}

double cost_us(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits, const CostModel& model) {
    if (row.arch == 100) return sm100_cost_us(row, problem, limits);
    const int64_t m = expected_rows(problem);
    const int64_t rows = row.swap_ab ? problem.n : m;
    const int64_t cols = row.swap_ab ? m : problem.n;
    const int64_t tile_rows = row.block_rows * row.row_ctas;  // of a cluster
    const int64_t tile_cols = row.block_cols * row.col_ctas;
    const int64_t row_tiles = ceil_div(rows, tile_rows);
    const int64_t col_tiles = ceil_div(cols, tile_cols);
    // K-grouped: each group has its part of K. Summed: all groups share the tiles, and K adds up.
    const int64_t k = row.grouping == Grouping::kKGrouped ? ceil_div(problem.k, problem.num_groups)
                      : row.grouping == Grouping::kSummed ? problem.k * problem.num_groups
                                                          : problem.k;
    const int64_t results = row.grouping == Grouping::kSummed ? 1 : problem.num_groups;
    const bool is_m_grouped = problem.grouping == Grouping::kMGrouped;
    const int64_t tiles = is_m_grouped ? tiles_along_m(row, problem) * (row.swap_ab ? row_tiles : col_tiles)
                                       : row_tiles * col_tiles * results;
    const int64_t resident = resident_clusters(row.cluster_size(), limits.num_sms);
    const int64_t full_waves = tiles / resident;
    const int64_t left = tiles % resident;

    // A K block. TMA is slow where it fills in zeros, on average over the tiles:
    double outside_rows = (tile_rows - static_cast<double>(rows) / row_tiles) / row.row_ctas;
    double outside_cols = (tile_cols - static_cast<double>(cols) / col_tiles) / row.col_ctas;
    // Other groups' rows follow, or nothing is loaded.
    if (is_m_grouped || row.skips_tail()) (row.swap_ab ? outside_cols : outside_rows) = 0;
    if (row.skips_weights_tail()) (row.swap_ab ? outside_rows : outside_cols) = 0;
    const double outside = (outside_rows + outside_cols) * row.cluster_size() * std::min(tiles, resident);
    MeanTile mean = {row.block_rows / 64.0, block_clocks(row, row.block_rows / 64, model)};
    if (row.skips_row_parts() && problem.layout != GroupLayout::kIndices) mean = mean_group_tile(row, problem, model);
    const double tensor = tensor_clocks(row, mean.parts);
    const double block = together(mean.block_clocks, outside / model.outside_rows);

    // A tile.
    const double k_blocks = static_cast<double>(ceil_div(ceil_div(k, row.block_k()), row.split_k));
    const double stored_cols = static_cast<double>(row.block_cols) / row.split_k * (row.block_rows == 256 ? 2 : 1) *
                               (problem.d_type == DataType::kFloat32 ? 2 : 1);
    double tile = k_blocks * block + model.epilogue + model.epilogue_column * stored_cols;
    if (row.split_k > 1) tile += model.reduce + model.reduce_column * row.block_cols;
    if (row.k_warpgroups > 1) tile += model.combine + model.combine_column * row.block_cols;
    const double busy = tensor / block * tiles / ((full_waves + (left > 0)) * resident);
    tile *= 1 + (row.scaling == kNoScaling ? model.unscaled_power : model.power) * busy * busy * busy;

    // Waves of as many clusters as fit, and a last one of the tiles that are left. Meanwhile device memory moves each
    // operand and D once, evenly over the tiles.
    const double loaded = is_m_grouped ? static_cast<double>(tiles_along_m(row, problem)) * row.block_m()
                                       : static_cast<double>(m) * results;
    // Tiles of a group beyond its first. BF16, 32 groups of about 64 rows: tiles of 64, of which half of the groups need two, took
    // 36 to 44 % longer than those of 128. The second ones seem to find little of their weights in L2.
    const double again =
        is_m_grouped ? static_cast<double>(tiles_along_m(row, problem)) / static_cast<double>(problem.num_groups) - 1 : 0;
    const double weights_read = row.swap_ab || row.skips_row_parts() ? 1 : 1 + 0.8 * std::min(again, 1.0);
    // A weight of FP4 is half a byte, and its share of a scale.
    const double weight_bytes = !row.has_fp4()                 ? row.element_bytes()
                                : row.scaling == kUE8M0Scaling ? 0.5 + 1.0 / 32
                                                               : 0.5 + 4.0 / 32;
    const double bytes =
        (loaded * row.element_bytes() + static_cast<double>(problem.n) * results * weight_bytes * weights_read) * k +
        static_cast<double>(m) * results * problem.n * size_of(problem.d_type);
    // Of a cluster's tile, bytes that go from L2 into the SMs.
    const double filled = (static_cast<double>(row.block_rows) / row.col_ctas +
                           static_cast<double>(row.block_cols) / row.row_ctas) *
                          128 * k_blocks * row.cluster_size();
    const auto wave = [&](int64_t clusters) {
        // Of the memory's bandwidth. Where some pairs of SMs have two CTAs and others one, the first are the last to end.
        const double ctas = static_cast<double>(clusters * row.cluster_size()) / limits.num_sms;
        double share = ctas > 0.5 ? std::min(1.0, ctas * model.sm_share) : 1;
        if (full_waves > 0) share = std::pow(static_cast<double>(clusters) / resident, model.last_wave);
        return together(tile, (bytes / tiles + model.fill_share * filled) * clusters / (share * model.memory_bytes));
    };
    double clocks = model.launch + (row.cluster_size() > 1 ? model.cluster_launch : 0);
    if (full_waves > 0) clocks += full_waves * wave(resident);
    if (left > 0) clocks += wave(left);
    // Groups of 20 rows: two tiles that read the same weights took 7 to 9 % longer than one that holds them all.
    if (is_m_grouped && row.swap_ab) clocks *= 1 + 0.1 * again;
    if (problem.grouping == Grouping::kDense && row.block_rows == 192) clocks *= model.three_warpgroups;
    const bool is_largest = row.scaling == kNoScaling && row.block_rows * row.block_cols == 128 * 256;
    if (problem.grouping == Grouping::kDense && is_largest && full_waves > 0) clocks *= model.largest_bf16;
    if (row.col_ctas > 2) clocks *= model.four_share;
    return clocks / (kClockGHz * 1000);
}

}  // namespace

const char* operand_mismatch(const GemmRow& row, const GemmProblem& problem) {
    if (row.operands != operands_of(problem) || problem.a_is_fp4) {
        return row.operands == OperandType::kFP8       ? "FP8 operands"
               : row.operands == OperandType::kFP8FP4  ? "FP8 A and FP4 B"
               : row.operands == OperandType::kBF16FP4 ? "BF16 A and FP4 B"
                                                       : "BF16 operands";
    }
    if (row.grouping != grouping_of(problem)) return "another kind of groups";
    if (row.operands == OperandType::kBF16) {
        if (row.a_mn_major != problem.a_mn_major) return row.a_mn_major ? "MN-major A" : "K-major A";
        if (row.b_mn_major != problem.b_mn_major) return row.b_mn_major ? "MN-major B" : "K-major B";
        return nullptr;
    }
    if (row.gran_k != problem.gran_k) return "another gran_k";
    if (row.scaling != scaling_of(problem)) {
        return row.scaling == kScaling1D2D    ? "scales of A per row and of B per 128 x 128 block"
               : row.scaling == kUE8M0Scaling ? "scales of B in packed UE8M0"
                                              : "scales per row of both operands";
    }
    return nullptr;
}

OperandType operands_of(const GemmProblem& problem) {
    if (problem.b_is_fp4) return problem.operands == OperandType::kBF16 ? OperandType::kBF16FP4 : OperandType::kFP8FP4;
    return problem.operands;
}

Scaling scaling_of(const GemmProblem& problem) {
    if (problem.sfb_is_packed) return kUE8M0Scaling;
    if (problem.operands == OperandType::kBF16) return kNoScaling;
    const bool is_1d2d = problem.sfa.gran_mn == 1 && problem.sfb.gran_mn == 128 && problem.gran_k == 128;
    return is_1d2d ? kScaling1D2D : kScaling1D1D;
}

Grouping grouping_of(const GemmProblem& problem) {
    return problem.head_left + problem.head_right > 0 ? Grouping::kBatched : problem.grouping;
}

bool fits_alignment(const GemmRow& row, const GemmProblem& problem) {
    return problem.layout != GroupLayout::kIndices || problem.group_alignment % row.tile_m() == 0;
}

int64_t expected_rows(const GemmProblem& problem) {
    if (problem.grouping != Grouping::kMGrouped) return problem.m;
    const int64_t most = problem.layout == GroupLayout::kMasked ? problem.m : ceil_div(problem.m, problem.num_groups);
    return problem.expected_m > 0 ? std::min(problem.expected_m, problem.m) : most;
}

int64_t tiles_along_m(const GemmRow& row, const GemmProblem& problem) {
    if (problem.layout == GroupLayout::kIndices) return ceil_div(problem.m, row.tile_m());
    int64_t tiles = 0, samples = 0;
    for_each_sample(problem, [&](int64_t rows) { tiles += ceil_div(rows, row.tile_m()), ++samples; });
    return ceil_div(tiles * problem.num_groups, samples);
}

const char* grouping_suffix(Grouping grouping) {
    switch (grouping) {
        case Grouping::kDense: return "";
        case Grouping::kMGrouped: return "_mgrouped";
        case Grouping::kKGrouped: return "_kgrouped";
        case Grouping::kBatched: return "_batched";
        case Grouping::kSummed: return "_summed";
    }
    return "";
}

std::string row_name(const GemmRow& row) {
    if (row.arch == 100) return sm100_row_name(row);
    std::string name = row.scaling == kScaling1D2D ? "sm90_fp8_1d2d" : "sm90_fp8_1d1d";
    if (row.has_fp4()) {
        name = std::string(row.has_bf16_a() ? "sm90_bf16_fp4" : "sm90_fp8_fp4") +
               (row.scaling == kUE8M0Scaling ? "_ue8m0" : "_1d1d");
    }
    if (row.operands == OperandType::kBF16) {
        name = "sm90_bf16_" + std::string(row.a_mn_major ? "t" : "n") + (row.b_mn_major ? "n" : "t");
    }
    name += "_m" + std::to_string(row.block_m()) + "n" + std::to_string(row.block_n());
    name += grouping_suffix(row.grouping);
    if (row.gran_k == 32) name += "_gran" + std::to_string(row.gran_k);
    if (row.swap_ab) name += "_swap";
    if (row.row_ctas > 1) name += "_rows" + std::to_string(row.row_ctas);
    if (row.col_ctas > 1) name += "_cols" + std::to_string(row.col_ctas);
    if (row.split_k > 1) name += "_splitk" + std::to_string(row.split_k);
    if (row.k_warpgroups > 1) name += "_kwg" + std::to_string(row.k_warpgroups);
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
        candidates.push_back({static_cast<int>(i), reason ? 0 : cost_us(rows[i], problem, limits, kModel), reason});
    }
    return candidates;
}

Choice choose_row(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits) {
    Choice best = {-1, 0};
    for (size_t i = 0; i < rows.size(); ++i) {
        if (reason_against(rows[i], problem, limits) != nullptr) continue;
        const double cost = cost_us(rows[i], problem, limits, kModel);
        if (best.row < 0 || cost < best.cost_us) best = {static_cast<int>(i), cost};
    }
    return best;
}

double bf16_tokens_us(const GemmProblem& problem) {
    const double groups = problem.layout == GroupLayout::kMasked ? problem.num_groups : 1;
    const double rows = problem.layout == GroupLayout::kMasked ? expected_rows(problem) * groups : problem.m;
    return kModel.tokens_kernel + rows * problem.k * 3 / (kModel.memory_bytes * kClockGHz * 1000);
}

double fold_fp4_us(const GemmProblem& problem) {
    const double weights = static_cast<double>(problem.n) * problem.k * problem.num_groups;
    return kModel.small_kernels + weights * (0.5 + 1.0 / 32 + 1) / (kModel.memory_bytes * kClockGHz * 1000);
}

}  // namespace deep_gemm
