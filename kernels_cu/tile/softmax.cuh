// Online softmax (FlashAttention-2, arXiv 2307.08691, section 3.1): running maximum, running sum, rescaled output.
#pragma once
#include "ptx/math.cuh"

// What a row's scores are measured from, its maximum here, may lag behind their maximum: after the first tiles the output
// is hardly ever rescaled. Without the lag some row of a warp moves in most steps.
static constexpr float kLag = 8.f;  // powers of two

// The maximum of a row that saw no score yet, to be subtracted as any other: scores of minus infinity become weights of 0.
static constexpr float kNone = -3.4028235e38f;

static constexpr float kMost = 1.2676506e30f;  // 2**100: weights beyond are given up, for a factor must not be subnormal

// The scores of one tile become weights 2**(score_scale * (score - maximum)); output is rescaled when a maximum moves. The
// sum is kept per lane: its four lanes of a row are added once, at the end.
//
// Once a row has a maximum, nothing need look for the next one: weights are computed from it, and where their sum turns
// out large, the maximum goes up afterwards. What is lost so is only a weight of 2**100 and more, from a score that far
// above those before: sums tell, and a kernel then does the tile of queries again, with the maximum of every tile for the
// rows that lost something, and the same bits for the others. Finding maxima takes a fifth of the instructions that a
// score costs.
//
// In parts, so that products can run between them. All rows of a lane go side by side, and sums and maxima are made of
// several: few warps share a scheduler, so what counts is how many instructions do not depend on each other. Factors for
// the output gather in rescale, which is 1 at first.
//
// kFillGaps: see exponentiate; kernels that are short of registers go without.
template <int kRowTiles, bool kFillGaps = true>
struct OnlineSoftmax {
    static constexpr int kParts = kRowTiles == 1 ? 2 : 1;
    static constexpr int kAtOnce = 2;  // tiles of eight keys of which differences are computed together

    float maximum[kRowTiles][2];  // times score_scale: powers of two
    float sum[kRowTiles][2];  // of this lane's columns

