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
};

// A row-major matrix, moved in boxes of box_rows x box_cols; a box row (32, 64 or 128 bytes) is one swizzle span.
// Rows and columns outside read as zero and are not written. Throws std::runtime_error when the driver refuses.
// `swizzled` is false for data that threads read as it lies.
CUtensorMap make_tensor_map(EncodeTiledFunction encode, const MatrixView& matrix, int box_rows, int box_cols,
                            bool swizzled = true);

// `count` such matrices, `matrix_stride` elements apart; a box is part of one of them.
CUtensorMap make_tensor_map(EncodeTiledFunction encode, const MatrixView& matrix, int64_t count, int64_t matrix_stride,
                            int box_rows, int box_cols, bool swizzled = true);

}  // namespace deep_gemm
