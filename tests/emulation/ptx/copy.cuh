// Emulated twin of kernels_cu/ptx/copy.cuh.
#pragma once
#include "ptx/arch.cuh"

DEVICE u32 shared_address(const void* pointer) { return machine::shared_address(pointer); }
DEVICE void cp_async_chunk(u32 destination, const void* source, bool valid) {
    machine::copy_async(destination, source, 16, valid);
}
DEVICE void cp_async_word(u32 destination, const void* source) { machine::copy_async(destination, source, 4, true); }
DEVICE void cp_async_commit() { machine::copy_commit(); }
template <int kPending>
DEVICE void cp_async_wait() {
    machine::copy_wait(kPending);
}
DEVICE void ldmatrix_x4(u32 (&fragment)[4], u32 address) {
    u32 loaded[4];
    machine::together("ldmatrix.x4", machine::load_matrices, &address, loaded);
    for (int i = 0; i < 4; ++i) fragment[i] = loaded[i];
}
DEVICE void ldmatrix_x4_trans(u32 (&fragment)[4], u32 address) {
    u32 loaded[4];
    machine::together("ldmatrix.x4.trans", machine::load_matrices_transposed, &address, loaded);
    for (int i = 0; i < 4; ++i) fragment[i] = loaded[i];
}
