// Fills what a tile scheduler (device/tile_scheduler.cuh) is told.
#pragma once

#include "../device/gemm_params.h"
#include "gemm_row.h"

namespace deep_gemm {

FastDivisor make_divisor(int divisor);

// The walk over a dense product of `rows` x `cols` (of the instruction). Returns the clusters to launch, at most as many as
// are resident on `num_sms`. Throws std::runtime_error where there are too many tiles.
int fill_dense_schedule(DenseSchedule& schedule, const GemmRow& row, int64_t rows, int64_t cols, int num_k_blocks,
                        int num_sms);

}  // namespace deep_gemm
