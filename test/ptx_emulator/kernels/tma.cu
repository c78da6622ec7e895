// Bulk and tensor copies, correct and with planted bugs (template parameter).
#include "ptx.cuh"

enum Bug {
    None,
    ExpectTooMuch,
    ExpectTooLittle,
    NoWait,
    NoFence,
    NoInit,
    OverwriteBeforeRead,
    DoubleArrive,
    NoReadWait
};

template <int BUG>
__global__ void bulk_copy(const int* in, int* out, int n) {  // out = in + 1 through shared memory
    extern __shared__ __align__(128) int buf[];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0 && BUG != NoInit) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0) {
        mbar_expect(&bar, n * 4 + (BUG == ExpectTooMuch ? 16 : BUG == ExpectTooLittle ? -16 : 0));
        bulk_load(buf, in, n * 4, &bar);
        if (BUG == DoubleArrive) mbar_arrive(&bar);
    }
    if (BUG != NoWait) mbar_wait(&bar, 0);
    for (int i = threadIdx.x; i < n; i += blockDim.x) buf[i]++;
    if (BUG != NoFence) fence_async();
    __syncthreads();
    if (threadIdx.x == 0) bulk_store(out, buf, n * 4), bulk_commit();
    if (BUG == OverwriteBeforeRead) {
        __syncthreads();
        buf[threadIdx.x] = 7;
    }
    if (threadIdx.x == 0 && BUG != NoReadWait) bulk_wait_read();
}
template __global__ void bulk_copy<None>(const int*, int*, int);
template __global__ void bulk_copy<ExpectTooMuch>(const int*, int*, int);
template __global__ void bulk_copy<ExpectTooLittle>(const int*, int*, int);
template __global__ void bulk_copy<NoWait>(const int*, int*, int);
template __global__ void bulk_copy<NoFence>(const int*, int*, int);
template __global__ void bulk_copy<NoInit>(const int*, int*, int);
template __global__ void bulk_copy<OverwriteBeforeRead>(const int*, int*, int);
template __global__ void bulk_copy<DoubleArrive>(const int*, int*, int);
template __global__ void bulk_copy<NoReadWait>(const int*, int*, int);

// One box: load with swizzle IN, copy chunk by chunk to the OUT swizzle, store.
template <int IN, int OUT, bool ADD>
__global__ void box_copy(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, int rows,
                         int row_bytes, int x, int y) {
    extern __shared__ __align__(1024) char sm[];
    char *a = sm, *b = sm + 32768;
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0) mbar_expect(&bar, rows * row_bytes), tma_load_2d(a, &in, x, y, &bar);
    mbar_wait(&bar, 0);
    auto at = [&](int r, int c, int span) { return swizzled(r, c, max(row_bytes, span), span); };
    int chunks = row_bytes / 16;
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x)
        *(int4*)(b + at(i / chunks, i % chunks, OUT)) = *(int4*)(a + at(i / chunks, i % chunks, IN));
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (ADD)
            tma_add_2d(&out, b, x, y);
        else
            tma_store_2d(&out, b, x, y);
        bulk_commit();
        bulk_wait();
    }
}
template __global__ void box_copy<0, 0, false>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                               int, int, int, int);
template __global__ void box_copy<32, 128, false>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                  int, int, int, int);
template __global__ void box_copy<64, 32, false>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                 int, int, int, int);
template __global__ void box_copy<128, 64, false>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                  int, int, int, int);
template __global__ void box_copy<128, 128, true>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap,
                                                  int, int, int, int);

// Each CTA of a pair loads half a tile and multicasts it to both.
extern "C" __global__ void __cluster_dims__(2, 1, 1) multicast(const __grid_constant__ TensorMap in, int* out) {
    __shared__ __align__(128) int buf[2][16 * 32];
    __shared__ uint64_t bar;
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    cluster_sync();
    if (threadIdx.x == 0) mbar_expect(&bar, sizeof buf), tma_load_2d_multicast(buf[rank], &in, 0, rank * 16, &bar, 3);
    mbar_wait(&bar, 0);
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) out[blockIdx.x * 1024 + i] = buf[i / 512][i % 512];
    cluster_sync();
}

extern "C" __global__ void load_3d(const __grid_constant__ TensorMap in, int* out, int x, int y, int z) {
    __shared__ __align__(128) int buf[2 * 4 * 8];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0) mbar_expect(&bar, sizeof buf), tma_load_3d(buf, &in, x, y, z, &bar);
    mbar_wait(&bar, 0);
    if (threadIdx.x < 64) out[threadIdx.x] = buf[threadIdx.x];
}

// Builds a tensor map for another matrix in shared memory, publishes it to
// global memory and loads through it.
extern "C" __global__ void replace_map(const __grid_constant__ TensorMap base, TensorMap* slot, const int* matrix,
                                       int cols, int rows, int* out) {
    __shared__ __align__(128) TensorMap m;
    __shared__ __align__(128) int buf[8 * 32];
    __shared__ uint64_t bar;
    if (threadIdx.x < 32) ((int*)&m)[threadIdx.x] = ((const int*)&base)[threadIdx.x];
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t a = smem_addr(&m);
        asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(a), "l"(matrix)
                     : "memory");
        asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;" ::"r"(a), "r"(cols)
                     : "memory");
        asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" ::"r"(a), "r"(rows)
                     : "memory");
        asm volatile("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%0], 0, %1;" ::"r"(a),
                     "l"(uint64_t(cols) * 4)
                     : "memory");
    }
    __syncthreads();
    if (threadIdx.x < 32)
        asm volatile(
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::
                "l"(slot),
            "r"(smem_addr(&m))
            : "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(slot) : "memory");
        mbar_expect(&bar, sizeof buf);
        tma_load_2d(buf, slot, 0, 1, &bar);
    }
    mbar_wait(&bar, 0);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) out[i] = buf[i];
}

// st.async into the next CTA of the cluster.
extern "C" __global__ void __cluster_dims__(2, 1, 1) st_async(int* out) {
    __shared__ __align__(16) int buf[32];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init(), mbar_expect(&bar, sizeof buf);
    cluster_sync();
    uint32_t peer = cluster_rank() ^ 1, dst, rb;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(dst) : "r"(smem_addr(&buf[threadIdx.x])), "r"(peer));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(rb) : "r"(smem_addr(&bar)), "r"(peer));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(dst),
                 "r"(cluster_rank() * 100 + threadIdx.x), "r"(rb)
                 : "memory");
    mbar_wait(&bar, 0);
    out[blockIdx.x * 32 + threadIdx.x] = buf[threadIdx.x];
    cluster_sync();
}

// A box as it lies in shared memory: loaded over a pattern and copied out, or copied in and stored.
extern "C" __global__ void load_raw(const __grid_constant__ TensorMap map, int4* out, int chunks, int box_bytes, int x,
                                    int y) {
    extern __shared__ __align__(1024) int4 image[];
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) mbar_init(&bar, 1), fence_mbar_init();
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) image[i] = make_int4(-1, -1, -1, -1);
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) mbar_expect(&bar, box_bytes), tma_load_2d(image, &map, x, y, &bar);
    mbar_wait(&bar, 0);
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) out[i] = image[i];
}
extern "C" __global__ void store_raw(const __grid_constant__ TensorMap map, const int4* in, int chunks, int add, int x,
                                     int y) {
    extern __shared__ __align__(1024) int4 image[];
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) image[i] = in[i];
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (add)
            tma_add_2d(&map, image, x, y);
        else
            tma_store_2d(&map, image, x, y);
        bulk_commit();
        bulk_wait();
    }
}
