// Tensor maps: what TMA needs to know of a matrix. The only caller of cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace deep_gemm {

using EncodeTiledFunction = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, looked up once at run time: the library does not link libcuda.
EncodeTiledFunction driver_encode_tiled();

struct MatrixView {
    const void* data;
    int64_t rows;
    int64_t cols;
    int64_t row_stride;  // elements
    CUtensorMapDataType type;
    int element_bytes;
    // Matrices of this form, group_stride elements apart: a third dimension. 0: there is one, and no such dimension.
    int64_t groups = 0;
    int64_t group_stride = 0;
};

// A row-major matrix, moved in boxes of box_rows x box_cols; a box row (32, 64 or 128 bytes) is one swizzle span.
// Rows and columns outside of a matrix read as zero and are not written. Throws std::runtime_error when the driver refuses.
// `swizzled` is false for data that threads read as it lies.
CUtensorMap make_tensor_map(EncodeTiledFunction encode, const MatrixView& matrix, int box_rows, int box_cols,
                            bool swizzled = true);

}  // namespace deep_gemm
