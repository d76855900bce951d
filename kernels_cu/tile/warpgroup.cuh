// The two products of attention for a warpgroup of 64 queries: scores = Q K^T, output += P V. Both are asynchronous:
// the caller waits, and for the second fences before and commits after.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile/dtype.cuh"
#include "tile/panels.cuh"
#include "tile/softmax.cuh"

template <class T>
struct WarpgroupMultiply;
template <>
struct WarpgroupMultiply<f16> {
    template <bool kAccumulate, int kTiles>
    static DEVICE void run(float (&d)[kTiles][4], u64 a, u64 b) {
        wgmma_f16<kAccumulate>(d, a, b);
    }
    template <bool kAccumulate, int kTiles>
    static DEVICE void run_down(float (&d)[kTiles][4], u64 a, u64 b) {
        wgmma_down_f16<kAccumulate>(d, a, b);
    }
    template <bool kAccumulate, int kTiles>
    static DEVICE void run_values(float (&d)[kTiles][4], const u32 (&a)[4], u64 b) {
        wgmma_values_f16<kAccumulate>(d, a, b);
    }
};
template <>
struct WarpgroupMultiply<bf16> {
    template <bool kAccumulate, int kTiles>
    static DEVICE void run(float (&d)[kTiles][4], u64 a, u64 b) {
        wgmma_bf16<kAccumulate>(d, a, b);
    }
    template <bool kAccumulate, int kTiles>
    static DEVICE void run_down(float (&d)[kTiles][4], u64 a, u64 b) {
        wgmma_down_bf16<kAccumulate>(d, a, b);
    }
    template <bool kAccumulate, int kTiles>
    static DEVICE void run_values(float (&d)[kTiles][4], const u32 (&a)[4], u64 b) {
        wgmma_values_bf16<kAccumulate>(d, a, b);
    }
};

// Starts scores = Q K^T over the first 16 * kSteps columns, as a group of its own. Queries of the warpgroup and keys as
// lower words of descriptors.
template <class T, class QueryTile, class KeyTile, int kSteps = KeyTile::kColumns / 16, int kKeyTiles>
DEVICE void start_scores(float (&scores)[kKeyTiles][4], u32 queries, u32 keys) {
    static_assert(KeyTile::kRows == kKeyTiles * 8 && KeyTile::kColumns == QueryTile::kColumns, "start_scores: shapes");
    wgmma_fence();
    WarpgroupMultiply<T>::template run<false>(scores, QueryTile::along_columns(queries, 0), KeyTile::along_columns(keys, 0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        WarpgroupMultiply<T>::template run<true>(scores, QueryTile::along_columns(queries, step),
                                                 KeyTile::along_columns(keys, step));
    }
    wgmma_commit();
}

// The same with steps from 1 to kMost, the same for all threads of the warpgroup. Every number has a chain of products of
// its own, fence included: products on either side of a branch would make ptxas put a fence into each.
template <class T, class QueryTile, class KeyTile, int kMost = KeyTile::kColumns / 16, int kKeyTiles>
DEVICE void start_some_scores(float (&scores)[kKeyTiles][4], u32 queries, u32 keys, int steps) {
    if constexpr (kMost > 1) {
        if (steps < kMost) return start_some_scores<T, QueryTile, KeyTile, kMost - 1>(scores, queries, keys, steps);
    }
    start_scores<T, QueryTile, KeyTile, kMost>(scores, queries, keys);
}

// The same with keys that have the terms down the rows.
template <class T, class QueryTile, class KeyTile, int kKeyTiles>
DEVICE void start_scores_down(float (&scores)[kKeyTiles][4], u32 queries, u32 keys) {
    static_assert(KeyTile::kColumns == kKeyTiles * 8 && KeyTile::kRows == QueryTile::kColumns, "start_scores_down: shapes");
    wgmma_fence();
    WarpgroupMultiply<T>::template run_down<false>(scores, QueryTile::along_columns(queries, 0), KeyTile::along_rows(keys, 0));
#pragma unroll
    for (int step = 1; step < KeyTile::kRows / 16; ++step) {
        WarpgroupMultiply<T>::template run_down<true>(scores, QueryTile::along_columns(queries, step),
                                                      KeyTile::along_rows(keys, step));
    }
    wgmma_commit();
}

// The same with queries in registers, as the left operand of 16 terms a step, and keys with the terms down the rows.
template <class T, class KeyTile, int kSteps, int kKeyTiles>
DEVICE void start_scores_of_values(float (&scores)[kKeyTiles][4], const u32 (&queries)[kSteps][4], u32 keys) {
    static_assert(KeyTile::kColumns == kKeyTiles * 8 && KeyTile::kRows == kSteps * 16, "start_scores_of_values: shapes");
    wgmma_fence();
    WarpgroupMultiply<T>::template run_values<false>(scores, queries[0], KeyTile::along_rows(keys, 0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        WarpgroupMultiply<T>::template run_values<true>(scores, queries[step], KeyTile::along_rows(keys, step));
    }
    wgmma_commit();
}

// output += P V. Values as the lower word of a descriptor.
template <class T, class ValueTile, int kSteps, int kOutTiles>
DEVICE void start_output(float (&output)[kOutTiles][4], const u32 (&weights)[kSteps][4], u32 values) {
    static_assert(ValueTile::kRows == kSteps * 16 && ValueTile::kColumns == kOutTiles * 8, "start_output: shapes");
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        WarpgroupMultiply<T>::template run_values<true>(output, weights[step], ValueTile::along_rows(values, step));
    }
}

// Weights as the left operand of the next product: the accumulator's layout is the operand's, so nothing moves between
// lanes.
template <class T, int kSteps, int kKeyTiles>
DEVICE void pack_weights(u32 (&weights)[kSteps][4], const float (&scores)[kKeyTiles][4]) {
    static_assert(kKeyTiles == 2 * kSteps, "pack_weights: 16 keys a step");
#pragma unroll
    for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            weights[nt / 2][nt % 2 * 2 + half] = Traits<T>::pack(scores[nt][half * 2], scores[nt][half * 2 + 1]);
        }
    }
}

