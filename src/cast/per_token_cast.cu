// FP8 quantisation with a scale per row and gran_k columns: activations.
#include "cast/per_token_kernel.cuh"

namespace deep_gemm::cast {

cudaError_t launch_per_token_cast(const CastProblem& problem, cudaStream_t stream, bool pdl) {
    return launch_for_type(problem, [&]<typename T>() {
        return launch_per_token<PlainSource<T>, E4M3>(problem, {}, has_vector_access<T>(problem), stream, pdl);
    });
}

}  // namespace deep_gemm::cast
