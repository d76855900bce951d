// What sums over keys (smxx_key_energy.cu) say of a column of K, and what a reduction leaves out of the weight of keys.
#pragma once
#include "ptx/arch.cuh"

struct KeyColumn {
    float energy;  // the norm of its deviations from their mean
    float mean;    // of its deviations from the first key
};

// sums: of this column in the first span of keys, its squares kColumns further. All spans are added in order, product
// and sum rounded apart: the same bits as NumPy's.
template <int kColumns>
DEVICE KeyColumn key_column(const float* sums, int spans, int keys) {
    constexpr int kLoads = 16;  // spans in flight; zeros behind the last change no bit of a sum
    float sum = 0.f;
    float square = 0.f;
    for (int start = 0; start < spans; start += kLoads) {
        float found[kLoads][2] = {};
#pragma unroll
        for (int span = 0; span < kLoads; ++span) {
            if (start + span < spans) {
                found[span][0] = sums[span * 2 * kColumns];
                found[span][1] = sums[span * 2 * kColumns + kColumns];
            }
        }
        sums += kLoads * 2 * kColumns;
#pragma unroll
        for (int span = 0; span < kLoads; ++span) {
            sum = __fadd_rn(sum, found[span][0]);
            square = __fadd_rn(square, found[span][1]);
        }
    }
    const float mean = __fdiv_rn(sum, static_cast<float>(keys));
    square = __fadd_rn(square, -__fmul_rn(sum, mean));
    return {__fsqrt_rn(square < 0.f ? 0.f : square), mean};
}

// What stands for a row of Q in the products with reduced keys has another weight than the row itself: of the mean of the
// keys the difference is known, the rest is taken for independent and normal. The twin is reference.restored.
struct Lacking {
    float mean = 0.f, variance = 0.f, copied_variance = 0.f;

    // One column: of Q, of what stands for it, and of K.
    DEVICE void add(float q, float copied, float energy, float key_mean) {
        mean = fmaf(q - copied, key_mean, mean);
        variance = fmaf(q * energy, q * energy, variance);
        copied_variance = fmaf(copied * energy, copied * energy, copied_variance);
    }
    // Logarithm of the mean of exp(x) over exp(limit) normal numbers x of mean 0.
    static DEVICE float growth(float variance, float limit) {
        return variance < 2.f * limit ? 0.5f * variance : sqrtf(2.f * limit * variance) - limit;
    }
    // In the row's lse, when all columns have been added.
    DEVICE float shift(float scale, int seqlen_k) const {
        const float keys = static_cast<float>(seqlen_k);
        const float factor = scale * scale / keys;
        const float limit = logf(keys);
        const float result = scale * mean + growth(factor * variance, limit) - growth(factor * copied_variance, limit);
        return fabsf(result) < infinity() ? result : 0.f;
    }
};
