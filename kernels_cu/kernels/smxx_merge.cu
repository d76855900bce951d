// Attention over shards of the keys, merged by lse: out = sum_s exp(lse_s - lse) out_s. Lanes share a row, and each
// finds its weights.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM_V.
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

namespace {

constexpr int kMaxShards = 32;  // MAX_SHARDS in normalize.py
constexpr int kWarps = 8;
constexpr int kMost = kChunkBytes / int(sizeof(T));
constexpr int kVector = HEAD_DIM_V % kMost == 0 ? kMost : 1;  // elements that a thread reads at once
constexpr int kVectors = HEAD_DIM_V / kVector;                // of a row
constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : kVectors > 2 ? 4 : 2;  // of a row
constexpr int kRows = kWarps * kWarpSize / kLanes;

struct alignas(kVector * sizeof(T)) Vector {
    T element[kVector];
};

}  // namespace

// All arrays are contiguous: outs (rows, HEAD_DIM_V), lses (rows).
struct MergeParams {
    const Vector* outs[kMaxShards];
    const float* lses[kMaxShards];
    Vector* out;
    float* lse;  // null if not wanted
    i64 rows;
    i64 shards;
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarpSize) smxx_merge(const MergeParams params) {
    const i64 row = static_cast<i64>(blockIdx.x) * kRows + threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    if (row >= params.rows) return;
    const int shards = static_cast<int>(params.shards);

    float top = -infinity();
    for (int s = 0; s < shards; ++s) top = fmaxf(top, params.lses[s][row]);
    const float shift = top == -infinity() ? 0.f : top;  // no key in any shard: exp(-inf - 0) = 0
    float total = 0.f;
    for (int s = 0; s < shards; ++s) total += expf(params.lses[s][row] - shift);
    const float inverse = total == 0.f ? 0.f : 1.f / total;

#pragma unroll
    for (int i = lane; i < kVectors; i += kLanes) {
        float sum[kVector] = {};
#pragma unroll 2
        for (int s = 0; s < shards; ++s) {
            const Vector part = params.outs[s][row * kVectors + i];
            const float weight = expf(params.lses[s][row] - shift) * inverse;
#pragma unroll
            for (int j = 0; j < kVector; ++j) sum[j] = fmaf(weight, Traits<T>::to_float(part.element[j]), sum[j]);
        }
        Vector merged;
#pragma unroll
        for (int j = 0; j < kVector; ++j) merged.element[j] = Traits<T>::from_float(sum[j]);
        params.out[row * kVectors + i] = merged;
    }
    if (params.lse && lane == 0) params.lse[row] = total == 0.f ? -infinity() : shift + logf(total);
}
