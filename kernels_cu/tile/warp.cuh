// What the lanes of a warp find together: every lane gets the result.
#pragma once
#include "ptx/arch.cuh"

// The value of another lane.
DEVICE float from_lane(float x, int lane) { return __shfl_sync(kFullWarp, x, lane); }
DEVICE u64 from_lane(u64 x, int lane) {
    const u32 low = __shfl_sync(kFullWarp, static_cast<u32>(x), lane);
    const u32 high = __shfl_sync(kFullWarp, static_cast<u32>(x >> 32), lane);
    return static_cast<u64>(high) << 32 | low;
}

template <class Number>
DEVICE Number warp_sum(Number x) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += from_lane(x, thread_index() % kWarpSize ^ distance);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, distance));
    return x;
}

// The sum up to a lane and with it. Of whole numbers: what is rounded might fall from one lane to the next.
DEVICE u64 sum_up_to(u64 x, int lane) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const u64 before = from_lane(x, max(0, lane - distance));
        if (lane >= distance) x += before;
    }
    return x;
}
