// Emulated twin of kernels_cu/ptx/arch.cuh: the same names on the machine of machine.hpp.
#pragma once
#include "machine.hpp"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

static constexpr u32 kFullWarp = 0xffffffffu;
static constexpr int kWarpSize = 32;

struct alignas(16) Chunk {
    u32 word[4];
};
static constexpr int kChunkBytes = 16;

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE int thread_index() { return static_cast<int>(machine::place.thread.x); }
DEVICE int block_index() { return static_cast<int>(machine::place.block.x); }
DEVICE int block_index_y() { return static_cast<int>(machine::place.block.y); }
DEVICE int block_index_z() { return static_cast<int>(machine::place.block.z); }
DEVICE u32 anew(u32 x) { return x; }
DEVICE i32 anew(i32 x) { return x; }
DEVICE i64 anew(i64 x) { return x; }
