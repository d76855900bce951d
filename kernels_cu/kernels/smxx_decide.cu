// Which heads keep to a tolerance: the sampled rows of smxx_probe.cu, exact and reduced, compared. One thread block has
// one head. A head whose error may be larger is told to use all of its columns.
//
// The estimate is the ratio of the sums of squared errors and squared sizes, each row times one over its chance, as
// measure.estimate has it; the bound is that of its logarithm, by linearisation.
//
// Constants: HEAD_DIM, HEAD_DIM_V.
#include "ptx/math.cuh"

struct DecideParams {
    const float* factors;  // see ProbeParams
    const float* outputs;
    const float* sums;
    const i32* wanted;  // (batch, heads): ranks to decide on
    i32* ranks;         // (batch, heads): those, or HEAD_DIM
    float* errors;      // (batch, heads, 2): relative error of the output as estimated, and its upper bound
    i32 splits;    // parts of a row: of the exact one the first, of the reduced one the last,
    i32 parts;     // of so many
    float limit;   // square of the tolerance
    float spread;  // standard errors of the logarithm that are added for the bound
};

namespace {

constexpr int kRows = 64;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
    return x;
}

// Attention of one row over all splits.
struct Merged {
    const float* outputs;
    const float* sums;
    int splits;
    float top, inverse;

    DEVICE Merged(const float* outputs_, const float* sums_, int splits_) : outputs(outputs_), sums(sums_), splits(splits_) {
        top = -infinity();
        for (int s = 0; s < splits; ++s) top = fmaxf(top, sums[s * kRows * 2]);
        top = top == -infinity() ? 0.f : top;
        float total = 0.f;
        for (int s = 0; s < splits; ++s) total = fmaf(exp2_approx(sums[s * kRows * 2] - top), sums[s * kRows * 2 + 1], total);
        inverse = total == 0.f ? 0.f : 1.f / total;
    }
    DEVICE float at(int column) const {
        float x = 0.f;
        for (int s = 0; s < splits; ++s) {
            x = fmaf(exp2_approx(sums[s * kRows * 2] - top), outputs[s * kRows * HEAD_DIM_V + column], x);
        }
        return x * inverse;
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) smxx_decide(const DecideParams params) {
    __shared__ float shared[2][kRows];  // weighted squared error and size of each row
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const i64 head = block_index();
    const i32 rank = params.wanted[head];
    if (rank == HEAD_DIM) {
        if (threadIdx.x == 0) {
            params.ranks[head] = rank;
            params.errors[head * 2] = params.errors[head * 2 + 1] = 0.f;
        }
        return;
    }
    for (int row = warp; row < kRows; row += kWarps) {
        const i64 first = head * params.parts * kRows + row;
        const i64 second = first + (params.parts - params.splits) * kRows;
        const Merged exact(params.outputs + first * HEAD_DIM_V, params.sums + first * 2, params.splits);
        const Merged reduced(params.outputs + second * HEAD_DIM_V, params.sums + second * 2, params.splits);
        float error = 0.f;
        float size = 0.f;
        for (int column = lane; column < HEAD_DIM_V; column += kWarpSize) {
            const float x = exact.at(column);
            const float off = reduced.at(column) - x;
            error = fmaf(off, off, error);
            size = fmaf(x, x, size);
        }
        error = warp_sum(error);
        size = warp_sum(size);
        if (lane == 0) {
            const float factor = params.factors[head * kRows + row];
            shared[0][row] = error * factor;
            shared[1][row] = size * factor;
        }
    }
    __syncthreads();
    if (warp) return;
    float error[2], size[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        error[i] = shared[0][lane + i * kWarpSize];
        size[i] = shared[1][lane + i * kWarpSize];
    }
    const float errors = warp_sum(error[0] + error[1]);
    const float sizes = warp_sum(size[0] + size[1]);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float influence = error[i] / errors - size[i] / sizes;  // they sum to zero
        squares = fmaf(influence, influence, squares);
    }
    const float deviation = sqrtf(warp_sum(squares) * (float(kRows) / (kRows - 1)));
    const float ratio = errors / sizes;
    const bool same = errors == 0.f;  // whatever the sizes, and no number if they are zero
    const float bound = same ? 0.f : ratio * expf(params.spread * deviation);
    if (lane == 0) {
        params.ranks[head] = bound <= params.limit ? rank : HEAD_DIM;  // not a number is no
        params.errors[head * 2] = same ? 0.f : sqrtf(ratio);
        params.errors[head * 2 + 1] = sqrtf(bound);
    }
}
