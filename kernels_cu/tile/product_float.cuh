// Tile products of float32 on the tensor cores, which multiply TF32: scores = Q K^T, and output += P V.
#pragma once
#include "tile/multiply.cuh"

// scores += Q K^T for one key tile, over the first steps of the sum; queries is the warp's left_address. kTransposed: keys
// is Khat, (sum, keys), whose elements lanes read themselves, since no ldmatrix transposes 32-bit elements; otherwise K,
// (keys, sum).
// kSplit: 0, or by three products, the first of which adds up so many steps at once, of which steps is a multiple.
template <int kSplit, int kSteps, bool kTransposed, int kQueryPitch, int kRowTiles, int kKeyTiles, class Tile>
DEVICE void multiply_float_queries_keys(float (&scores)[kRowTiles][kKeyTiles][4], u32 queries, const Tile& keys, int lane,
                                        int steps) {
    typedef Multiply<float, (kSplit > 0)> Mma;
    constexpr int kBytes = int(sizeof(float));
    constexpr int kDepth = Traits<float>::kMmaDepth;
    constexpr int kAtOnce = kSplit > 1 ? kSplit : 1;
    // Sums of many products round more than operands in an instruction less; those of groups are few.
    constexpr bool kNearest = kTransposed || kSteps <= 2;
    static_assert(kSteps % kAtOnce == 0, "all steps are taken");
    const u32 address = right_address<float>(keys, lane);
    const float* element = &keys.at(kTransposed ? lane % 4 : 0, kTransposed ? lane / 4 : 0);
    typename Mma::Sum sums[kRowTiles][kKeyTiles];
    // Unrolled whole, ptxas reads so many operands ahead that it spills.
#pragma unroll(4 / kAtOnce)
    for (int start = 0; start < kSteps; start += kAtOnce) {
        if (start >= steps) break;
        typename Mma::A a[kAtOnce][kRowTiles];
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                u32 raw[4];
                ldmatrix_x4(raw, queries + (mt * 16 * kQueryPitch + (start + i) * kDepth) * kBytes);
                a[i][mt] = Mma::template left<kNearest>(raw);
            }
        }
#pragma unroll
        for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
            u32 raw[kAtOnce][4];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int step = start + i;
                if constexpr (kTransposed) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int offset = (step * kDepth + j % 2 * 4) * Tile::kPitch + pair * 16 + j / 2 * 8;
                        raw[i][j] = __float_as_uint(element[offset]);
                    }
                } else {
                    ldmatrix_x4(raw[i], address + (pair * 16 * Tile::kPitch + step * kDepth) * kBytes);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int nt = pair * 2 + half;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    const typename Mma::B b = Mma::template right<kNearest>(raw[i][half * 2], raw[i][half * 2 + 1]);
#pragma unroll
                    for (int mt = 0; mt < kRowTiles; ++mt) Mma::run(scores[mt][nt], sums[mt][nt], a[i][mt], b);
                }
#pragma unroll
                for (int mt = 0; mt < kRowTiles; ++mt) Mma::add_high(scores[mt][nt], sums[mt][nt]);
            }
        }
    }
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) Mma::add_low(scores[mt][nt], sums[mt][nt]);
    }
}

// output += P V for one key tile. The accumulators of P are the left operand as they stand, if the keys of a step are
// renumbered (0 2 4 6 1 3 5 7), in P and in V alike, which a sum does not notice and which saves the shuffles.
// All steps of a tile are summed before they are added to the output: short sums of short sums round less.
template <bool kSplit, int kRowTiles, int kKeyTiles, int kOutTiles, class Tile>
DEVICE void multiply_float_weights_values(float (&output)[kRowTiles][kOutTiles][4],
                                          const float (&weights)[kRowTiles][kKeyTiles][4], const Tile& values, int lane) {
    typedef Multiply<float, kSplit> Mma;
    constexpr int kAtOnce = 4;  // steps that the tensor cores add up
    const float* element = &values.at(lane % 4 * 2, lane / 4);
    typename Mma::A a[kKeyTiles][kRowTiles];
#pragma unroll
    for (int step = 0; step < kKeyTiles; ++step) {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
            const float(&p)[4] = weights[mt][step];
            const u32 raw[4] = {__float_as_uint(p[0]), __float_as_uint(p[2]), __float_as_uint(p[1]),
                                __float_as_uint(p[3])};
            a[step][mt] = Mma::template left<false>(raw);  // exponentials round as much
        }
    }
#pragma unroll
    for (int nt = 0; nt < kOutTiles; ++nt) {
        float tile[kRowTiles][4] = {};
        typename Mma::Sum sums[kRowTiles];
#pragma unroll
        for (int step = 0; step < kKeyTiles; ++step) {
            const float* value = element + step * 8 * Tile::kPitch + nt * 8;
            const typename Mma::B b = Mma::right(__float_as_uint(value[0]), __float_as_uint(value[Tile::kPitch]));
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
                Mma::run(tile[mt], sums[mt], a[step][mt], b);
                if (step % kAtOnce == kAtOnce - 1 || step == kKeyTiles - 1) Mma::add_high(tile[mt], sums[mt]);
            }
        }
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
            Mma::add_low(tile[mt], sums[mt]);
#pragma unroll
            for (int i = 0; i < 4; ++i) output[mt][nt][i] += tile[mt][i];
        }
    }
}
