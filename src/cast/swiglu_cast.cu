// FP8 quantisation of silu(gate) * up * weight, for x = [gate | up]: what stands between the two linear layers of an
// expert, in one read of the first one's output.
#include "cast/per_token_kernel.cuh"
#include "cast/swiglu.cuh"

namespace deep_gemm::cast {
namespace {

struct SwigluSource {
    using Element = __nv_bfloat16;
    struct Params {
        int64_t up_offset;           // elements from a gate to its up
        const float* topk_weights;   // or null
        int64_t weight_stride;
        bool clamped;
        float clamp;
    };

    static constexpr bool kHasRowFactor = true;
    static constexpr int kRowsOfWarp = 2, kVectors = 2;
    static __device__ __forceinline__ float row_factor(const Params& params, int64_t row) {
        return params.topk_weights ? __uint_as_float(load_4(params.topk_weights + row * params.weight_stride)) : 1.0f;
    }

    template <int kElems>
    static __device__ __forceinline__ void combine(const Params& params, float weight, float (&gate)[kElems],
                                                   float (&up)[kElems]) {
        if (params.clamped) {
#pragma unroll
            for (int e = 0; e < kElems; ++e) {
                gate[e] = min_nan(gate[e], params.clamp);
                up[e] = max_nan(min_nan(up[e], params.clamp), -params.clamp);
            }
        }
#pragma unroll
        for (int e = 0; e < kElems; ++e) gate[e] = __fmul_rn(silu(gate[e]), up[e]);
        if (params.topk_weights != nullptr) {
#pragma unroll
            for (int e = 0; e < kElems; ++e) gate[e] = __fmul_rn(gate[e], weight);
        }
    }

    static __device__ __forceinline__ const Element* address(const Params& params, const Element* p, int v) {
        return v == 0 ? p : p + params.up_offset;
    }
    struct Chunk {
        uint4 raw[kVectors];  // gate, up
        float products[8];
        __device__ __forceinline__ float amax(const Params& params, float weight) {
            float u[8], amax = 0;
            Elements<Element>::unpack(raw[0], products);
            Elements<Element>::unpack(raw[1], u);
            combine(params, weight, products, u);
#pragma unroll
            for (int e = 0; e < 8; ++e) amax = max_abs(amax, products[e]);
            return amax;
        }
        __device__ __forceinline__ void values(float (&v)[8]) const {
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = products[e];
        }
    };
    struct One {
        uint32_t both;
        __device__ __forceinline__ void load(const Params& params, const Element* p) {
            both = load_2(p) | load_2(p + params.up_offset) << 16;
        }
        __device__ __forceinline__ float value(const Params& params, float weight) const {
            float gate[1] = {__uint_as_float(both << 16)}, up[1] = {__uint_as_float(both & 0xffff0000)};
            combine(params, weight, gate, up);
            return gate[0];
        }
    };
};

}  // namespace

cudaError_t launch_swiglu_cast(const SwigluProblem& problem, cudaStream_t stream, bool pdl) {
    const CastProblem& cast = problem.cast;
    if (cast.rows <= 0 || cast.cols <= 0) return cudaSuccess;
    if (cast.x_type != InputType::kBFloat16 || (cast.gran_k != 128 && cast.gran_k != 32)) return cudaErrorInvalidValue;
    const SwigluSource::Params source = {cast.cols, problem.topk_weights, problem.weight_stride, problem.clamped,
                                         problem.clamp};
    return launch_per_token<SwigluSource, E4M3>(cast, source, has_vector_access<__nv_bfloat16>(cast), stream, pdl);
}

}  // namespace deep_gemm::cast
