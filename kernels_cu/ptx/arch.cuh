// Types that NVRTC lacks without headers, and the function qualifiers of this library.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

static constexpr u32 kFullWarp = 0xffffffffu;
static constexpr int kWarpSize = 32;

// Sixteen bytes: the unit of asynchronous copies and of vector loads and stores.
struct alignas(16) Chunk {
    u32 word[4];
};
static constexpr int kChunkBytes = 16;

// Infinity without <math.h>, which NVRTC does not have.
DEVICE float infinity() { return __int_as_float(0x7f800000); }

// threadIdx and blockIdx, read anew at every call: what is derived from them far apart is computed twice instead of being
// held in registers over the whole loop between.
#define READ_ANEW(special_register)                                    \
    int index;                                                         \
    asm volatile("mov.u32 %0, %%" special_register ";" : "=r"(index)); \
    return index;
DEVICE int thread_index() { READ_ANEW("tid.x") }
DEVICE int block_index() { READ_ANEW("ctaid.x") }
DEVICE int block_index_y() { READ_ANEW("ctaid.y") }
DEVICE int block_index_z() { READ_ANEW("ctaid.z") }
#undef READ_ANEW

// No instruction: the same number, of which the compiler knows nothing. What follows from it is made where it is used,
// instead of being held in registers over a loop, and no read moves across.
DEVICE u32 anew(u32 x) {
    asm volatile("" : "+r"(x)::"memory");
    return x;
}
DEVICE i32 anew(i32 x) {
    asm volatile("" : "+r"(x)::"memory");
    return x;
}
DEVICE i64 anew(i64 x) {
    asm volatile("" : "+l"(x)::"memory");
    return x;
}
