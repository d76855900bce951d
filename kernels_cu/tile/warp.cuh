// What the lanes of a warp find together: every lane gets the result.
#pragma once
#include "ptx/arch.cuh"

// The value of another lane.
DEVICE float from_lane(float x, int lane) { return __shfl_sync(kFullWarp, x, lane); }

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, distance));
    return x;
}

// The sum up to a lane and with it. It is rounded, so that it may be less than that of the lane before.
DEVICE float sum_up_to(float x, int lane) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const float before = from_lane(x, max(0, lane - distance));
        if (lane >= distance) x += before;
    }
    return x;
}
