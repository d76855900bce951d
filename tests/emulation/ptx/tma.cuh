// Emulated twin of kernels_cu/ptx/tma.cuh.
#pragma once
#include "ptx/arch.cuh"

struct alignas(64) TensorMap {
    u64 word[16];
};

DEVICE void prefetch_tensor_map(const TensorMap* map) {}
DEVICE u64 policy_evict_last() { return 0; }
DEVICE u64 policy_evict_first() { return 0; }
DEVICE void tma_load_4d(u32 destination, const TensorMap* map, u32 barrier, const int (&x)[4], u64 policy) {
    const int place[4] = {x[0], x[1], x[2], x[3]};
    machine::copy_box(destination, map, barrier, place, 4);
}
