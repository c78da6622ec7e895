// What the casts' kernels are told, and how their hosts choose among them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cast/launch.cuh"
#include "cast/scale.cuh"
#include "host/cast.h"

namespace deep_gemm::cast {

struct CastParams {
    const void* x;
    int64_t x_stride;
    uint8_t* out;
    int64_t out_stride;
    void* sf;
    int64_t sf_stride;
    int64_t rows, cols;
    uint32_t col_tiles;
    ScaleFormat sf_format;
};

inline CastParams make_cast_params(const CastProblem& problem, int tile_cols) {
    CastParams params = {};
    params.x = problem.x;
    params.x_stride = problem.x_stride;
    params.out = static_cast<uint8_t*>(problem.out);
    params.out_stride = problem.out_stride;
    params.sf = problem.sf;
    params.sf_stride = problem.sf_stride;
    params.rows = problem.rows;
    params.cols = problem.cols;
    params.col_tiles = static_cast<uint32_t>(ceil_div<int64_t>(problem.cols, tile_cols));
    params.sf_format = problem.sf_format;
    return params;
}

// Whether whole 16-byte loads of x lie inside a row. Their elements' FP8 values, kPer16 bytes, are stored at once where
// `out` allows it.
template <typename T>
bool has_whole_loads(const CastProblem& problem) {
    constexpr int kElems = Elements<T>::kPer16;
    return is_aligned(problem.x, 16) && problem.x_stride % kElems == 0 && problem.cols % kElems == 0;
}

template <typename T>
bool has_vector_access(const CastProblem& problem) {
    constexpr int kElems = Elements<T>::kPer16;
    return has_whole_loads<T>(problem) && is_aligned(problem.out, kElems) && problem.out_stride % kElems == 0;
}

// Calls `launch_for.operator()<T>()` for the element type of x, unless there is nothing to do.
template <typename LaunchFor>
cudaError_t launch_for_type(const CastProblem& problem, const LaunchFor& launch_for) {
    if (problem.rows <= 0 || problem.cols <= 0) return cudaSuccess;
    if (problem.gran_k != 128 && problem.gran_k != 32) return cudaErrorInvalidValue;
    switch (problem.x_type) {
        case InputType::kBFloat16: return launch_for.template operator()<__nv_bfloat16>();
        case InputType::kFloat16: return launch_for.template operator()<__half>();
        case InputType::kFloat32: return launch_for.template operator()<float>();
    }
    return cudaErrorInvalidValue;
}

}  // namespace deep_gemm::cast
