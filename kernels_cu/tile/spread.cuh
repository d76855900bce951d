// What sums over keys (smxx_key_energy.cu) say of a column of K, and what a reduction leaves out of the weight of keys.
#pragma once
#include "ptx/arch.cuh"

struct KeyColumn {
    float energy;  // the norm of its deviations from their mean
    float mean;    // of its deviations from the first key
};

// Of kCount columns side by side. sums: of the first one in the first span of keys, its squares kColumns further. All
// spans are added in order, product and sum rounded apart: the same bits as NumPy's.
template <int kColumns, int kCount>
DEVICE void key_columns(KeyColumn (&columns)[kCount], const float* sums, int spans, int keys) {
    constexpr int kLoads = 16 / kCount;  // spans in flight; zeros behind the last change no bit of a sum
    struct alignas(4 * kCount) Sums {
        float column[kCount];
    };
    float sum[kCount] = {};
    float square[kCount] = {};
    for (int start = 0; start < spans; start += kLoads) {
        Sums own[kLoads] = {};
        Sums squares[kLoads] = {};
#pragma unroll
        for (int span = 0; span < kLoads; ++span) {
            if (start + span < spans) {
                own[span] = *reinterpret_cast<const Sums*>(sums + span * 2 * kColumns);
                squares[span] = *reinterpret_cast<const Sums*>(sums + span * 2 * kColumns + kColumns);
            }
        }
        sums += kLoads * 2 * kColumns;
#pragma unroll
        for (int span = 0; span < kLoads; ++span) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                sum[i] = __fadd_rn(sum[i], own[span].column[i]);
                square[i] = __fadd_rn(square[i], squares[span].column[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float mean = __fdiv_rn(sum[i], static_cast<float>(keys));
        const float rest = __fadd_rn(square[i], -__fmul_rn(sum[i], mean));
        columns[i] = {__fsqrt_rn(rest < 0.f ? 0.f : rest), mean};
    }
}

// What stands for a row of Q in the products with reduced keys has another weight than the row itself: of the mean of the
// keys the difference is known, the rest is taken for independent and normal. The twin is reference.restored.
struct Lacking {
    float mean = 0.f, variance = 0.f, copied_variance = 0.f;

    // One column: of Q, of what stands for it, and of K.
    DEVICE void add(float q, float copied, float energy, float key_mean) {
        add_products(q - copied, key_mean, q * energy, copied * energy);
    }
    // The same of products with the energy, and of the difference of the first two.
    DEVICE void add_products(float difference, float key_mean, float q, float copied) {
        mean = fmaf(difference, key_mean, mean);
        variance = fmaf(q, q, variance);
        copied_variance = fmaf(copied, copied, copied_variance);
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