    DEVICE void clear() {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                maximum[mt][half] = kNone;
                sum[mt][half] = 0.f;
            }
        }
    }

    static DEVICE void begin(float (&rescale)[kRowTiles][2]) {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) rescale[mt][0] = rescale[mt][1] = 1.f;
    }

    // A set of this lane's rows.
    static constexpr u32 kAllRows = (1 << 2 * kRowTiles) - 1;
    static DEVICE bool has(u32 rows, int mt, int half) { return rows >> (2 * mt + half) & 1; }

    // Whether a row's maximum moves for a score, which is given as maxima are kept.
    DEVICE bool moves(float top, int mt, int half) const { return top - maximum[mt][half] > kLag; }

    // Takes the scores into the maxima, of some rows.
    template <int kKeyTiles>
    DEVICE void raise(const float (&scores)[kRowTiles][kKeyTiles][4], u32 rows, float score_scale,
                      float (&rescale)[kRowTiles][2]) {
        float top[kRowTiles][2];
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
            float part[2][kParts];
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& of = part[half][nt % kParts];
                    of = nt < kParts ? scores[mt][nt][half * 2] : fmaxf(of, scores[mt][nt][half * 2]);
                    of = fmaxf(of, scores[mt][nt][half * 2 + 1]);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) top[mt][half] = fmaxf(part[half][0], part[half][kParts - 1]);
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
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float before = maximum[mt][half];
                const float after = __fmul_rn(top[mt][half], score_scale);  // as it is kept
                const bool stays = !moves(after, mt, half) || !has(rows, mt, half);
                if (!stays) maximum[mt][half] = after;
                rescale[mt][half] *= stays ? 1.f : exp2_approx(before - after);
            }
        }
    }

    // Whether raise would move a maximum of the warp. In most tiles none moves: a vote instead of what lanes share. It has a
    // loop of its own, row after row, where raise takes both of a lane side by side: with one loop for the two ptxas makes
    // other kernels than those that were measured.
    template <int kKeyTiles>
    DEVICE bool any_moves(const float (&scores)[kRowTiles][kKeyTiles][4], float score_scale) const {
        bool any = false;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float part[kParts];
#pragma unroll
                for (int nt = 0; nt < kKeyTiles; ++nt) {
                    float& of = part[nt % kParts];
                    of = nt < kParts ? scores[mt][nt][half * 2] : fmaxf(of, scores[mt][nt][half * 2]);
                    of = fmaxf(of, scores[mt][nt][half * 2 + 1]);
                }
                any |= moves(__fmul_rn(fmaxf(part[0], part[kParts - 1]), score_scale), mt, half);
            }
        }
        return __any_sync(kFullWarp, any);
    }

    // What is known of a tile of queries, beside a set of rows of which every maximum is found.
    static constexpr u32 kUnsettled = 1u << 30;  // some row of the warp has no maximum
    static constexpr u32 kAgain = 1u << 31;      // it is done for a second time

    // The same if need be. cut: some of the tile's keys are not seen. Returns whether it looked at the scores.
    template <int kKeyTiles>
    DEVICE bool raise_if_needed(const float (&scores)[kRowTiles][kKeyTiles][4], bool cut, u32& known, float score_scale,
                                float (&rescale)[kRowTiles][2]) {
        if (!need_look(cut, known)) return false;
        raise_known(scores, cut, known, score_scale, rescale);
        return true;
    }
    static DEVICE bool need_look(bool cut, u32 known) { return cut | (known != 0); }  // one branch
    template <int kKeyTiles>
    DEVICE void raise_known(const float (&scores)[kRowTiles][kKeyTiles][4], bool cut, u32& known, float score_scale,
                            float (&rescale)[kRowTiles][2]) {
        raise(scores, cut || known & kUnsettled ? kAllRows : known, score_scale, rescale);
        float least = infinity();
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) least = fminf(least, fminf(maximum[mt][0], maximum[mt][1]));
        known = __any_sync(kFullWarp, least == kNone) ? known | kUnsettled : known & ~kUnsettled;
    }

    // Scores to weights two at a time, and their sums in the end, for products that run in between.
    template <int kKeyTiles>
    struct Beside {
        static constexpr bool kMakes = true;

        OnlineSoftmax& softmax;
        float (&scores)[kRowTiles][kKeyTiles][4];
        const float score_scale;
        float total[kRowTiles][2][kParts];

        DEVICE Beside(OnlineSoftmax& softmax, float (&scores)[kRowTiles][kKeyTiles][4], float score_scale)
            : softmax(softmax), scores(scores), score_scale(score_scale), total{} {}

        DEVICE void run(int mt, int nt, int half) {
            float& low = scores[mt][nt][half * 2];
            float& high = scores[mt][nt][half * 2 + 1];
            low = exp2_approx(fmaf(low, score_scale, -softmax.maximum[mt][half]));
            high = exp2_approx(fmaf(high, score_scale, -softmax.maximum[mt][half]));
            total[mt][half][nt % kParts] += low + high;
        }
        DEVICE void end(const float (&rescale)[kRowTiles][2]) {
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float(&parts)[kParts] = total[mt][half];
                    const float of_tile = kParts == 2 ? parts[0] + parts[kParts - 1] : parts[0];
                    softmax.sum[mt][half] = fmaf(softmax.sum[mt][half], rescale[mt][half], of_tile);
                }
            }
        }
    };

    // Scores to weights, in place, and their sums: short sums of short sums round less than one long sum.
    // ptxas would compute all differences before the first exponential, while the units for exponentials have nothing to do.
    // Adding 0 times a weight that came two parts before makes differences wait for their turn, in gaps between exponentials.
    // A weight for which 0 times it is not 0 is lost anyway.
    template <int kKeyTiles>
    DEVICE void exponentiate(float (&scores)[kRowTiles][kKeyTiles][4], float score_scale,
                             const float (&rescale)[kRowTiles][2], float (&of_tile)[kRowTiles][2]) {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
            float total[2][kParts] = {};
            float from[2];
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if (nt % kAtOnce == 0) {
                        const float top = maximum[mt][half];
                        from[half] = !kFillGaps || nt < 2 * kAtOnce
                                         ? top
                                         : fmaf(scores[mt][nt - 2 * kAtOnce][half * 2], 0.f, top);
                    }
                    float& low = scores[mt][nt][half * 2];
                    float& high = scores[mt][nt][half * 2 + 1];
                    low = exp2_approx(fmaf(low, score_scale, -from[half]));
                    high = exp2_approx(fmaf(high, score_scale, -from[half]));
                    total[half][nt % kParts] += low + high;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                of_tile[mt][half] = kParts == 2 ? total[half][0] + total[half][1] : total[half][0];
                sum[mt][half] = fmaf(sum[mt][half], rescale[mt][half], of_tile[mt][half]);
            }
        }
    }

    // Where sums are large, the maximum goes up by the largest of a row. Returns whether any were. sums: of all weights, of
    // types that have the range of float32; float16 wants those of a tile, of which none may be.
    template <int kLarge>
    DEVICE bool follow(const float (&sums)[kRowTiles][2], float (&rescale)[kRowTiles][2]) {
        float most = 0.f;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) most = fmaxf(most, fmaxf(sums[mt][0], sums[mt][1]));
        if (!__any_sync(kFullWarp, most > kLarge)) return false;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = sums[mt][half];
                top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
                top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
                const int powers = top > kLarge ? (__float_as_int(top) >> 23) - 127 : 0;
                const float before = maximum[mt][half];
                maximum[mt][half] += static_cast<float>(powers);
                const float factor = exp2_approx(before - maximum[mt][half]);
                rescale[mt][half] *= powers == 0 ? 1.f : top > kMost ? infinity() : factor;
            }
        }
        return true;
    }

    DEVICE void rescale_sum(const float (&rescale)[kRowTiles][2]) {
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[mt][half] *= rescale[mt][half];
        }
    }

    // A vote costs less than multiplying everything by 1.
    template <int kTiles>
    static DEVICE void apply(const float (&rescale)[kRowTiles][2], float (&output)[kRowTiles][kTiles][4]) {
        bool moved = false;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) moved |= rescale[mt][0] != 1.f || rescale[mt][1] != 1.f;
        if (!__any_sync(kFullWarp, moved)) return;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[mt][nt][i] *= rescale[mt][i / 2];
            }
        }
    }

    // The rows of which a weight or an output was beyond all numbers, or is none.
    template <int kTiles>
    DEVICE u32 lost(const float (&output)[kRowTiles][kTiles][4]) const {
        u32 rows = 0;
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float zero = sum[mt][half] * 0.f;
#pragma unroll
                for (int nt = 0; nt < kTiles; ++nt) {
                    zero = fmaf(output[mt][nt][half * 2], 0.f, zero);
                    zero = fmaf(output[mt][nt][half * 2 + 1], 0.f, zero);
                }
                if (zero != 0.f) rows |= 1 << (2 * mt + half);
            }
        }
        rows |= __shfl_xor_sync(kFullWarp, rows, 1);
        return rows | __shfl_xor_sync(kFullWarp, rows, 2);
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
