// Emulated twin of kernels_cu/ptx/barrier.cuh.
#pragma once
#include "ptx/arch.cuh"

DEVICE void mbarrier_init(u32 barrier, u32 arrivals) { machine::mbarrier_init(barrier, arrivals); }
DEVICE void fence_mbarrier_init() { machine::mbarrier_init_fence(); }
DEVICE void fence_proxy_async() { machine::async_proxy_fence(); }
DEVICE void mbarrier_arrive(u32 barrier) { machine::mbarrier_arrive(barrier); }
DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) { machine::mbarrier_expect(barrier, bytes); }
DEVICE bool mbarrier_try_wait(u32 barrier, u32 parity) { return machine::mbarrier_wait(barrier, parity); }
DEVICE void named_barrier_sync(int barrier, int threads) { machine::named_barrier(barrier, threads, true); }
DEVICE void named_barrier_arrive(int barrier, int threads) { machine::named_barrier(barrier, threads, false); }
template <int kRegisters>
DEVICE void give_registers() {}
template <int kRegisters>
DEVICE void take_registers() {}
