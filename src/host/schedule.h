// Fills what a tile scheduler (device/tile_scheduler.cuh) is told.
#pragma once

#include "../device/gemm_params.h"
#include "gemm_row.h"

namespace deep_gemm {

FastDivisor make_divisor(int divisor);

// Row tiles to walk before the next column, so that the panels of one wave are about as many bytes on either side;
// row_bytes and col_bytes: of a tile's panel.
int choose_row_group(double row_bytes, double col_bytes, int row_tiles, int col_tiles, int clusters);

// The walk of `clusters` clusters over a dense product.
DenseSchedule make_dense_schedule(const GemmRow& row, int row_tiles, int col_tiles, int num_k_blocks, int clusters);

}  // namespace deep_gemm
