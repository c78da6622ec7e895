#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>

namespace deep_gemm {

EncodeTiledFunction driver_encode_tiled() {
    static const EncodeTiledFunction function = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error(
                "deep_gemm: the CUDA driver has no cuTensorMapEncodeTiled; it must support CUDA 12");
        }
        return reinterpret_cast<EncodeTiledFunction>(entry);
    }();
    return function;
}

CUtensorMap make_tensor_map(EncodeTiledFunction encode, const MatrixView& matrix, int box_rows, int box_cols,
                            bool swizzled) {
    const int span_bytes = box_cols * matrix.element_bytes;
    const CUtensorMapSwizzle swizzle = !swizzled           ? CU_TENSOR_MAP_SWIZZLE_NONE
                                       : span_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : span_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                          : CU_TENSOR_MAP_SWIZZLE_32B;
    const int rank = matrix.groups > 0 ? 3 : 2;
    // The stride of a single group is never used, but has to be one that the driver takes.
    const int64_t group_stride = matrix.groups > 1 ? matrix.group_stride : matrix.row_stride * matrix.rows;
    const cuuint64_t dims[3] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows),
                                static_cast<cuuint64_t>(matrix.groups)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(matrix.row_stride) * matrix.element_bytes,
                                   static_cast<cuuint64_t>(group_stride) * matrix.element_bytes};
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult result =
        encode(&map, matrix.type, rank, const_cast<void*>(matrix.data), dims, strides, box, element_strides,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        std::ostringstream message;
        message << "deep_gemm: cuTensorMapEncodeTiled failed with error " << static_cast<int>(result)
                << " for a matrix [" << matrix.rows << ", " << matrix.cols << "] with row stride " << matrix.row_stride << " at "
                << matrix.data << ", " << matrix.groups << " groups with stride " << group_stride << ", box [" << box_rows << ", " << box_cols << "]";
        throw std::runtime_error(message.str());
    }
    return map;
}

}  // namespace deep_gemm
