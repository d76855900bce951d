// What sums over keys (smxx_key_energy.cu) say of a column of K.
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
    float sum = 0.f;
    float square = 0.f;
    for (int span = 0; span < spans; ++span) {
        sum = __fadd_rn(sum, sums[0]);
        square = __fadd_rn(square, sums[kColumns]);
        sums += 2 * kColumns;
    }
    const float mean = __fdiv_rn(sum, static_cast<float>(keys));
    square = __fadd_rn(square, -__fmul_rn(sum, mean));
    return {__fsqrt_rn(square < 0.f ? 0.f : square), mean};
}
