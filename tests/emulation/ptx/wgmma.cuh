// Emulated twin of kernels_cu/ptx/wgmma.cuh. Every warp of a warpgroup computes its sixteen rows.
#pragma once
#include "ptx/arch.cuh"

DEVICE void wgmma_fence() { machine::together("wgmma.fence", machine::warpgroup_fence, nullptr, nullptr); }
DEVICE void wgmma_commit() { machine::together("wgmma.commit_group", machine::warpgroup_commit, nullptr, nullptr); }
template <int kPending>
DEVICE void wgmma_wait() {
    const int pending = kPending;
    machine::together("wgmma.wait_group", machine::warpgroup_wait, &pending, nullptr);
}
template <int kTiles>
DEVICE void wgmma_pin(float (&d)[kTiles][4]) {}
template <int kTiles>
DEVICE void wgmma_clear(float (&d)[kTiles][4]) {
    for (auto& tile : d) {
        for (float& x : tile) x = 0.f;
    }
}

// The machine keeps the address of d until a wait, and that of a.
template <bool kAccumulate, bool kBfloat, int kTiles>
DEVICE void wgmma_with(const char* name, float (&d)[kTiles][4], const u32* registers, u64 a, u64 b, bool down) {
    static_assert(kTiles % 2 == 0 && kTiles <= 32, "wgmma: 16 to 256 columns, in steps of 16");
    const machine::WarpgroupProduct product = {&d[0][0], kTiles, registers, a, b, down, kAccumulate, kBfloat};
    machine::together(name, machine::warpgroup_multiply, &product, nullptr);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_f16(float (&d)[kTiles][4], u64 a, u64 b) {
    wgmma_with<kAccumulate, false>("wgmma.f16", d, nullptr, a, b, false);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_bf16(float (&d)[kTiles][4], u64 a, u64 b) {
    wgmma_with<kAccumulate, true>("wgmma.bf16", d, nullptr, a, b, false);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_down_f16(float (&d)[kTiles][4], u64 a, u64 b) {
    wgmma_with<kAccumulate, false>("wgmma.down.f16", d, nullptr, a, b, true);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_down_bf16(float (&d)[kTiles][4], u64 a, u64 b) {
    wgmma_with<kAccumulate, true>("wgmma.down.bf16", d, nullptr, a, b, true);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_values_f16(float (&d)[kTiles][4], const u32 (&a)[4], u64 b) {
    wgmma_with<kAccumulate, false>("wgmma.values.f16", d, a, 0, b, true);
}
template <bool kAccumulate, int kTiles>
DEVICE void wgmma_values_bf16(float (&d)[kTiles][4], const u32 (&a)[4], u64 b) {
    wgmma_with<kAccumulate, true>("wgmma.values.bf16", d, a, 0, b, true);
}
