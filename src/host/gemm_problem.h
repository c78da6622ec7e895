// A GEMM as the kernels see it: D[m, n] = sum_k A[m, k] * B[n, k] (+ C), both operands K-major.
#pragma once

#include <cstdint>

namespace deep_gemm {

enum class DataType : int { kBFloat16 = 0, kFloat32 = 1 };

inline int size_of(DataType type) { return type == DataType::kBFloat16 ? 2 : 4; }

// FP32 scale factors: the scale of row i and K group g is data[(i / gran_mn) * stride_mn + g * stride_k]. Scales per row
// must be as TMA reads them: stride_mn 1, stride_k a multiple of 4, data on a multiple of 16 bytes. Scales per block of 128
// may have any strides in the recipe 1, 128, 128, and are otherwise repeated per row by the caller.
struct ScaleTensor {
    const float* data = nullptr;
    int64_t stride_mn = 0;  // elements
    int64_t stride_k = 0;   // elements
    int gran_mn = 1;        // 1 or 128
};

struct GemmProblem {
    int64_t m = 0, n = 0, k = 0;
    const void* a = nullptr;  // FP8 E4M3 [m, k]
    const void* b = nullptr;  // FP8 E4M3 [n, k]
    int64_t a_stride = 0;     // elements between rows
    int64_t b_stride = 0;
    ScaleTensor sfa, sfb;
    int gran_k = 128;         // 128 or 32
    void* d = nullptr;        // [m, n]
    int64_t d_stride = 0;     // elements between rows
    DataType d_type = DataType::kBFloat16;
    const void* c = nullptr;  // [m, n] with c_stride, or [n] with c_stride 0; of type d_type; may be d
    int64_t c_stride = 0;
};

}  // namespace deep_gemm
