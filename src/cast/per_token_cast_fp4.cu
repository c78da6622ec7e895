// FP4 quantisation with a scale per row and gran_k columns.
#include "cast/per_token_kernel.cuh"

namespace deep_gemm::cast {

cudaError_t launch_per_token_cast_fp4(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for_type(problem, [&]<typename T>() {
        constexpr int kBytes = Elements<T>::kPer16 / 2;  // of FP4 values from one load
        const bool vector =
            has_whole_loads<T>(problem) && is_aligned(problem.out, kBytes) && problem.out_stride % kBytes == 0;
        return launch_per_token<PlainSource<T>, E2M1>(problem, {}, vector, stream, pdl);
    });
}

}  // namespace deep_gemm::cast
