// `wgmma.mma_async` of FP8 (PTX ISA, section of that name): 64 x N products with FP32 accumulators, one struct for each N.
// Whether to accumulate is a constant. CUTLASS's functions, which wgmma.cuh uses for BF16, compute a predicate each time, and
// the sums of FP8 begin anew with every K block.
#pragma once

#include <cstdint>

namespace deep_gemm::sm90 {

// The N / 2 accumulators of a thread: what the instruction calls them, and the operands.
#define DG_WGMMA_NAMES_4 "%0, %1, %2, %3"
#define DG_WGMMA_NAMES_8 DG_WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define DG_WGMMA_NAMES_12 DG_WGMMA_NAMES_8 ", %8, %9, %10, %11"
#define DG_WGMMA_NAMES_16 DG_WGMMA_NAMES_12 ", %12, %13, %14, %15"
#define DG_WGMMA_NAMES_24 DG_WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define DG_WGMMA_NAMES_32 DG_WGMMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define DG_WGMMA_NAMES_40 DG_WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define DG_WGMMA_NAMES_48 DG_WGMMA_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define DG_WGMMA_NAMES_56 DG_WGMMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define DG_WGMMA_NAMES_64 DG_WGMMA_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define DG_WGMMA_NAMES_72 DG_WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define DG_WGMMA_NAMES_80 DG_WGMMA_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define DG_WGMMA_NAMES_88 DG_WGMMA_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define DG_WGMMA_NAMES_96 DG_WGMMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define DG_WGMMA_NAMES_112 DG_WGMMA_NAMES_96                                                                          \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define DG_WGMMA_NAMES_128 DG_WGMMA_NAMES_112                                                                         \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define DG_WGMMA_VALUES_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DG_WGMMA_VALUES_8(i) DG_WGMMA_VALUES_4(i), DG_WGMMA_VALUES_4(i + 4)
#define DG_WGMMA_VALUES_16(i) DG_WGMMA_VALUES_8(i), DG_WGMMA_VALUES_8(i + 8)
#define DG_WGMMA_VALUES_32(i) DG_WGMMA_VALUES_16(i), DG_WGMMA_VALUES_16(i + 16)
#define DG_WGMMA_OPERANDS_4 DG_WGMMA_VALUES_4(0)
#define DG_WGMMA_OPERANDS_8 DG_WGMMA_VALUES_8(0)
#define DG_WGMMA_OPERANDS_12 DG_WGMMA_VALUES_8(0), DG_WGMMA_VALUES_4(8)
#define DG_WGMMA_OPERANDS_16 DG_WGMMA_VALUES_16(0)
#define DG_WGMMA_OPERANDS_24 DG_WGMMA_VALUES_16(0), DG_WGMMA_VALUES_8(16)
#define DG_WGMMA_OPERANDS_32 DG_WGMMA_VALUES_32(0)
#define DG_WGMMA_OPERANDS_40 DG_WGMMA_VALUES_32(0), DG_WGMMA_VALUES_8(32)
#define DG_WGMMA_OPERANDS_48 DG_WGMMA_VALUES_32(0), DG_WGMMA_VALUES_16(32)
#define DG_WGMMA_OPERANDS_56 DG_WGMMA_OPERANDS_48, DG_WGMMA_VALUES_8(48)
#define DG_WGMMA_OPERANDS_64 DG_WGMMA_VALUES_32(0), DG_WGMMA_VALUES_32(32)
#define DG_WGMMA_OPERANDS_72 DG_WGMMA_OPERANDS_64, DG_WGMMA_VALUES_8(64)
#define DG_WGMMA_OPERANDS_80 DG_WGMMA_OPERANDS_64, DG_WGMMA_VALUES_16(64)
#define DG_WGMMA_OPERANDS_88 DG_WGMMA_OPERANDS_80, DG_WGMMA_VALUES_8(80)
#define DG_WGMMA_OPERANDS_96 DG_WGMMA_OPERANDS_64, DG_WGMMA_VALUES_32(64)
#define DG_WGMMA_OPERANDS_128 DG_WGMMA_OPERANDS_96, DG_WGMMA_VALUES_32(96)

// d (+)= A B^T, E4M3 and K-major. A's 64 rows are in shared memory or in four registers of each thread, B's N columns in shared
// memory.
template <int kN>
struct WgmmaInstruction;

// kD accumulators, and the numbers of the operands behind them.
#define DG_WGMMA(kN, kD, k1, k2, k3, k4, k5)                                                                          \
    template <>                                                                                                       \
    struct WgmmaInstruction<kN> {                                                                                     \
        using Accumulator = float[kD];                                                                                \
                                                                                                                      \
        template <bool kAccumulate>                                                                                   \
        __device__ __forceinline__ static void run(Accumulator& d, uint64_t a, uint64_t b) {                          \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" DG_WGMMA_NAMES_##kD            \
                         "}, %" #kD ", %" #k1 ", %" #k2 ", 1, 1;"                                                     \
                         : DG_WGMMA_OPERANDS_##kD                                                                     \
                         : "l"(a), "l"(b), "n"(int{kAccumulate}));                                                    \
        }                                                                                                             \
                                                                                                                      \
        template <bool kAccumulate>                                                                                   \
        __device__ __forceinline__ static void run(Accumulator& d, const uint32_t (&a)[4], uint64_t b) {              \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #kN "k32.f32.e4m3.e4m3 {" DG_WGMMA_NAMES_##kD            \
                         "}, {%" #kD ", %" #k1 ", %" #k2 ", %" #k3 "}, %" #k4 ", %" #k5 ", 1, 1;"                     \
                         : DG_WGMMA_OPERANDS_##kD                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAccumulate}));                \
        }                                                                                                             \
    };
DG_WGMMA(8, 4, 5, 6, 7, 8, 9)
DG_WGMMA(16, 8, 9, 10, 11, 12, 13)
DG_WGMMA(24, 12, 13, 14, 15, 16, 17)
DG_WGMMA(32, 16, 17, 18, 19, 20, 21)
DG_WGMMA(48, 24, 25, 26, 27, 28, 29)
DG_WGMMA(64, 32, 33, 34, 35, 36, 37)
DG_WGMMA(80, 40, 41, 42, 43, 44, 45)
DG_WGMMA(96, 48, 49, 50, 51, 52, 53)
DG_WGMMA(112, 56, 57, 58, 59, 60, 61)
DG_WGMMA(128, 64, 65, 66, 67, 68, 69)
DG_WGMMA(144, 72, 73, 74, 75, 76, 77)
DG_WGMMA(160, 80, 81, 82, 83, 84, 85)
DG_WGMMA(176, 88, 89, 90, 91, 92, 93)
DG_WGMMA(192, 96, 97, 98, 99, 100, 101)
DG_WGMMA(256, 128, 129, 130, 131, 132, 133)

#undef DG_WGMMA

}  // namespace deep_gemm::sm90
