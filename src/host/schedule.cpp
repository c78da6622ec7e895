#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "selection.h"

namespace deep_gemm {

namespace {

// Row tiles to walk before the next column, so that the panels of one wave are about as many bytes on either side.
int choose_row_group(const GemmRow& row, int row_tiles, int col_tiles, int clusters) {
    const double row_bytes = row.block_rows * row.row_ctas;
    const double col_bytes = row.block_cols * row.col_ctas;
    if (col_tiles == 1) return row_tiles;
    const double ideal = std::sqrt(clusters * col_bytes / row_bytes);
    const int groups = std::max(1, static_cast<int>(std::lround(row_tiles / ideal)));
    return (row_tiles + groups - 1) / groups;
}

}  // namespace

FastDivisor make_divisor(int divisor) {
    if (divisor == 1) return {1, 0, 0};
    uint32_t shift = 1;
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), shift - 1};
}

int fill_dense_schedule(DenseSchedule& schedule, const GemmRow& row, int64_t rows, int64_t cols, int num_k_blocks,
                        int num_sms) {
    const auto tiles = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
    const int64_t row_tiles = tiles(rows, row.tile_rows());
    const int64_t col_tiles = tiles(cols, row.tile_cols());
    const int64_t num_tiles = row_tiles * col_tiles;
    if (num_tiles > std::numeric_limits<int>::max() / 2) throw std::runtime_error("gemm: more than 2^30 output tiles");
    const int clusters =
        static_cast<int>(std::min<int64_t>(num_tiles, resident_clusters(row.cluster_size(), num_sms)));
    const int row_group =
        choose_row_group(row, static_cast<int>(row_tiles), static_cast<int>(col_tiles), clusters);
    schedule.num_tiles = static_cast<int>(num_tiles);
    schedule.num_row_tiles = static_cast<int>(row_tiles);
    schedule.num_k_blocks = num_k_blocks;
    schedule.row_group = make_divisor(row_group);
    schedule.last_row_group = make_divisor(static_cast<int>((row_tiles - 1) % row_group + 1));
    schedule.tiles_per_group = make_divisor(row_group * static_cast<int>(col_tiles));
    return clusters;
}

}  // namespace deep_gemm
