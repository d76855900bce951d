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

// wgmma.mma_async.m64nNk16 for N = 16, 32, ... 256: the instruction names every accumulator, so there is one function
// for each N, which the size of d chooses.
//   wgmma_f16, wgmma_bf16            a (64, 16) and b (N, 16), both with the sum's axis contiguous, in shared memory
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
#define WGMMA_D1(C) C(d[0][0]), C(d[0][1]), C(d[0][2]), C(d[0][3]), \
    C(d[1][0]), C(d[1][1]), C(d[1][2]), C(d[1][3])
#define WGMMA_D2(C) WGMMA_D1(C), C(d[2][0]), C(d[2][1]), C(d[2][2]), C(d[2][3]), \
    C(d[3][0]), C(d[3][1]), C(d[3][2]), C(d[3][3])
#define WGMMA_D3(C) WGMMA_D2(C), C(d[4][0]), C(d[4][1]), C(d[4][2]), C(d[4][3]), \
    C(d[5][0]), C(d[5][1]), C(d[5][2]), C(d[5][3])
#define WGMMA_D4(C) WGMMA_D3(C), C(d[6][0]), C(d[6][1]), C(d[6][2]), C(d[6][3]), \
    C(d[7][0]), C(d[7][1]), C(d[7][2]), C(d[7][3])
#define WGMMA_D5(C) WGMMA_D4(C), C(d[8][0]), C(d[8][1]), C(d[8][2]), C(d[8][3]), \
    C(d[9][0]), C(d[9][1]), C(d[9][2]), C(d[9][3])
#define WGMMA_D6(C) WGMMA_D5(C), C(d[10][0]), C(d[10][1]), C(d[10][2]), C(d[10][3]), \
    C(d[11][0]), C(d[11][1]), C(d[11][2]), C(d[11][3])
#define WGMMA_D7(C) WGMMA_D6(C), C(d[12][0]), C(d[12][1]), C(d[12][2]), C(d[12][3]), \
    C(d[13][0]), C(d[13][1]), C(d[13][2]), C(d[13][3])
#define WGMMA_D8(C) WGMMA_D7(C), C(d[14][0]), C(d[14][1]), C(d[14][2]), C(d[14][3]), \
    C(d[15][0]), C(d[15][1]), C(d[15][2]), C(d[15][3])
#define WGMMA_D9(C) WGMMA_D8(C), C(d[16][0]), C(d[16][1]), C(d[16][2]), C(d[16][3]), \
    C(d[17][0]), C(d[17][1]), C(d[17][2]), C(d[17][3])
#define WGMMA_D10(C) WGMMA_D9(C), C(d[18][0]), C(d[18][1]), C(d[18][2]), C(d[18][3]), \
    C(d[19][0]), C(d[19][1]), C(d[19][2]), C(d[19][3])
#define WGMMA_D11(C) WGMMA_D10(C), C(d[20][0]), C(d[20][1]), C(d[20][2]), C(d[20][3]), \
    C(d[21][0]), C(d[21][1]), C(d[21][2]), C(d[21][3])
#define WGMMA_D12(C) WGMMA_D11(C), C(d[22][0]), C(d[22][1]), C(d[22][2]), C(d[22][3]), \
    C(d[23][0]), C(d[23][1]), C(d[23][2]), C(d[23][3])
#define WGMMA_D13(C) WGMMA_D12(C), C(d[24][0]), C(d[24][1]), C(d[24][2]), C(d[24][3]), \
    C(d[25][0]), C(d[25][1]), C(d[25][2]), C(d[25][3])
#define WGMMA_D14(C) WGMMA_D13(C), C(d[26][0]), C(d[26][1]), C(d[26][2]), C(d[26][3]), \
    C(d[27][0]), C(d[27][1]), C(d[27][2]), C(d[27][3])
#define WGMMA_D15(C) WGMMA_D14(C), C(d[28][0]), C(d[28][1]), C(d[28][2]), C(d[28][3]), \
    C(d[29][0]), C(d[29][1]), C(d[29][2]), C(d[29][3])
#define WGMMA_D16(C) WGMMA_D15(C), C(d[30][0]), C(d[30][1]), C(d[30][2]), C(d[30][3]), \
    C(d[31][0]), C(d[31][1]), C(d[31][2]), C(d[31][3])
#define WGMMA_ROWS(C, TYPE, N, B, SCALE, X0, X1) \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
                 "." TYPE " {" WGMMA_P##B "}, " X0 ", " X1 ", p, 1, 1, 0, 0; }" \
                 : WGMMA_D##B(C) \
                 : "l"(a), "l"(b))
#define WGMMA_VALUES(C, TYPE, N, B, SCALE, X0, X1, X2, X3, X4) \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " SCALE ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE \
                 "." TYPE " {" WGMMA_P##B "}, {" X0 ", " X1 ", " X2 ", " X3 "}, " X4 ", p, 1, 1, 1; }" \
                 : WGMMA_D##B(C) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA(NAME, TYPE, N, B, X0, X1, X2, X3, X4) \
    template <bool kAccumulate> \
    DEVICE void wgmma_##NAME(float (&d)[2 * B][4], u64 a, u64 b) { \
        if constexpr (kAccumulate) { \
            WGMMA_ROWS("+f", TYPE, N, B, "1", X0, X1); \
        } else { \
            WGMMA_ROWS("=f", TYPE, N, B, "0", X0, X1); \
        } \
    } \
    template <bool kAccumulate> \
    DEVICE void wgmma_values_##NAME(float (&d)[2 * B][4], const u32 (&a)[4], u64 b) { \
        if constexpr (kAccumulate) { \
            WGMMA_VALUES("+f", TYPE, N, B, "1", X0, X1, X2, X3, X4); \
        } else { \
            WGMMA_VALUES("=f", TYPE, N, B, "0", X0, X1, X2, X3, X4); \
        } \
    }
#define WGMMA_TYPES(N, B, ...) WGMMA(f16, "f16", N, B, __VA_ARGS__) WGMMA(bf16, "bf16", N, B, __VA_ARGS__)
WGMMA_TYPES("16", 1, "%8", "%9", "%10", "%11", "%12")
WGMMA_TYPES("32", 2, "%16", "%17", "%18", "%19", "%20")
WGMMA_TYPES("48", 3, "%24", "%25", "%26", "%27", "%28")
WGMMA_TYPES("64", 4, "%32", "%33", "%34", "%35", "%36")
WGMMA_TYPES("80", 5, "%40", "%41", "%42", "%43", "%44")
WGMMA_TYPES("96", 6, "%48", "%49", "%50", "%51", "%52")
WGMMA_TYPES("112", 7, "%56", "%57", "%58", "%59", "%60")
WGMMA_TYPES("128", 8, "%64", "%65", "%66", "%67", "%68")
WGMMA_TYPES("144", 9, "%72", "%73", "%74", "%75", "%76")
WGMMA_TYPES("160", 10, "%80", "%81", "%82", "%83", "%84")
WGMMA_TYPES("176", 11, "%88", "%89", "%90", "%91", "%92")
WGMMA_TYPES("192", 12, "%96", "%97", "%98", "%99", "%100")
WGMMA_TYPES("208", 13, "%104", "%105", "%106", "%107", "%108")
WGMMA_TYPES("224", 14, "%112", "%113", "%114", "%115", "%116")
WGMMA_TYPES("240", 15, "%120", "%121", "%122", "%123", "%124")
WGMMA_TYPES("256", 16, "%128", "%129", "%130", "%131", "%132")
#undef WGMMA_TYPES
#undef WGMMA
#undef WGMMA_ROWS
#undef WGMMA_VALUES
