// Gradients of y = silu(gate) * up * weight, and y, for x = [gate | up]: what stands between the two products of an
// expert's backward pass, in one read of x and of the gradient of y.
//
//   y         = gate sigmoid(gate) up weight
//   grad_gate = grad weight up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))
//   grad_up   = grad weight gate sigmoid(gate)
//   grad_row_weight = sum over columns of grad gate sigmoid(gate) up
//
// A CTA has a row. Its threads take 8 neighbouring columns each, in turns; the next turn's loads are in flight while this
// one is computed. The sum's order is always the same, whatever the alignment: each thread's columns, a butterfly of each
// warp's lanes, the warps.
//   kVector: 16-byte accesses, for aligned rows; else an element at a time, for any.
#include "cast/cast_params.cuh"
#include "cast/memory.cuh"
#include "cast/swiglu.cuh"

namespace deep_gemm::cast {
namespace {

constexpr int kThreads = 128;
constexpr int kElems = 8;     // columns of a thread in a turn
template <bool kVector>
constexpr int kCtasPerSM = kVector ? 8 : 6;  // 64 and 80 registers a thread

using E = Elements<__nv_bfloat16>;

struct Raw {
    uint4 gate, up, grad;
};

template <bool kVector>
__device__ __forceinline__ uint4 load_columns(const __nv_bfloat16* p, int64_t cols) {
    if (cols <= 0) return make_uint4(0, 0, 0, 0);
    if constexpr (kVector) return load_16(p);
    uint32_t words[4] = {};
#pragma unroll
    for (int e = 0; e < kElems; ++e)
        if (e < cols) words[e / 2] |= load_2(p + e) << (e % 2 * 16);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool kVector>
__device__ __forceinline__ void store_columns(__nv_bfloat16* p, const float (&v)[kElems], int64_t cols) {
    __nv_bfloat162 pairs[kElems / 2];
#pragma unroll
    for (int i = 0; i < kElems / 2; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    if constexpr (kVector) {
        const auto word = [&](int i) { return *reinterpret_cast<const uint32_t*>(&pairs[i]); };
        *reinterpret_cast<uint4*>(p) = make_uint4(word(0), word(1), word(2), word(3));
    } else {
#pragma unroll
        for (int e = 0; e < kElems; ++e)
            if (e < cols) p[e] = e % 2 == 0 ? pairs[e / 2].x : pairs[e / 2].y;
    }
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads, kCtasPerSM<kVector>)
    swiglu_backward_kernel(const __grid_constant__ SwigluBackwardProblem problem) {
    __shared__ float warp_sums[kThreads / 32];
    launch_dependents();
    wait_for_dependencies();
    const int64_t row = blockIdx.x, cols = problem.cols;
    const bool is_weighted = problem.row_weights != nullptr;
    const float weight =
        is_weighted ? __uint_as_float(load_4(problem.row_weights + row * problem.weight_stride)) : 1.0f;
    const auto* x = static_cast<const __nv_bfloat16*>(problem.x) + row * problem.x_stride;
    const auto* grad = static_cast<const __nv_bfloat16*>(problem.grad) + row * problem.grad_stride;
    auto* grad_x = static_cast<__nv_bfloat16*>(problem.grad_x) + row * problem.grad_x_stride;
    auto* weighted = static_cast<__nv_bfloat16*>(problem.weighted) + row * problem.weighted_stride;
    const auto load = [&](int64_t col) {
        return Raw{load_columns<kVector>(x + col, cols - col), load_columns<kVector>(x + cols + col, cols - col),
                   load_columns<kVector>(grad + col, cols - col)};
    };

    float sum = 0;
    Raw next = load(threadIdx.x * kElems);
    for (int64_t col = threadIdx.x * kElems; col < cols; col += kThreads * kElems) {
        const Raw raw = next;
        next = load(col + kThreads * kElems);
        float y[kElems], grad_gate[kElems], grad_up[kElems];
#pragma unroll
        for (int e = 0; e < kElems; ++e) {
            const float gate = E::unpack_at(raw.gate, e), up = E::unpack_at(raw.up, e);
            float d = E::unpack_at(raw.grad, e);
            const float sig = sigmoid(gate), silu_gate = __fmul_rn(gate, sig);
            y[e] = __fmul_rn(silu_gate, up);
            sum = __fadd_rn(sum, __fmul_rn(d, y[e]));
            if (is_weighted) y[e] = __fmul_rn(y[e], weight), d = __fmul_rn(d, weight);
            const float slope = __fmul_rn(sig, __fadd_rn(__fmul_rn(gate, __fsub_rn(1.0f, sig)), 1.0f));
            grad_gate[e] = __fmul_rn(__fmul_rn(d, up), slope);
            grad_up[e] = __fmul_rn(d, silu_gate);
        }
        store_columns<kVector>(weighted + col, y, cols - col);
        store_columns<kVector>(grad_x + col, grad_gate, cols - col);
        store_columns<kVector>(grad_x + cols + col, grad_up, cols - col);
    }

#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, offset));
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int w = 1; w < kThreads / 32; ++w) sum = __fadd_rn(sum, warp_sums[w]);
    problem.grad_row_weights[row] = sum;
}

}  // namespace

cudaError_t launch_swiglu_backward(const SwigluBackwardProblem& problem, cudaStream_t stream, bool pdl) {
    if (problem.rows <= 0) return cudaSuccess;
    const auto is_whole = [](const void* p, int64_t stride) { return is_aligned(p, 16) && stride % kElems == 0; };
    const bool vector = problem.cols % kElems == 0 && is_whole(problem.x, problem.x_stride) &&
                        is_whole(problem.grad, problem.grad_stride) && is_whole(problem.grad_x, problem.grad_x_stride) &&
                        is_whole(problem.weighted, problem.weighted_stride);
    return launch(vector ? swiglu_backward_kernel<true> : swiglu_backward_kernel<false>, problem.rows, kThreads, stream,
                  pdl, problem);
}

}  // namespace deep_gemm::cast
