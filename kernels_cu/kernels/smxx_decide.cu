// Which heads keep to a tolerance: the sampled rows of smxx_probe.cu, exact and reduced, compared. A warp has one row, a
// thread block some of a head, and the last of a head to be done decides, from the rows in their order. A head whose error
// may be larger is told to use all of its columns.
//
// The estimate is the ratio of the sums of squared errors and squared sizes, each row times one over its chance, as
// measure.estimate has it; the bound is that of its logarithm, by linearisation. The data that the factors were found on
// adds what a sample may miss: the worst of its rows once more, and the error is not taken to be smaller than there.
//
// Constants: HEAD_DIM, HEAD_DIM_V.
#include "ptx/atomic.cuh"
#include "ptx/math.cuh"
#include "tile/warp.cuh"

struct DecideParams {
    const float* factors;  // see ProbeParams
    const float* outputs;
    const float* sums;
    const i32* wanted;  // (batch, heads): ranks to decide on
    const float* known;  // (batch, heads, 2): squared error there, and of the worst row, over the mean squared size
    i32* counts;        // (batch, heads): of thread blocks that are done, zero at first
    float* compared;    // (batch, heads, 2, 64): weighted squared error and size of each row
    i32* ranks;         // (batch, heads): those, or HEAD_DIM
    float* errors;      // (batch, heads, 2): relative error of the output as estimated, and its upper bound
    i32 splits;    // parts of a row, exact and reduced each; both together at most one for each lane of a warp
    float limit;   // square of the tolerance
    float spread;  // standard errors of the logarithm that are added for the bound
    float share;   // of a row: one over their number
};

namespace {

constexpr int kRows = 64;
constexpr int kWarps = 8;  // rows of a thread block: DECIDE_ROWS in plan.py
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kGroups = kRows / kWarps;  // thread blocks of a head
constexpr int kWide = HEAD_DIM_V % 128 == 0 ? 4 : HEAD_DIM_V % 64 == 0 ? 2 : 1;  // neighbours that a lane reads at once
constexpr int kAcross = kWide * kWarpSize;
constexpr int kReads = (HEAD_DIM_V + kAcross - 1) / kAcross;
constexpr int kAhead = kReads * kWide > 4 ? 40 / (kReads * kWide) : 16;  // parts that a lane reads before it uses them

struct alignas(4 * kWide) Columns {
    float x[kWide];
};

// One part of a row: the columns of the lane.
struct Part {
    Columns read[kReads];

    DEVICE void load(const float* outputs, int lane) {
#pragma unroll
        for (int i = 0; i < kReads; ++i) {
            const int column = i * kAcross + lane * kWide;
            const bool inside = HEAD_DIM_V % kAcross == 0 || column < HEAD_DIM_V;
            read[i] = inside ? *reinterpret_cast<const Columns*>(outputs + column) : Columns{};
        }
    }
    DEVICE void add(const Part& other, float weight) {
#pragma unroll
        for (int i = 0; i < kReads; ++i) {
#pragma unroll
            for (int j = 0; j < kWide; ++j) read[i].x[j] = fmaf(weight, other.read[i].x[j], read[i].x[j]);
        }
    }
};

// The first of several parts, at most kAhead.
DEVICE void load(Part (&part)[kAhead], const float* outputs, int parts, int lane) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
        if (i < parts) part[i].load(outputs + i * (kRows * HEAD_DIM_V), lane);
    }
}

// The weight of the lane's part in a row that is made of those that take part.
DEVICE float weight(bool takes_part, float maximum, float sum) {
    float top = warp_max(takes_part ? maximum : -infinity());
    top = top == -infinity() ? 0.f : top;
    const float own = takes_part ? exp2_approx(maximum - top) : 0.f;
    const float total = warp_sum(takes_part ? own * sum : 0.f);
    return total == 0.f ? 0.f : own / total;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2) smxx_decide(const DecideParams params) {
    const int lane = thread_index() % kWarpSize;
    const int warp = thread_index() / kWarpSize;
    const i64 head = block_index() / kGroups;
    const int row = block_index() % kGroups * kWarps + warp;
    const i32 rank = params.wanted[head];
    if (rank == HEAD_DIM) {
        if (row == 0 && lane == 0) {
            params.ranks[head] = rank;
            params.errors[head * 2] = params.errors[head * 2 + 1] = 0.f;
        }
        return;
    }
    const int parts = 2 * params.splits;  // of a row, the exact ones first
    const i64 first = head * parts * kRows + row;
    const bool inside = lane < parts;
    const float* sums = params.sums + (first + lane * kRows) * 2;
    const float maximum = inside ? sums[0] : 0.f;
    const float sum = inside ? sums[1] : 0.f;
    const float factor = params.factors[head * kRows + row];
    Part part[kAhead];
    load(part, params.outputs + first * HEAD_DIM_V, parts, lane);
    const float of_exact = weight(lane < params.splits, maximum, sum);
    const float of_reduced = weight(inside && lane >= params.splits, maximum, sum);
    const float of_part = lane < params.splits ? of_exact : of_reduced;
    Part exact = {};
    Part reduced = {};
    for (int start = 0;;) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int own = start + i;
            const float own_weight = from_lane(of_part, own % kWarpSize);
            if (own < params.splits) exact.add(part[i], own_weight);
            if (own >= params.splits && own < parts) reduced.add(part[i], own_weight);
        }
        start += kAhead;
        if (start >= parts) break;
        load(part, params.outputs + (first + start * kRows) * HEAD_DIM_V, parts - start, lane);
    }
    float error = 0.f;
    float size = 0.f;
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            const float x = exact.read[i].x[j];
            const float off = reduced.read[i].x[j] - x;
            error = fmaf(off, off, error);
            size = fmaf(x, x, size);
        }
    }
    error = warp_sum(error);
    size = warp_sum(size);
    float* compared = params.compared + head * (2 * kRows);
    if (lane == 0) {
        compared[row] = error * factor;
        compared[kRows + row] = size * factor;
    }
    __syncthreads();  // the rows of the thread block are compared
    if (warp) return;
    const float least = params.known[head * 2];
    const float worst = params.known[head * 2 + 1] * params.share;
    const i32 done = lane == 0 ? atomic_add_in_order(params.counts + head, 1) : 0;
    if (__shfl_sync(kFullWarp, done, 0) != kGroups - 1) return;
    __syncwarp();  // all lanes know what the first has found: that the rows of the head are compared
    float errors_of[2], sizes_of[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        errors_of[i] = compared[lane + i * kWarpSize];
        sizes_of[i] = compared[kRows + lane + i * kWarpSize];
    }
    const float errors = warp_sum(errors_of[0] + errors_of[1]);
    const float sizes = warp_sum(sizes_of[0] + sizes_of[1]);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float influence = errors_of[i] / errors - sizes_of[i] / sizes;  // they sum to zero
        squares = fmaf(influence, influence, squares);
    }
    const float deviation = sqrtf(warp_sum(squares) * (float(kRows) / (kRows - 1)));
    const float ratio = errors / sizes;
    const bool same = errors == 0.f;  // whatever the sizes, and no number if they are zero
    const float sampled = ratio * expf(params.spread * deviation) + worst;
    // Not a number stays, where fmaxf would leave it out.
    const float bound = same ? 0.f : sampled < least ? least : sampled;
    if (lane == 0) {
        params.ranks[head] = bound <= params.limit ? rank : HEAD_DIM;  // not a number is no
        params.errors[head * 2] = same ? 0.f : sqrtf(ratio);
        params.errors[head * 2 + 1] = sqrtf(bound);
    }
}
