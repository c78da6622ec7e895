// A warp-specialised GEMM: warp 4 feeds a ring of four stages by TMA, warps 0..3
// multiply.  The tests remove fences from its PTX.
#include "ptx.cuh"

#define ACC32                                                                                                          \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31}"
#define OUT8(o)                                                                                                 \
    "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), \
        "+f"(d[o + 7])

__device__ inline uint64_t desc(const void* p) {  // K-major, 128-byte swizzle
    return uint64_t((smem_addr(p) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ inline void mma(float (&d)[32], uint64_t a, uint64_t b, int scale) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACC32
                 ", %32, %33, p, 1, 1, 0, 0;\n}"
                 : OUT8(0), OUT8(8), OUT8(16), OUT8(24)
                 : "l"(a), "l"(b), "r"(scale));
}

// out = A B^T, 64 rows per CTA.  SCALED multiplies the accumulator by `scale`,
// with ordinary instructions, before each block of k.
template <bool SCALED>
__global__ void pipeline(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb, float* out,
                         int blocks, float scale) {
    constexpr int kStages = 4;
    __shared__ __align__(1024) char a[kStages][8192], b[kStages][8192];
    __shared__ __align__(128) float tile[64 * 64];
    __shared__ uint64_t full[kStages], empty[kStages];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], 4);
        fence_mbar_init();
    }
    __syncthreads();
    if (warp == 4) {
        if (lane == 0)
            for (int k = 0; k < blocks; k++) {
                int s = k % kStages;
                mbar_wait(&empty[s], (k / kStages & 1) ^ 1);
                mbar_expect(&full[s], 16384);
                tma_load_2d(a[s], &ta, k * 64, blockIdx.x * 64, &full[s]);
                tma_load_2d(b[s], &tb, k * 64, 0, &full[s]);
            }
        return;
    }
    float d[32];
    for (int i = 0; i < 32; i++) d[i] = 0;
    for (int k = 0; k < blocks; k++) {
        int s = k % kStages;
        mbar_wait(&full[s], k / kStages & 1);
        if (SCALED)
            for (int i = 0; i < 32; i++) asm volatile("mul.f32 %0, %0, %1;" : "+f"(d[i]) : "f"(scale));
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        for (int j = 0; j < 4; j++) mma(d, desc(a[s] + j * 32), desc(b[s] + j * 32), k + j > 0);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane == 0) mbar_arrive(&empty[s]);
    }
    // Rows of 256 bytes: four rows of a half warp meet in the same eight banks.
    for (int i = 0; i < 32; i += 2)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem_addr(
                         &tile[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * (lane % 4)])),
                     "f"(d[i]), "f"(d[i + 1])
                     : "memory");
    fence_async();
    asm volatile("bar.sync 1, 128;" ::: "memory");
    if (threadIdx.x == 0) bulk_store(out + blockIdx.x * 4096, tile, sizeof tile), bulk_commit(), bulk_wait();
}
template __global__ void pipeline<false>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*,
                                         int, float);
template __global__ void pipeline<true>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*,
                                        int, float);

// CTA 1 arrives on the mbarrier of CTA 0.
extern "C" __global__ void __cluster_dims__(2, 1, 1) remote_arrive(int* out) {
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (cluster_rank() == 1 && threadIdx.x == 0)
        asm volatile(
            "{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, 0;\nmbarrier.arrive.release.cluster.shared::cluster.b64 "
            "_, [r];\n}" ::"r"(smem_addr(&bar))
            : "memory");
    if (cluster_rank() == 0) mbar_wait(&bar, 0), out[threadIdx.x] = threadIdx.x;
    cluster_sync();
}
