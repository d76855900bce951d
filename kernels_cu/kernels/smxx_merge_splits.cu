// What the splits of sm80_flash_fwd.cu found over their shares of the keys, merged by lse:
// out = sum_s exp(lse_s - lse) out_s. One warp per row, or, if rows are few, several that share its splits.
//
// Constants: DTYPE of out (0 float16, 1 bfloat16, 2 float32), HEAD_DIM_V.
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

namespace {

constexpr int kWarps = 8;
constexpr int kColumns = (HEAD_DIM_V + kWarpSize - 1) / kWarpSize;  // of a lane, kWarpSize apart

}  // namespace

// Rows are (batch, heads, seqlen_q). Strides are in elements.
struct MergeSplitsParams {
    const float* partial;  // (splits, rows, HEAD_DIM_V), contiguous
    const float* lses;     // (splits, rows), contiguous
    T* out;
    float* lse;            // (rows), contiguous; null if not wanted
    i64 out_batch, out_head, out_row;
    i64 rows;
    i32 heads, seqlen_q, splits;
    i32 row_warps;         // warps per row, a divisor of kWarps
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarpSize) smxx_merge_splits(const MergeSplitsParams params) {
    __shared__ float sums[kWarps][kColumns * kWarpSize];
    const int warp = thread_index() / kWarpSize;
    const int lane = thread_index() % kWarpSize;
    const int part = warp % params.row_warps;
    const i64 row = static_cast<i64>(block_index()) * (kWarps / params.row_warps) + warp / params.row_warps;
    const bool inside = row < params.rows;

    // Every warp of the row finds its lse; lanes share the splits.
    float top = -infinity();
    float total = 0.f;
    if (inside) {
        for (int s = lane; s < params.splits; s += kWarpSize) top = fmaxf(top, params.lses[s * params.rows + row]);
#pragma unroll
        for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, lanes));
    }
    const float shift = top == -infinity() ? 0.f : top;  // no key in any split: exp(-inf - 0) = 0
    if (inside) {
        for (int s = lane; s < params.splits; s += kWarpSize) total += expf(params.lses[s * params.rows + row] - shift);
#pragma unroll
        for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kFullWarp, total, lanes);
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;

    float sum[kColumns] = {};
    if (inside) {
        for (int s = part; s < params.splits; s += params.row_warps) {
            const i64 source = s * params.rows + row;
            const float weight = expf(params.lses[source] - shift) * inverse;
            const float* partial = params.partial + source * HEAD_DIM_V + lane;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const bool valid = HEAD_DIM_V % kWarpSize == 0 || lane + i * kWarpSize < HEAD_DIM_V;
                if (valid) sum[i] = fmaf(weight, partial[i * kWarpSize], sum[i]);
            }
        }
    }
    if (params.row_warps > 1) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sums[warp][i * kWarpSize + lane] = sum[i];
        __syncthreads();
        if (part != 0) return;
        for (int other = 1; other < params.row_warps; ++other) {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) sum[i] += sums[warp + other][i * kWarpSize + lane];
        }
    }
    if (!inside) return;

    const i64 batch_head = row / params.seqlen_q;
    const i64 query = row - batch_head * params.seqlen_q;
    T* out = params.out + batch_head / params.heads * params.out_batch + batch_head % params.heads * params.out_head +
             query * params.out_row;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const int column = lane + i * kWarpSize;
        if (column < HEAD_DIM_V) out[column] = Traits<T>::from_float(sum[i]);
    }
    if (params.lse && lane == 0) params.lse[row] = total == 0.f ? -infinity() : shift + logf(total);
}
