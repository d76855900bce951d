// Matrix products of a warpgroup (four warps, the first a multiple of four) with float32 accumulators: d += a * b,
// asynchronous, b from shared memory. https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
// Accumulator: lane l of warp w holds row 16 w + l/4, columns 8 j + 2 (l%4) and + 1, in d[j][0] and d[j][1], and row
// + 8 in d[j][2] and d[j][3].
#pragma once
#include "ptx/arch.cuh"

// wgmma.fence: orders register accesses before it against products after it.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: the products that were issued since the last commit become one group.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: all but the newest kPending groups are complete.
template <int kPending>
DEVICE void wgmma_wait() {
    static_assert(kPending >= 0 && kPending < 8, "wgmma_wait: a wait for all but 0 to 7 groups");
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler must take the registers to be written here, so that it reads none of them earlier.
template <int kTiles>
DEVICE void wgmma_pin(float (&d)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
    }
}

// Zeros in the place of a product over no columns. Plain assignments behind a branch would become choices, register by
// register, for which ptxas waits.
template <int kTiles>
DEVICE void wgmma_clear(float (&d)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        asm volatile("{ mov.f32 %0, 0f00000000; mov.f32 %1, 0f00000000; mov.f32 %2, 0f00000000; mov.f32 %3, 0f00000000; }"
                     : "=f"(d[i][0]), "=f"(d[i][1]), "=f"(d[i][2]), "=f"(d[i][3])::"memory");
    }
}

// wgmma.mma_async.m64nNk16 for N = 16, 32, ... 256: the instruction names every accumulator, so there is one function
// for each N, which the size of d chooses.
//   wgmma_f16, wgmma_bf16            a (64, 16) and b (N, 16), both with the sum's axis contiguous, in shared memory
//   wgmma_down_f16, _down_bf16       the same a; b (16, N) with N contiguous
//   wgmma_values_f16, _values_bf16   a in registers, as mma.m16n8k16 has it; b (16, N) with N contiguous
// kAccumulate false: d = a * b.
#define WGMMA_P1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_P2 WGMMA_P1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_P3 WGMMA_P2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_P4 WGMMA_P3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_P5 WGMMA_P4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_P6 WGMMA_P5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_P7 WGMMA_P6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_P8 WGMMA_P7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_P9 WGMMA_P8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_P10 WGMMA_P9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_P11 WGMMA_P10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_P12 WGMMA_P11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_P13 WGMMA_P12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_P14 WGMMA_P13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_P15 WGMMA_P14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_P16 WGMMA_P15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D1 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
    "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3])
#define WGMMA_D2 WGMMA_D1, "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
    "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
#define WGMMA_D3 WGMMA_D2, "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
    "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3])
#define WGMMA_D4 WGMMA_D3, "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
    "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define WGMMA_D5 WGMMA_D4, "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), \
    "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3])
#define WGMMA_D6 WGMMA_D5, "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), \
    "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3])
#define WGMMA_D7 WGMMA_D6, "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), \
    "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3])
#define WGMMA_D8 WGMMA_D7, "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), \
    "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
#define WGMMA_D9 WGMMA_D8, "+f"(d[16][0]), "+f"(d[16][1]), "+f"(d[16][2]), "+f"(d[16][3]), \
    "+f"(d[17][0]), "+f"(d[17][1]), "+f"(d[17][2]), "+f"(d[17][3])
#define WGMMA_D10 WGMMA_D9, "+f"(d[18][0]), "+f"(d[18][1]), "+f"(d[18][2]), "+f"(d[18][3]), \
    "+f"(d[19][0]), "+f"(d[19][1]), "+f"(d[19][2]), "+f"(d[19][3])
#define WGMMA_D11 WGMMA_D10, "+f"(d[20][0]), "+f"(d[20][1]), "+f"(d[20][2]), "+f"(d[20][3]), \
    "+f"(d[21][0]), "+f"(d[21][1]), "+f"(d[21][2]), "+f"(d[21][3])
#define WGMMA_D12 WGMMA_D11, "+f"(d[22][0]), "+f"(d[22][1]), "+f"(d[22][2]), "+f"(d[22][3]), \
    "+f"(d[23][0]), "+f"(d[23][1]), "+f"(d[23][2]), "+f"(d[23][3])
