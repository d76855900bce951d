// Online softmax (FlashAttention-2, arXiv 2307.08691, section 3.1): running maximum, running sum, rescaled output.
#pragma once
#include "ptx/math.cuh"

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

    template <int kKeyTiles, int kOutTiles>
    DEVICE void update(float (&scores)[kRowTiles][kKeyTiles][4], float (&output)[kRowTiles][kOutTiles][4],
                       float score_scale) {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = maximum[mt][half];
#pragma unroll
                for (int nt = 0; nt < kKeyTiles; ++nt) {
                    top = fmaxf(top, fmaxf(scores[mt][nt][half * 2], scores[mt][nt][half * 2 + 1]));
                }
                top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
                top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
                // A row that saw no key yet has maximum -inf; subtracting it from itself would make NaN.
                const float shift = __fmul_rn(top == -infinity() ? 0.f : top, score_scale);
                // Rounded product against rounded product, not fused: a maximum that stays gives exactly 1.
                const float rescale = exp2_approx(__fmul_rn(maximum[mt][half], score_scale) - shift);
                maximum[mt][half] = top;
                float total = 0.f;  // of this tile: short sums of short sums round less than one long sum
#pragma unroll
                for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[mt][nt][half * 2 + i];
                        score = exp2_approx(fmaf(score, score_scale, -shift));
                        total += score;
                    }
                }
                sum[mt][half] = fmaf(sum[mt][half], rescale, total);
                // After the first tiles maxima rarely move: a vote costs less than kOutTiles * 2 multiplications by 1.
                if (__any_sync(kFullWarp, rescale != 1.f)) {
#pragma unroll
                    for (int nt = 0; nt < kOutTiles; ++nt) {
                        output[mt][nt][half * 2] *= rescale;
                        output[mt][nt][half * 2 + 1] *= rescale;
                    }
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
