// Blackwell tensor memory: a 128x64 bf16 tile with K = 64, and planted bugs.
#include "ptx.cuh"

enum Bug { None, Leak, NoWaitLd, NoCommitWait, NoAlloc, NoFence, NoTensorFence };

__device__ inline uint64_t umma_desc(const void* p, uint32_t sbo, uint64_t layout) {
    return uint64_t((smem_addr(p) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(sbo >> 4) << 32 | uint64_t(1) << 46 |
           layout << 61;
}
__device__ inline void ld_x8(uint32_t (&r)[8], uint32_t t) {
    asm volatile("tcgen05.ld.sync.aligned.32x32b.x8.b32 {%0,%1,%2,%3,%4,%5,%6,%7}, [%8];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
                 : "r"(t));
}

template <int BUG>
__global__ void umma(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb, float* out) {
    __shared__ __align__(1024) char a[128 * 128], b[64 * 128];
    __shared__ uint64_t full, done;
    __shared__ uint32_t tmem_ptr;
    if (threadIdx.x == 0) mbar_init(&full, 1), mbar_init(&done, 1), fence_mbar_init();
    if (threadIdx.x < 32 && BUG != NoAlloc)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 64;" ::"r"(smem_addr(&tmem_ptr))
                     : "memory");
    if (BUG == NoAlloc && threadIdx.x == 0) tmem_ptr = 0;
    __syncthreads();
    uint32_t tmem = tmem_ptr;
    if (threadIdx.x == 0)
        mbar_expect(&full, sizeof a + sizeof b), tma_load_2d(a, &ta, 0, 0, &full), tma_load_2d(b, &tb, 0, 0, &full);
    mbar_wait(&full, 0);
    if (BUG == NoFence) {
        volatile int* p = (volatile int*)b + threadIdx.x;
        *p = *p;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        uint32_t idesc = 1u << 4 | 1u << 7 | 1u << 10 | (64u >> 3) << 17 | (128u >> 4) << 24;
        for (int k = 0; k < 4; k++)
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\ntcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, p;\n}" ::
                    "r"(tmem),
                "l"(umma_desc(a + k * 32, 1024, 2)), "l"(umma_desc(b + k * 32, 1024, 2)), "r"(idesc), "r"(k)
                : "memory");
        asm volatile(
            "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(smem_addr(&done))
            : "memory");
    }
    if (BUG != NoCommitWait) mbar_wait(&done, 0);
    if (BUG != NoTensorFence) asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
    for (int c = 0; c < 64; c += 8) {
        uint32_t r[8];
        ld_x8(r, tmem + (threadIdx.x / 32 * 32 << 16) + c);
        if (BUG != NoWaitLd) asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
        for (int i = 0; i < 8; i++) out[threadIdx.x * 64 + c + i] = __uint_as_float(r[i]);
    }
    asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
    if (BUG == NoCommitWait) mbar_wait(&done, 0);
    __syncthreads();
    if (threadIdx.x < 32 && BUG != Leak && BUG != NoAlloc)
        asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 64;" ::"r"(tmem) : "memory");
}
template __global__ void umma<None>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);
template __global__ void umma<Leak>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);
template __global__ void umma<NoWaitLd>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);
template __global__ void umma<NoCommitWait>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                            float*);
template __global__ void umma<NoAlloc>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);
template __global__ void umma<NoFence>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);
template __global__ void umma<NoTensorFence>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*);

