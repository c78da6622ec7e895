// One warpgroup, one m64n64k16 bf16 tile (or fp8 m64n64k32), operands brought by
// TMA or written by the threads; BUG selects a planted error.
#include "ptx.cuh"

enum Bug { None, NoFence, NoWaitGroup, Overwrite };

__device__ inline uint64_t desc(const void* p, uint32_t lbo, uint32_t sbo, uint64_t mode) {
    return uint64_t((smem_addr(p) & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 | mode << 62;
}
#define D8(i) "%" #i
#define ACC32                                                                                                          \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%" \
    "30,%31}"
#define OUT8(o)                                                                                                 \
    "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3]), "+f"(d[o + 4]), "+f"(d[o + 5]), "+f"(d[o + 6]), \
        "+f"(d[o + 7])
#define OUT32 OUT8(0), OUT8(8), OUT8(16), OUT8(24)

template <int TA, int TB>
__device__ void mma_bf16(float (&d)[32], uint64_t a, uint64_t b, int scale) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACC32
                 ", %32, %33, p, 1, 1, %35, %36;\n}"
                 : OUT32
                 : "l"(a), "l"(b), "r"(scale), "n"(TA), "n"(TB));
}
__device__ void mma_e4m3(float (&d)[32], uint64_t a, uint64_t b, int scale) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 " ACC32
                 ", %32, %33, p, 1, 1;\n}"
                 : OUT32
                 : "l"(a), "l"(b), "r"(scale));
}
__device__ void store_acc(float* out, const float (&d)[32]) {
    int w = threadIdx.x / 32, l = threadIdx.x % 32;
    for (int i = 0; i < 32; i++)
        out[(16 * w + l / 4 + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * (l % 4) + i % 2] = d[i];
}

// A is 64 x K, B is 64 x K, both K-major with an S-byte swizzle; K = S / 2.
template <int S, int BUG>
__global__ void gemm_k_major(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb, float* out) {
    __shared__ __align__(1024) char a[64 * S], b[64 * S];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0)
        mbar_expect(&bar, sizeof a + sizeof b), tma_load_2d(a, &ta, 0, 0, &bar), tma_load_2d(b, &tb, 0, 0, &bar);
    mbar_wait(&bar, 0);
    if (BUG == NoFence) {  // rewrites an operand through the generic proxy
        volatile int* p = (volatile int*)a + threadIdx.x;
        *p = *p;
        __syncthreads();
    }
    constexpr uint64_t mode = S == 128 ? 1 : S == 64 ? 2 : 3;
    float d[32] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < S / 32; k++)
        mma_bf16<0, 0>(d, desc(a + k * 32, 16, 8 * S, mode), desc(b + k * 32, 16, 8 * S, mode), k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (BUG == Overwrite) a[threadIdx.x] = 0;
    if (BUG != NoWaitGroup) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    store_acc(out, d);
}
template __global__ void gemm_k_major<128, None>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                 float*);
template __global__ void gemm_k_major<64, None>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                float*);
template __global__ void gemm_k_major<32, None>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                float*);
template __global__ void gemm_k_major<128, NoFence>(const __grid_constant__ TensorMap,
                                                    const __grid_constant__ TensorMap, float*);
template __global__ void gemm_k_major<128, NoWaitGroup>(const __grid_constant__ TensorMap,
                                                        const __grid_constant__ TensorMap, float*);
template __global__ void gemm_k_major<128, Overwrite>(const __grid_constant__ TensorMap,
                                                      const __grid_constant__ TensorMap, float*);

// A and B stored MN-major: 16 k rows of 64 elements (128 bytes).
extern "C" __global__ void gemm_mn_major(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb,
                                         float* out) {
    __shared__ __align__(1024) char a[16 * 128], b[16 * 128];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0)
        mbar_expect(&bar, sizeof a + sizeof b), tma_load_2d(a, &ta, 0, 0, &bar), tma_load_2d(b, &tb, 0, 0, &bar);
    mbar_wait(&bar, 0);
    float d[32] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    mma_bf16<1, 1>(d, desc(a, 2048, 1024, 1), desc(b, 2048, 1024, 1), 0);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    store_acc(out, d);
}

// FP8 operands without swizzle, written by the threads as 8 x 16-byte core matrices.
// `rows` of A are written to shared memory.
extern "C" __global__ void gemm_fp8_noswizzle(const int4* ga, const int4* gb, float* out, int rows) {
    __shared__ __align__(128) int4 a[128], b[128];  // [k chunk][row]
    int r = threadIdx.x % 64, c = threadIdx.x / 64;
    if (r < rows) a[c * 64 + r] = ga[r * 2 + c];
    b[c * 64 + r] = gb[r * 2 + c];
    fence_async();
    __syncthreads();
    float d[32] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    mma_e4m3(d, desc(a, 1024, 128, 0), desc(b, 1024, 128, 0), 0);
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    store_acc(out, d);
}