// Online softmax of a warpgroup's scores, as tile/softmax.cuh has it for warps, in parts: between them the product that
// still reads the old weights can finish. A lane has two rows. A single warp of a scheduler is at work here while
// others have the tensor cores, so what counts is how many instructions do not depend on each other: both rows go side
// by side, and sums and maxima are made of several.
struct WarpgroupSoftmax {
    float maximum[2];
    float sum[2];  // of this lane's columns

    DEVICE void clear() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum[half] = -infinity();
            sum[half] = 0.f;
        }
    }

    // Takes the scores into the maxima. Returns what the scaled scores are to be shifted by, and the factor for sum and
    // output of the tiles before.
    template <int kKeyTiles>
    DEVICE void raise(const float (&scores)[kKeyTiles][4], float score_scale, float (&shift)[2], float (&rescale)[2]) {
        float top[2][2] = {{maximum[0], maximum[0]}, {maximum[1], maximum[1]}};
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& of_tile = top[half][nt % 2];
                of_tile = fmaxf(of_tile, fmaxf(scores[nt][half * 2], scores[nt][half * 2 + 1]));
            }
        }
        float whole[2] = {fmaxf(top[0][0], top[0][1]), fmaxf(top[1][0], top[1][1])};
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                whole[half] = fmaxf(whole[half], __shfl_xor_sync(kFullWarp, whole[half], distance));
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if ((whole[half] - maximum[half]) * score_scale <= kLag) whole[half] = maximum[half];
            // A row that saw no key yet has maximum -inf; subtracting it from itself would make NaN.
            shift[half] = __fmul_rn(whole[half] == -infinity() ? 0.f : whole[half], score_scale);
            // Rounded product against rounded product, not fused: a maximum that stays gives exactly 1.
            rescale[half] = exp2_approx(__fmul_rn(maximum[half], score_scale) - shift[half]);
            maximum[half] = whole[half];
        }
    }

    // Scores to weights, in place, and into the sums.
    template <int kKeyTiles>
    DEVICE void exponentiate(float (&scores)[kKeyTiles][4], float score_scale, const float (&shift)[2],
                             const float (&rescale)[2]) {
        float total[2][2] = {};
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& low = scores[nt][half * 2];
                float& high = scores[nt][half * 2 + 1];
                low = exp2_approx(fmaf(low, score_scale, -shift[half]));
                high = exp2_approx(fmaf(high, score_scale, -shift[half]));
                total[half][nt % 2] += low + high;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] = fmaf(sum[half], rescale[half], total[half][0] + total[half][1]);
    }

    // The factor of each row for the output. A vote costs less than multiplying everything by 1.
    template <int kOutTiles>
    static DEVICE void rescale_output(float (&output)[kOutTiles][4], const float (&rescale)[2]) {
        if (__any_sync(kFullWarp, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
            for (int nt = 0; nt < kOutTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[nt][i] *= rescale[i / 2];
            }
        }
    }

    DEVICE void reduce_sums() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 1);
            sum[half] += __shfl_xor_sync(kFullWarp, sum[half], 2);
        }
    }
};

// Four words of each lane of a quad, transposed: lane q gets word q of the four lanes, in their order.
DEVICE void transpose_quad(u32 (&word)[4], int lane) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const bool upper = lane & step;
            const u32 received = __shfl_xor_sync(kFullWarp, upper ? word[i] : word[i + step], step);
            if (upper) {
                word[i] = received;
            } else {
                word[i + step] = received;
            }
        }
    }
}