#define WGMMA_D13 WGMMA_D12, "+f"(d[24][0]), "+f"(d[24][1]), "+f"(d[24][2]), "+f"(d[24][3]), \
    "+f"(d[25][0]), "+f"(d[25][1]), "+f"(d[25][2]), "+f"(d[25][3])
#define WGMMA_D14 WGMMA_D13, "+f"(d[26][0]), "+f"(d[26][1]), "+f"(d[26][2]), "+f"(d[26][3]), \
    "+f"(d[27][0]), "+f"(d[27][1]), "+f"(d[27][2]), "+f"(d[27][3])
#define WGMMA_D15 WGMMA_D14, "+f"(d[28][0]), "+f"(d[28][1]), "+f"(d[28][2]), "+f"(d[28][3]), \
    "+f"(d[29][0]), "+f"(d[29][1]), "+f"(d[29][2]), "+f"(d[29][3])
#define WGMMA_D16 WGMMA_D15, "+f"(d[30][0]), "+f"(d[30][1]), "+f"(d[30][2]), "+f"(d[30][3]), \
    "+f"(d[31][0]), "+f"(d[31][1]), "+f"(d[31][2]), "+f"(d[31][3])
#define WGMMA(NAME, TYPE, N, B, X0, X1, X2, X3, X4, X5)                                                               \
    template <bool kAccumulate>                                                                                       \
    DEVICE void wgmma_##NAME(float (&d)[2 * B][4], u64 a, u64 b) {                                                    \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " X2 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE  \
                     "." TYPE " {" WGMMA_P##B "}, " X0 ", " X1 ", p, 1, 1, 0, 0; }"                                   \
                     : WGMMA_D##B                                                                                     \
                     : "l"(a), "l"(b), "n"(int(kAccumulate)));                                                        \
    }                                                                                                                 \
    template <bool kAccumulate>                                                                                       \
    DEVICE void wgmma_down_##NAME(float (&d)[2 * B][4], u64 a, u64 b) {                                               \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " X2 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE  \
                     "." TYPE " {" WGMMA_P##B "}, " X0 ", " X1 ", p, 1, 1, 0, 1; }"                                   \
                     : WGMMA_D##B                                                                                     \
                     : "l"(a), "l"(b), "n"(int(kAccumulate)));                                                        \
    }                                                                                                                 \
    template <bool kAccumulate>                                                                                       \
    DEVICE void wgmma_values_##NAME(float (&d)[2 * B][4], const u32 (&a)[4], u64 b) {                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " X5 ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE  \
                     "." TYPE " {" WGMMA_P##B "}, {" X0 ", " X1 ", " X2 ", " X3 "}, " X4 ", p, 1, 1, 1; }"            \
                     : WGMMA_D##B                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAccumulate)));                    \
    }
#define WGMMA_TYPES(N, B, ...) WGMMA(f16, "f16", N, B, __VA_ARGS__) WGMMA(bf16, "bf16", N, B, __VA_ARGS__)
WGMMA_TYPES("16", 1, "%8", "%9", "%10", "%11", "%12", "%13")
WGMMA_TYPES("32", 2, "%16", "%17", "%18", "%19", "%20", "%21")
WGMMA_TYPES("48", 3, "%24", "%25", "%26", "%27", "%28", "%29")
WGMMA_TYPES("64", 4, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_TYPES("80", 5, "%40", "%41", "%42", "%43", "%44", "%45")
WGMMA_TYPES("96", 6, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA_TYPES("112", 7, "%56", "%57", "%58", "%59", "%60", "%61")
WGMMA_TYPES("128", 8, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_TYPES("144", 9, "%72", "%73", "%74", "%75", "%76", "%77")
WGMMA_TYPES("160", 10, "%80", "%81", "%82", "%83", "%84", "%85")
WGMMA_TYPES("176", 11, "%88", "%89", "%90", "%91", "%92", "%93")
WGMMA_TYPES("192", 12, "%96", "%97", "%98", "%99", "%100", "%101")
WGMMA_TYPES("208", 13, "%104", "%105", "%106", "%107", "%108", "%109")
WGMMA_TYPES("224", 14, "%112", "%113", "%114", "%115", "%116", "%117")
WGMMA_TYPES("240", 15, "%120", "%121", "%122", "%123", "%124", "%125")
WGMMA_TYPES("256", 16, "%128", "%129", "%130", "%131", "%132", "%133")
#undef WGMMA_TYPES
#undef WGMMA
