// Copies of tiles from global to shared memory by the copy engine (TMA).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once
#include "ptx/arch.cuh"

// What cuTensorMapEncodeTiled writes: addresses, sizes, strides, box and swizzle of an array.
struct alignas(64) TensorMap {
    u64 word[16];
};

// prefetch.tensormap: brings a map near the copy engine.
DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// createpolicy: a hint for L2 that what is read will be read again soon.
DEVICE u64 policy_evict_last() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// createpolicy: a hint for L2 that what is read will not be read again.
DEVICE u64 policy_evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// cp.async.bulk.tensor: one box of an array with four axes, the fastest first, which starts at x; what lies outside
// the array arrives as zeros. When it has landed, all of its bytes count as arrived at the barrier.
DEVICE void tma_load_4d(u32 destination, const TensorMap* map, u32 barrier, const int (&x)[4], u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(policy)
        : "memory");
}
