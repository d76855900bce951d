// Emulated twin of kernels_cu/ptx/mma.cuh.
#pragma once
#include "ptx/arch.cuh"

DEVICE void mma_with(const char* name, machine::WarpInstruction instruction, float (&d)[4], const u32 (&a)[4], u32 b0,
                     u32 b1) {
    const machine::Product product = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    float sum[4];
    machine::together(name, instruction, &product, sum);
    for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

DEVICE void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_with("mma.m16n8k16.f16", machine::multiply_f16, d, a, b0, b1);
}
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_with("mma.m16n8k16.bf16", machine::multiply_bf16, d, a, b0, b1);
}
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    mma_with("mma.m16n8k8.tf32", machine::multiply_tf32, d, a, b0, b1);
}
