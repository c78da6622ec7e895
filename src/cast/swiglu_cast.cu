// FP8 quantisation of silu(gate) * up * weight, for x = [gate | up]: what stands between the two linear layers of an
// expert, in one read of the first one's output.
#include "cast/per_token_kernel.cuh"

namespace deep_gemm::cast {
namespace {

// x / (1 + exp(-x)) as deep_gemm_ops.fused_casts.silu has it, operation by operation: exp by a polynomial of degree
// four, since the hardware's exponential could not be reproduced elsewhere.
__device__ __forceinline__ float silu(float x) {
    constexpr float kLog2E = 0x1.715476p+0f, kRange = 250;          // binary exponents from -125 to 125
    constexpr float kRound = 0x1.8p+23f - kRange / 2;               // adding it leaves an integer in the low bits
    float position;                                                 // of -x * log2(e) in that range, 0 to 1
    asm("fma.rn.sat.f32 %0, %1, %2, 0f3F000000;" : "=f"(position) : "f"(x), "f"(-kLog2E / kRange));
    const float rounded = __fmaf_rn(position, kRange, kRound);
    const float fraction = __fmaf_rn(position, kRange, -__fsub_rn(rounded, kRound));
    float power = __fmaf_rn(fraction, 0x1.3a02c4p-7f, 0x1.c9fc46p-5f);
    power = __fmaf_rn(power, fraction, 0x1.ec0378p-3f);
    power = __fmaf_rn(power, fraction, 0x1.62e12cp-1f);
    power = __fmaf_rn(power, fraction, 1.0f);
    const float exponential = __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
    const float divisor = __fadd_rn(exponential, 1.0f);
    return __fmul_rn(x, refine_reciprocal(divisor, rough_reciprocal(divisor)));
}

__device__ __forceinline__ float min_nan(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

__device__ __forceinline__ float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

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

    struct Chunk {
        uint4 gate, up;
        __device__ __forceinline__ void load(const Params& params, const Element* p) {
            gate = load_16(p);
            up = load_16(p + params.up_offset);
        }
        __device__ __forceinline__ void values(const Params& params, float weight, float (&v)[8]) const {
            float u[8];
            Elements<Element>::unpack(gate, v);
            Elements<Element>::unpack(up, u);
            combine(params, weight, v, u);
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
