#include "schedule.h"

#include <algorithm>
#include <cmath>

namespace deep_gemm {

FastDivisor make_divisor(int divisor) {
    if (divisor == 1) return {1, 0, 0};
    uint32_t shift = 1;
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), shift - 1};
}

int choose_row_group(double row_bytes, double col_bytes, int row_tiles, int col_tiles, int clusters) {
    if (col_tiles == 1) return row_tiles;
    const double ideal = std::sqrt(clusters * col_bytes / row_bytes);
    const int groups = std::max(1, static_cast<int>(std::lround(row_tiles / ideal)));
    return (row_tiles + groups - 1) / groups;
}

DenseSchedule make_dense_schedule(const GemmRow& row, int row_tiles, int col_tiles, int num_k_blocks, int clusters) {
    const int row_group = choose_row_group(row.tile_rows(), row.tile_cols(), row_tiles, col_tiles, clusters);
    DenseSchedule schedule;
    schedule.num_tiles = row_tiles * col_tiles;
    schedule.num_row_tiles = row_tiles;
    schedule.num_k_blocks = num_k_blocks;
    schedule.row_group = make_divisor(row_group);
    schedule.last_row_group = make_divisor((row_tiles - 1) % row_group + 1);
    schedule.tiles_per_group = make_divisor(row_group * col_tiles);
    return schedule;
}

}  // namespace deep_gemm