// Stores with one shape and loads with another: reveals the lane/column maps.
extern "C" __global__ void tmem_shapes(uint32_t* out) {
    __shared__ uint32_t tmem_ptr;
    if (threadIdx.x < 32)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 32;" ::"r"(smem_addr(&tmem_ptr))
                     : "memory");
    __syncthreads();
    uint32_t t = tmem_ptr, l = threadIdx.x;
    // Cell value = lane * 16 + column.
    uint32_t v[8];
    for (int i = 0; i < 8; i++) v[i] = l * 16 + i;
    asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%0], {%1,%2,%3,%4,%5,%6,%7,%8};" ::"r"(t), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(v[4]), "r"(v[5]), "r"(v[6]), "r"(v[7])
                 : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    uint32_t r[7];
    asm volatile("tcgen05.ld.sync.aligned.16x64b.x1.b32 {%0}, [%1];" : "=r"(r[0]) : "r"(t));
    asm volatile("tcgen05.ld.sync.aligned.16x128b.x1.b32 {%0,%1}, [%2];" : "=r"(r[1]), "=r"(r[2]) : "r"(t));
    asm volatile("tcgen05.ld.sync.aligned.16x256b.x1.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6])
                 : "r"(t));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    for (int i = 0; i < 7; i++) out[i * 128 + l] = r[i];
    __syncthreads();
    if (threadIdx.x < 32) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 32;" ::"r"(t) : "memory");
}

// Work stealing: each CTA keeps cancelling pending clusters and does their work.
extern "C" __global__ void steal(int* owner) {
    __shared__ __align__(16) int4 response;
    __shared__ uint64_t bar;
    __shared__ int next;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    int tile = blockIdx.x, phase = 0;
    while (tile >= 0) {
        if (threadIdx.x == 0) {
            atomicAdd(&owner[tile], int(blockIdx.x) + 1);
            mbar_expect(&bar, 16);
            asm volatile(
                "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%0], [%1];" ::"r"(
                    smem_addr(&response)),
                "r"(smem_addr(&bar))
                : "memory");
        }
        mbar_wait(&bar, phase);
        phase ^= 1;
        if (threadIdx.x == 0) {
            uint32_t ok, x = 0;
            asm volatile(
                "{\n.reg .pred p;\n.reg .b128 r;\nld.shared.b128 r, "
                "[%2];\nclusterlaunchcontrol.query_cancel.is_canceled.pred.b128 p, r;\nselp.u32 %0, 1, 0, p;\n"
                "@p clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%1, _, _, _}, r;\n}"
                : "=r"(ok), "+r"(x)
                : "r"(smem_addr(&response))
                : "memory");
            next = ok ? int(x) : -1;
        }
        __syncthreads();
        tile = next;
        __syncthreads();
    }
}

// A 256x64 tile over a CTA pair: each CTA holds half of A and half of B.
extern "C" __global__ void __cluster_dims__(2, 1, 1)
    umma_pair(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb, float* out) {
    __shared__ __align__(1024) char a[128 * 128], b[32 * 128];
    __shared__ uint64_t full, done;
    __shared__ uint32_t tmem_ptr;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) mbar_init(&full, 1), mbar_init(&done, 1), fence_mbar_init();
    if (threadIdx.x < 32)
        asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], 64;" ::"r"(smem_addr(&tmem_ptr))
                     : "memory");
    cluster_sync();
    uint32_t tmem = tmem_ptr;
    if (threadIdx.x == 0)
        mbar_expect(&full, sizeof a + sizeof b), tma_load_2d(a, &ta, 0, rank * 128, &full),
            tma_load_2d(b, &tb, 0, rank * 32, &full);
    mbar_wait(&full, 0);
    cluster_sync();
    if (rank == 0 && threadIdx.x == 0) {
        uint32_t idesc = 1u << 4 | 1u << 7 | 1u << 10 | (64u >> 3) << 17 | (256u >> 4) << 24;
        for (int k = 0; k < 4; k++)
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %4, 0;\ntcgen05.mma.cta_group::2.kind::f16 [%0], %1, %2, %3, p;\n}" ::
                    "r"(tmem),
                "l"(umma_desc(a + k * 32, 1024, 2)), "l"(umma_desc(b + k * 32, 1024, 2)), "r"(idesc), "r"(k)
                : "memory");
        asm volatile(
            "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;" ::"r"(
                smem_addr(&done)),
            "h"(uint16_t(3))
            : "memory");
    }
    mbar_wait(&done, 0);
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
    for (int c = 0; c < 64; c += 8) {
        uint32_t r[8];
        ld_x8(r, tmem + c);
        asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
        for (int i = 0; i < 8; i++) out[(rank * 128 + threadIdx.x) * 64 + c + i] = __uint_as_float(r[i]);
    }
    cluster_sync();
    if (threadIdx.x < 32) asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, 64;" ::"r"(tmem) : "memory");
}

