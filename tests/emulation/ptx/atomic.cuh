// Emulated twin of kernels_cu/ptx/atomic.cuh.
#pragma once
#include "ptx/arch.cuh"

DEVICE i32 atomic_add(i32* counter, i32 value) { return machine::atomic_add(counter, value); }
DEVICE i32 atomic_add_in_order(i32* counter, i32 value) { return machine::atomic_add_in_order(counter, value); }
