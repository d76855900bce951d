// Barriers in shared memory that copies and threads arrive at (mbarrier), barriers by number among some of the warps
// of a thread block (bar), and the registers that a group of warps holds (setmaxnreg).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions
#pragma once
#include "ptx/arch.cuh"

// mbarrier.init: a phase is complete after this many arrivals, and when the bytes that were announced have come.
DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: makes initialised barriers visible to the copy engine.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// fence.proxy.async: what this thread wrote to shared memory is visible to products and copies that start after it, and
// after whatever orders other threads behind it.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// mbarrier.arrive: one arrival, which releases what the thread did before.
DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.expect_tx: one arrival that announces bytes, at most 2**20 - 1 in a phase.
DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// How long a thread may sleep at a barrier before it looks again: longer than anything takes, since it is woken up.
static constexpr u32 kWaitNanoseconds = 10000000;

// mbarrier.try_wait.parity: whether the phase of this parity is complete; waits for a time that the hardware limits.
// A fresh barrier is in phase 0, and the phase before it, of parity 1, counts as complete.
DEVICE bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 complete;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3; selp.u32 %0, 1, 0, p; }"
        : "=r"(complete)
        : "r"(barrier), "r"(parity), "r"(kWaitNanoseconds)
        : "memory");
    return complete != 0;
}

// bar.sync: waits until that many threads have come to barrier number 0 to 15. __syncthreads is number 0.
DEVICE void named_barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// bar.arrive: comes to the barrier without waiting.
DEVICE void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// setmaxnreg.dec: gives registers back; all warps of a group of four warps call it.
template <int kRegisters>
DEVICE void give_registers() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg: 24 to 256, in steps of 8");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// setmaxnreg.inc: waits until there are registers, and takes them.
template <int kRegisters>
DEVICE void take_registers() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg: 24 to 256, in steps of 8");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