// Both CTAs of a pair load a box of 4 x 32 bytes; the bytes of both count towards the mbarrier of the first.
template <bool EXPECT_OWN>
__global__ void __cluster_dims__(2, 1, 1) pair_loads(const __grid_constant__ TensorMap map, uint32_t* out) {
    __shared__ __align__(128) uint32_t box[32];
    __shared__ uint64_t full;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) mbar_init(&full, 1), fence_mbar_init();
    cluster_sync();
    if (threadIdx.x == 0) {
        if (rank == 0) mbar_expect(&full, EXPECT_OWN ? 128 : 256);
        asm volatile(
            "{\n.reg .b32 first;\nmapa.shared::cluster.u32 first, %2, 0;\n"
            "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
            "%4}], [first];\n}" ::"r"(smem_addr(box)),
            "l"(&map), "r"(smem_addr(&full)), "r"(0), "r"(rank * 4)
            : "memory");
        if (rank == 0) mbar_wait(&full, 0);
    }
    cluster_sync();
    out[rank * 32 + threadIdx.x] = box[threadIdx.x];
}
template __global__ void pair_loads<false>(const __grid_constant__ TensorMap, uint32_t*);
template __global__ void pair_loads<true>(const __grid_constant__ TensorMap, uint32_t*);

// FP8 with one ue8m0 scale per 32 elements of K; scales reach tensor memory by
// tcgen05.cp from 32 rows of four words (word j of row r: matrix row 32 j + r).
extern "C" __global__ void umma_block_scaled(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb,
                                             const uint32_t* sfa, const uint32_t* sfb, float* out) {
    __shared__ __align__(1024) char a[128 * 128], b[64 * 128];
    __shared__ __align__(128) uint32_t sa[32][4], sb[32][4];
    __shared__ uint64_t full, done;
    __shared__ uint32_t tmem_ptr;
    if (threadIdx.x == 0) mbar_init(&full, 1), mbar_init(&done, 1), fence_mbar_init();
    if (threadIdx.x < 32)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 128;" ::"r"(smem_addr(&tmem_ptr))
                     : "memory");
    sa[threadIdx.x % 32][threadIdx.x / 32] = sfa[threadIdx.x];
    sb[threadIdx.x % 32][threadIdx.x / 32] = threadIdx.x < 64 ? sfb[threadIdx.x] : 0;
    fence_async();
    __syncthreads();
    uint32_t tmem = tmem_ptr;
    if (threadIdx.x == 0) {
        mbar_expect(&full, sizeof a + sizeof b), tma_load_2d(a, &ta, 0, 0, &full), tma_load_2d(b, &tb, 0, 0, &full);
        mbar_wait(&full, 0);
        asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(tmem + 64), "l"(umma_desc(sa, 128, 0))
                     : "memory");
        asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(tmem + 68), "l"(umma_desc(sb, 128, 0))
                     : "memory");
        for (uint32_t k = 0; k < 4; k++) {
            uint32_t idesc = k << 4 | (64u >> 3) << 17 | 1u << 23 | (128u >> 4) << 24 | k << 29;
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\ntcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [%0], "
                "%1, %2, %3, [%4], [%5], p;\n}" ::"r"(tmem),
                "l"(umma_desc(a + k * 32, 1024, 2)), "l"(umma_desc(b + k * 32, 1024, 2)), "r"(idesc), "r"(tmem + 64),
                "r"(tmem + 68), "r"(k)
                : "memory");
        }
        asm volatile(
            "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(smem_addr(&done))
            : "memory");
    }
    mbar_wait(&done, 0);
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
    for (int c = 0; c < 64; c += 8) {
        uint32_t r[8];
        ld_x8(r, tmem + c);
        asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
        for (int i = 0; i < 8; i++) out[threadIdx.x * 64 + c + i] = __uint_as_float(r[i]);
    }
    __syncthreads();
    if (threadIdx.x < 32) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 128;" ::"r"(tmem) : "memory");
}
