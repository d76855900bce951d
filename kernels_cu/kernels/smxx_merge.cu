// Attention over shards of the keys, merged by lse: out = sum_s exp(lse_s - lse) out_s. One warp per row.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM_V.
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

namespace {
constexpr int kMaxShards = 32;  // MAX_SHARDS in normalize.py
constexpr int kWarps = 8;
}  // namespace

// All arrays are contiguous: outs (rows, HEAD_DIM_V), lses (rows).
struct MergeParams {
    const T* outs[kMaxShards];
    const float* lses[kMaxShards];
    T* out;
    float* lse;  // null if not wanted
    i64 rows;
    i64 shards;
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarpSize) smxx_merge(const MergeParams params) {
    const i64 row = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    if (row >= params.rows) return;
    const int shards = static_cast<int>(params.shards);

    float top = -infinity();
    for (int s = 0; s < shards; ++s) top = fmaxf(top, params.lses[s][row]);
    const float shift = top == -infinity() ? 0.f : top;  // no key in any shard: exp(-inf - 0) = 0
    float total = 0.f;
    for (int s = 0; s < shards; ++s) total += expf(params.lses[s][row] - shift);
    const float inverse = total == 0.f ? 0.f : 1.f / total;

    for (int column = lane; column < HEAD_DIM_V; column += kWarpSize) {
        float sum = 0.f;
        for (int s = 0; s < shards; ++s) {
            const float weight = expf(params.lses[s][row] - shift) * inverse;
            sum = fmaf(weight, Traits<T>::to_float(params.outs[s][row * HEAD_DIM_V + column]), sum);
        }
        params.out[row * HEAD_DIM_V + column] = Traits<T>::from_float(sum);
    }
    if (params.lse && lane == 0) params.lse[row] = total == 0.f ? -infinity() : shift + logf(total);
}
