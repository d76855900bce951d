// Copies between global memory, shared memory and registers: cp.async, ldmatrix.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions
#pragma once
#include "ptx/arch.cuh"

// A generic pointer into shared memory as the 32-bit address that the instructions below take.
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// cp.async.cg.shared.global, 16 bytes, past L1. With valid false nothing is read and 16 zero bytes are written.
DEVICE void cp_async_chunk(u32 destination, const void* source, bool valid) {
    const u64 global = __cvta_generic_to_global(source);
    const u32 bytes = valid ? kChunkBytes : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(global), "r"(bytes)
                 : "memory");
}

// cp.async.ca.shared.global, 4 bytes.
DEVICE void cp_async_word(u32 destination, const void* source) {
    const u64 global = __cvta_generic_to_global(source);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(global) : "memory");
}

// cp.async.commit_group: the copies that this thread issued since the last commit become one group.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: all but the newest kPending groups of this thread have landed.
template <int kPending>
DEVICE void cp_async_wait() {
    static_assert(kPending >= 0 && kPending < 8, "cp_async_wait: a wait for all but 0 to 7 groups");
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ldmatrix.x4: four 8x8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8 and
// receives, of each matrix, the elements 2*(l%4) and 2*(l%4)+1 of row l/4.
DEVICE void ldmatrix_x4(u32 (&fragment)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// ldmatrix.x4.trans: as above with each matrix transposed: lane l receives rows 2*(l%4) and +1 of column l/4.
DEVICE void ldmatrix_x4_trans(u32 (&fragment)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}
