// Online softmax (FlashAttention-2, arXiv 2307.08691, section 3.1): running maximum, running sum, rescaled output.
#pragma once
#include "ptx/math.cuh"

// What a row's scores are measured from may lag behind their maximum by this many powers of two: weights are then at
// most 256, which no format minds, and after the first tiles the output is hardly ever rescaled. Without the lag some row
// of a warp moves in most steps.
static constexpr float kLag = 8.f;

// The scores of one tile become weights 2**(score_scale * (score - maximum)); output is rescaled when a maximum moves.
// The sum is kept per lane: its four lanes of a row are added once, at the end.
template <int kRowTiles>
struct OnlineSoftmax {
    float maximum[kRowTiles][2];
    float sum[kRowTiles][2];

    DEVICE void clear() {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                maximum[mt][half] = -infinity();
                sum[mt][half] = 0.f;
            }
        }
    }

    // All rows of a lane side by side, without a branch between them: few warps share a scheduler, so what counts is how
    // many instructions do not depend on each other.
    template <int kKeyTiles, int kOutTiles>
    DEVICE void update(float (&scores)[kRowTiles][kKeyTiles][4], float (&output)[kRowTiles][kOutTiles][4],
                       float score_scale) {
        float top[kRowTiles][2];
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[mt][half] = maximum[mt][half];
#pragma unroll
                for (int nt = 0; nt < kKeyTiles; ++nt) {
                    const float pair = fmaxf(scores[mt][nt][half * 2], scores[mt][nt][half * 2 + 1]);
                    top[mt][half] = fmaxf(top[mt][half], pair);
                }
            }
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    top[mt][half] = fmaxf(top[mt][half], __shfl_xor_sync(kFullWarp, top[mt][half], distance));
                }
            }
        }
        float shift[kRowTiles][2], rescale[kRowTiles][2];
        bool moved = false;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Rounded product against rounded product, not fused: a maximum that stays gives exactly 1.
                const float before = __fmul_rn(maximum[mt][half], score_scale);
                const float after = __fmul_rn(top[mt][half], score_scale);
                const bool stays = after - before <= kLag;
                // A row that saw no key yet has maximum -inf; subtracting it from itself would make NaN.
                shift[mt][half] = stays ? before : after == -infinity() ? 0.f : after;
                rescale[mt][half] = exp2_approx(before - shift[mt][half]);
                if (!stays) maximum[mt][half] = top[mt][half];
                moved |= rescale[mt][half] != 1.f;
            }
        }
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = 0.f;  // of this tile: short sums of short sums round less than one long sum
#pragma unroll
                for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[mt][nt][half * 2 + i];
                        score = exp2_approx(fmaf(score, score_scale, -shift[mt][half]));
                        total += score;
                    }
                }
                sum[mt][half] = fmaf(sum[mt][half], rescale[mt][half], total);
            }
        }
        if (__any_sync(kFullWarp, moved)) {
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
                for (int nt = 0; nt < kOutTiles; ++nt) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) output[mt][nt][i] *= rescale[mt][i / 2];
                }
            }
        }
    }

    DEVICE void reduce_sums() {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum[mt][half];
                total += __shfl_xor_sync(kFullWarp, total, 1);
                total += __shfl_xor_sync(kFullWarp, total, 2);
                sum[mt][half] = total;
            }
        }
    }
};

// softcap * tanh(score / softcap), for every score of a tile; with cap 0 only the scale is applied. tanh.approx has an
// error of 2**-11, far too much times a cap of 50.
template <int kRowTiles, int kKeyTiles>
DEVICE void scale_scores(float (&scores)[kRowTiles][kKeyTiles][4], float scale, float cap) {
    const float inner = cap > 0.f ? scale / cap : scale;
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float x = scores[mt][nt][i] * inner;
                scores[mt][nt][i] = cap > 0.f ? cap * tanhf(x) : x;
            }
        }
    }
}
