// SIMT features: control flow, shuffles, atomics, barriers, calls, conversions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdio>
#include "ptx.cuh"

extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void vadd_oob(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) c[i] = a[i] + b[i];
}
extern "C" __global__ void collatz(int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, x = i, s = 0;
    while (x > 1) {
        if (x & 1)
            x = 3 * x + 1;
        else
            x /= 2;
        s++;
    }
    if (i < n) out[i] = s;
}
extern "C" __global__ void block_reduce(const float* a, float* out) {
    __shared__ float part[32];
    float v = a[blockIdx.x * blockDim.x + threadIdx.x];
    for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(~0u, v, k);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
        for (int k = 16; k; k >>= 1) v += __shfl_down_sync(~0u, v, k);
        if (threadIdx.x == 0) atomicAdd(out, v);
    }
}
extern "C" __global__ void warp_ops(unsigned* out) {
    unsigned l = threadIdx.x;
    out[l] = __ballot_sync(~0u, l % 3 == 0);
    out[32 + l] = __match_any_sync(~0u, l / 5);
    out[64 + l] = __reduce_add_sync(~0u, l);
    out[96 + l] = __shfl_up_sync(~0u, l, 3);
    out[128 + l] = (l & 1) ? __activemask() : 0;
    out[160 + l] = __reduce_max_sync(l < 16 ? 0xffffu : 0xffff0000u, l);
}
// Independent thread scheduling: one lane of a warp waits for another one.
extern "C" __global__ void lane_handoff(int* out) {
    __shared__ volatile int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncwarp();
    if (threadIdx.x == 0) {
        while (flag == 0) {}
        out[0] = flag;
    } else if (threadIdx.x == 1) {
        flag = 42;
    }
}
// Grid-wide handoff through global memory.
extern "C" __global__ void cta_chain(int* flag, int* out) {
    if (threadIdx.x == 0) {
        int v;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
        while (v != int(gridDim.x - 1 - blockIdx.x));
        out[blockIdx.x] = v;
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(v + 1) : "memory");
    }
}
__device__ __noinline__ int twice_plus(int x, int* acc) {
    *acc += x;
    return x * 2 + 1;
}
extern "C" __global__ void calls(int* out) {
    int acc = 0, v = threadIdx.x;
    for (int i = 0; i < 3; i++) v = twice_plus(v, &acc);
    out[threadIdx.x] = v + acc;
    if (threadIdx.x == 3) printf("value %d of %s %.2f\n", v, "calls", 1.25);
}
extern "C" __global__ void named_barriers(int* out) {
    __shared__ int buf[64];
    int w = threadIdx.x / 32;
    if (w < 2) {
        buf[threadIdx.x] = threadIdx.x * 3;
        asm volatile("bar.arrive 3, 128;" ::: "memory");
    } else {
        asm volatile("bar.sync 3, 128;" ::: "memory");
        out[threadIdx.x - 64] = buf[threadIdx.x - 64];
    }
}
extern "C" __global__ void conversions(const float* x, unsigned short* bf, unsigned short* hf, unsigned short* e4,
                                       int* i, int n) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    bf[t] = __bfloat16_as_ushort(__float2bfloat16_rn(x[t]));
    hf[t] = __half_as_ushort(__float2half_rn(x[t]));
    e4[t] = __nv_cvt_float_to_fp8(x[t], __NV_SATFINITE, __NV_E4M3) |
            __nv_cvt_float_to_fp8(x[t], __NV_SATFINITE, __NV_E5M2) << 8;
    i[t] = __float2int_rn(x[t]);
}
extern "C" __global__ void cp_async_copy(const float4* a, float4* b) {
    __shared__ float4 s[128];
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(&s[threadIdx.x])), "l"(a + threadIdx.x)
                 : "memory");
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    b[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void __cluster_dims__(4, 1, 1) dsmem_rotate(int* out) {
    __shared__ int v[32];
    uint32_t rank = cluster_rank();
    v[threadIdx.x] = int(rank * 100 + threadIdx.x);
    cluster_sync();
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote)
                 : "r"(smem_addr(&v[threadIdx.x])), "r"((rank + 1) % 4));
    int got;
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(got) : "r"(remote) : "memory");
    out[blockIdx.x * 32 + threadIdx.x] = got;
    cluster_sync();
}
extern "C" __global__ void ldst_matrix(const unsigned* in, unsigned* out) {
    __shared__ __align__(16) unsigned a[128], b[128];
    for (int k = 0; k < 4; k++) a[k * 32 + threadIdx.x] = in[k * 32 + threadIdx.x];
    __syncwarp();
    unsigned r0, r1, r2, r3;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                 : "r"(smem_addr(a) + threadIdx.x * 16)
                 : "memory");
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_addr(b) + threadIdx.x * 16),
        "r"(r0), "r"(r1), "r"(r2), "r"(r3)
        : "memory");
    __syncwarp();
    for (int k = 0; k < 4; k++) out[k * 32 + threadIdx.x] = b[k * 32 + threadIdx.x];
}
extern "C" __global__ void mma_bf16(const unsigned* a, const unsigned* b, float* d) {
    unsigned l = threadIdx.x, r = l / 4, c = l % 4;
    unsigned A[4] = {a[r * 8 + c], a[(r + 8) * 8 + c], a[r * 8 + c + 4], a[(r + 8) * 8 + c + 4]},
             B[2] = {b[r * 8 + c], b[r * 8 + c + 4]};
    float D[4] = {0, 0, 0, 0};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])
        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
    d[r * 8 + 2 * c] = D[0], d[r * 8 + 2 * c + 1] = D[1], d[(r + 8) * 8 + 2 * c] = D[2],
                  d[(r + 8) * 8 + 2 * c + 1] = D[3];
}
extern "C" __global__ void fma_loop(float* out, int n) {  // throughput measurement
    float a = threadIdx.x, b = 1.0f, c = 2.0f, d = 3.0f;
    for (int i = 0; i < n; i++) {
        a = fmaf(a, 0.5f, 1.0f), b = fmaf(b, 0.25f, a), c = fmaf(c, 0.75f, b), d = fmaf(d, 0.125f, c);
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c + d;
}
// --- planted bugs -------------------------------------------------------------
extern "C" __global__ void bug_divergent_barrier(int* out) {
    if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = 1;
}
extern "C" __global__ void bug_smem_oob(int* out, int i) {
    __shared__ int s[32];
    s[threadIdx.x] = 1;
    __syncwarp();
    out[threadIdx.x] = s[threadIdx.x + i];
}
extern "C" __global__ void bug_uninit_smem(int* out) {
    __shared__ int s[32];
    if (threadIdx.x < 31) s[threadIdx.x] = 1;
    __syncwarp();
    out[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void bug_misaligned(const char* in, int* out) {
    out[threadIdx.x] = *(const int*)(in + threadIdx.x * 4 + 1);
}
extern "C" __global__ void bug_endless(volatile int* flag) {
    while (*flag == 0) {}
}
// Dense switch (brx.idx), local arrays, 64-bit arithmetic.
extern "C" __global__ void mixed(const unsigned long long* a, unsigned long long* out, int n) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n) return;
    unsigned long long x = a[t], y = a[(t + 1) % n] | 1, r;
    int local[8];
    for (int i = 0; i < 8; i++) local[i] = int(x >> (8 * i)) & 255;
    switch (t % 12) {
        case 0: r = x / y; break;
        case 1: r = x % y; break;
        case 2: r = __umul64hi(x, y); break;
        case 3: r = x * y; break;
        case 4: r = __funnelshift_l(unsigned(x), unsigned(y), unsigned(x >> 59)); break;
        case 5: r = __byte_perm(unsigned(x), unsigned(y), 0x3715); break;
        case 6: r = __popcll(x) * 100 + __clzll(y >> 7); break;
        case 7: r = __brevll(x); break;
        case 8: r = local[x & 7] + local[(x >> 3) & 7]; break;
        case 9: r = (unsigned long long)((long long)x >> (y & 63)); break;
        case 10: r = __float_as_uint(__fdiv_rz(float(x >> 40), float(y >> 44) + 1)); break;
        default: r = min(x, y) ^ (x << (y & 63)); break;
    }
    out[t] = r;
}
