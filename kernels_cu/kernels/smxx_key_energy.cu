// Sums over keys of the deviations of each column of K from the first key, and of their squares: what
// smxx_energy_order.cu makes the energies of K's columns from. A thread sums kSpanKeys keys of two columns one after
// another; the NumPy twin is reference.key_energies, and both give the same bits.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM.
#include "tile/dtype.cuh"
#include "tile/shared.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct KeyEnergyParams {
    const T* k;
    float* sums;  // (batch, heads_kv, spans, 2, HEAD_DIM), contiguous: of deviations, and of their squares
    i64 k_batch, k_head, k_row;
    i64 units;  // batch * heads_kv * spans
    i32 heads_kv, seqlen_k, spans;
};

namespace {

constexpr int kThreads = 128;
constexpr int kSpanKeys = 256;
constexpr int kPairs = HEAD_DIM / 2;  // threads of a span
constexpr int kUnits = kThreads / kPairs;
constexpr int kLoads = 64 / int(sizeof(Two<T>));  // keys on their way while as many before are summed

// Of two columns.
struct Sums {
    float origin[2];
    float sums[2] = {};
    float squares[2] = {};

    DEVICE void add(const Two<T>& key) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float deviation = __fadd_rn(Traits<T>::to_float(key.element[i]), -origin[i]);
            sums[i] = __fadd_rn(sums[i], deviation);
            squares[i] = __fadd_rn(squares[i], __fmul_rn(deviation, deviation));
        }
    }
};

DEVICE void load_keys(Two<T> (&to)[kLoads], const T* k, i64 k_row) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) to[n] = *reinterpret_cast<const Two<T>*>(k + n * k_row);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) smxx_key_energy(const KeyEnergyParams params) {
    const int unit = threadIdx.x / kPairs;
    const i64 span = static_cast<i64>(blockIdx.x) * kUnits + unit;
    if (unit >= kUnits || span >= params.units) return;
    const int column = threadIdx.x % kPairs * 2;
    const i64 batch_head = span / params.spans;
    const int first_key = static_cast<int>(span % params.spans) * kSpanKeys;
    const int keys = min(kSpanKeys, params.seqlen_k - first_key);
    const T* k = params.k + batch_head / params.heads_kv * params.k_batch +
                 batch_head % params.heads_kv * params.k_head + column;
    Sums found;
    for (int i = 0; i < 2; ++i) found.origin[i] = Traits<T>::to_float(k[i]);
    k += first_key * params.k_row;
    int key = 0;
    // Where the two columns of every key can be read at once.
    if ((reinterpret_cast<u64>(k) | static_cast<u64>(params.k_row) * sizeof(T)) % sizeof(Two<T>) == 0 && keys >= kLoads) {
        Two<T> next[kLoads];
        load_keys(next, k, params.k_row);
        for (; key <= keys - 2 * kLoads; key += kLoads) {
            Two<T> now[kLoads];
#pragma unroll
            for (int n = 0; n < kLoads; ++n) now[n] = next[n];
            k += kLoads * params.k_row;
            load_keys(next, k, params.k_row);
#pragma unroll
            for (int n = 0; n < kLoads; ++n) found.add(now[n]);
        }
#pragma unroll
        for (int n = 0; n < kLoads; ++n) found.add(next[n]);
        k += kLoads * params.k_row;
        key += kLoads;
    }
#pragma unroll 16
    for (; key < keys; ++key) {
        found.add({{k[0], k[1]}});
        k += params.k_row;
    }
    float* out = params.sums + span * (2 * HEAD_DIM) + column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        out[i] = found.sums[i];
        out[HEAD_DIM + i] = found.squares[i];
    }
}
