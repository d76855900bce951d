// The two products of attention for a warpgroup of 64 queries: scores = Q K^T, output += P V. Both are asynchronous:
// the caller waits, and for the second fences before and commits after.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile/dtype.cuh"
#include "tile/panels.cuh"

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

// Starts scores = Q K^T over the first 16 * kSteps columns, of as many keys of a tile as there are scores, as a group of its
// own. Queries of the warpgroup and keys as lower words of descriptors.
template <class T, class QueryTile, class KeyTile, int kSteps = KeyTile::kColumns / 16, int kKeyTiles>
DEVICE void start_scores(float (&scores)[kKeyTiles][4], u32 queries, u32 keys) {
    static_assert(KeyTile::kRows >= kKeyTiles * 8 && KeyTile::kColumns == QueryTile::kColumns, "start_scores: shapes");
    wgmma_fence();
    WarpgroupMultiply<T>::template run<false>(scores, QueryTile::along_columns(queries, 0), KeyTile::along_columns(keys, 0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        WarpgroupMultiply<T>::template run<true>(scores, QueryTile::along_columns(queries, step),
                                                 KeyTile::along_columns(keys, step));
    }
    wgmma_commit();
}

// The same with steps from kLeast to kMost, the same for all threads of the warpgroup. Every number has a chain of products
// of its own, fence included: products on either side of a branch would make ptxas put a fence into each. All chains are
// reached by as few branches as there can be, which consumers would wait for with nothing under way.
template <class T, class QueryTile, class KeyTile, int kMost = KeyTile::kColumns / 16, int kLeast = 1, int kKeyTiles>
DEVICE void start_some_scores(float (&scores)[kKeyTiles][4], u32 queries, u32 keys, int steps) {
    if constexpr (kLeast < kMost) {
        constexpr int kMiddle = (kLeast + kMost) / 2;
        if (steps > kMiddle) {
            start_some_scores<T, QueryTile, KeyTile, kMost, kMiddle + 1>(scores, queries, keys, steps);
        } else {
            start_some_scores<T, QueryTile, KeyTile, kMiddle, kLeast>(scores, queries, keys, steps);
        }
    } else {
        start_scores<T, QueryTile, KeyTile, kMost>(scores, queries, keys);
    }
}

// The same with keys that have the terms down the rows.
template <class T, class QueryTile, class KeyTile, int kKeyTiles>
DEVICE void start_scores_down(float (&scores)[kKeyTiles][4], u32 queries, u32 keys) {
    static_assert(KeyTile::kColumns >= kKeyTiles * 8 && KeyTile::kRows == QueryTile::kColumns, "start_scores_down: shapes");
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
    static_assert(KeyTile::kColumns >= kKeyTiles * 8 && KeyTile::kRows == kSteps * 16, "start_scores_of_values: shapes");
    wgmma_fence();
    WarpgroupMultiply<T>::template run_values<false>(scores, queries[0], KeyTile::along_rows(keys, 0));
#pragma unroll
    for (int step = 1; step < kSteps; ++step) {
        WarpgroupMultiply<T>::template run_values<true>(scores, queries[step], KeyTile::along_rows(keys, step));
    }
    wgmma_commit();
}

// output += P V, of as many keys of a tile as there are weights. Values as the lower word of a descriptor.
template <class T, class ValueTile, int kSteps, int kOutTiles>
DEVICE void start_output(float (&output)[kOutTiles][4], const u32 (&weights)[kSteps][4], u32 values) {
    static_assert(ValueTile::kRows >= kSteps * 16 && ValueTile::kColumns == kOutTiles * 8, "start_output: shapes");
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
