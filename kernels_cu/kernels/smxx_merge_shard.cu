// Attention over one more shard of the keys, taken into what was found so far, by lse:
// out = exp(lse_found - lse) found + exp(lse_part - lse) part. A part may have some of the queries only.
//
// Constants: DTYPE of part, FOUND and OUT of found and out (0 float16, 1 bfloat16, 2 float32), HEAD_DIM_V.
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type Part;
typedef ElementOf<FOUND>::type Found;
typedef ElementOf<OUT>::type Out;

namespace {

constexpr int kWarps = 8;
constexpr int kVector = HEAD_DIM_V % 4 == 0 ? 4 : 1;  // elements that a thread reads at once
constexpr int kVectors = HEAD_DIM_V / kVector;        // of a row
constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : kVectors > 2 ? 4 : 2;  // of a row
constexpr int kRows = kWarps * kWarpSize / kLanes;

template <class T>
struct alignas(kVector * sizeof(T)) Vector {
    T element[kVector];
};

}  // namespace

// All arrays are contiguous: found and out (heads, seqlen, HEAD_DIM_V), part (heads, last - first, HEAD_DIM_V), and an
// lse for each row. out and lse may be what was found.
struct MergeShardParams {
    const Vector<Found>* found;
    const float* found_lse;
    const Vector<Part>* part;
    const float* part_lse;
    Vector<Out>* out;
    float* lse;
    i64 rows;         // that are written: heads * span
    i32 seqlen;
    i32 start, span;  // queries of a head that are written
    i32 first, last;  // those of part
};

extern "C" __global__ void __launch_bounds__(kWarps* kWarpSize) smxx_merge_shard(const MergeShardParams params) {
    const i64 index = static_cast<i64>(block_index()) * kRows + thread_index() / kLanes;
    const int lane = thread_index() % kLanes;
    const i64 head = index / params.span;
    const int query = params.start + static_cast<int>(index - head * params.span);
    const bool inside = index < params.rows;
    const bool covered = inside && query >= params.first && query < params.last;
    const i64 row = head * params.seqlen + query;
    const i64 part_row = head * (params.last - params.first) + query - params.first;

    const float found_lse = inside ? params.found_lse[row] : -infinity();
    const float part_lse = covered ? params.part_lse[part_row] : -infinity();
    const float top = fmaxf(found_lse, part_lse);
    const float shift = top == -infinity() ? 0.f : top;  // no key so far: exp(-inf - 0) = 0
    const float total = expf(found_lse - shift) + expf(part_lse - shift);
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    const float of_found = expf(found_lse - shift) * inverse;
    const float of_part = expf(part_lse - shift) * inverse;
    __syncwarp();  // every lane of a row has read its lse, which may be written now
    if (!inside) return;

#pragma unroll
    for (int i = lane; i < kVectors; i += kLanes) {
        const Vector<Found> found = params.found[row * kVectors + i];
        Vector<Part> part = {};
        if (covered) part = params.part[part_row * kVectors + i];
        Vector<Out> out;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float sum = of_found * Traits<Found>::to_float(found.element[j]);
            out.element[j] = Traits<Out>::from_float(fmaf(of_part, Traits<Part>::to_float(part.element[j]), sum));
        }
        params.out[row * kVectors + i] = out;
    }
    if (lane == 0) params.lse[row] = total == 0.f ? -infinity() : shift + logf(total);
}
