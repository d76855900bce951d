// Atomic operations on global memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-atom
#pragma once
#include "ptx/arch.cuh"

// atom.add: adds, and returns what was there before.
DEVICE i32 atomic_add(i32* counter, i32 value) {
    i32 before;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(value)
                 : "memory");
    return before;
}

// The same, with order: what the thread knew before is known to whoever adds here later (atom.acq_rel).
DEVICE i32 atomic_add_in_order(i32* counter, i32 value) {
    i32 before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(value)
                 : "memory");
    return before;
}
