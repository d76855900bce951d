// Query rows that stand for all of their head, drawn where they may matter: what smxx_probe.cu computes. One thread block
// has one head, or two have: both sum, and each has half of the points.
//
// A row's chance is a quarter each of: uniform, and by one over the number of keys that do not stay exact and that it sees;
// and half by its residual, the energy of the row that Qhat misses, if there are such keys. A row that takes more than its
// share of 1 / ROWS is drawn for certain: points a constant apart are laid along the sum of all chances.
//
// Sums of chances follow from what these are made of, so that rows are passed over once: a warp has neighbouring rows, in
// chunks of whole steps, and sums one over the keys, and the residual, of each chunk. Then a warp has a point, and looks for
// its row: among the warps' rows, their chunks, their steps, the lanes, and their rows. At each of these it takes the
// first whose sum is beyond the point, or the last. So a point has one row however sums are rounded, and no later point has
// an earlier row, because all of them round alike; sums have an order, and so every run has the same rows.
//
// Constants: KEPT, 1 if some keys stay exact.
#include "ptx/math.cuh"
#include "tile/warp.cuh"

// A bound of the keys that rows see: row + a shift, cut at 0 and at the last key. Rows are cut instead, so that 32 bits do.
struct Bound {
    i32 least, most;  // the rows that have key 0 and the last bound; there may be no such rows

    DEVICE int of(int row) const { return min(max(row, least), most) - least; }
};

struct DrawParams {
    const float* residual;  // (batch, heads, seqlen_q), contiguous
    const i32* ranks;       // (batch, heads): of Qhat and Khat; head_dim: nothing to compare
    i32* rows;              // (batch, heads, ROWS): drawn, in order
    float* factors;         // the same shape: one over the chance of each
    i32* counts;            // (batch, heads): set to zero for smxx_decide.cu
    Bound first, end;            // the keys that a row sees, up to but not including the end
    Bound near_first, near_end;  // those that stay exact, of the first row of a block, before whole blocks of keys are taken,
    i32 exact_rows, exact_keys;  // of such blocks,
    i32 sinks;                   // and the first of all
    i32 seqlen_q, head_dim;
    i32 heads, shares;  // of all batch entries, and thread blocks of each: 1 or 2
};

namespace {

constexpr int kRows = 64;  // PROBE_ROWS in plan.py
constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kEach = 4;  // rows that a lane has of a step
constexpr int kStepRows = kEach * kWarpSize;
constexpr int kChunks = 8;  // of a warp, at most: whole steps
constexpr int kHalf = kWarpSize / 2;
constexpr float kLeast = 1.17549435e-38f;  // one over a smaller number may be none
constexpr float kLargest = 3.40282347e38f;

// Keys that a row sees and that do not stay exact.
DEVICE int count(const DrawParams& params, int row) {
    const int end = params.end.of(row);
    if (!KEPT) return end - params.first.of(row);
    const int first = max(params.first.of(row), params.sinks);
    const int block = row / params.exact_rows * params.exact_rows;
    const int near_first = params.near_first.of(block) / params.exact_keys * params.exact_keys;
    const int near_end = (params.near_end.of(block) + params.exact_keys - 1) / params.exact_keys * params.exact_keys;
    const int kept = min(end, near_end) - max(first, near_first);
    return max(0, end - first) - max(0, kept);
}

// What the chance of a row is made of: one over those keys, and the residual; zero if there are no such keys.
struct Weights {
    float keys, missed;
};
DEVICE Weights weights(const DrawParams& params, int row, float residual) {
    const int seen = count(params, row);
    const bool any = row < params.seqlen_q && seen > 0;
    return {any ? reciprocal_approx(static_cast<float>(seen)) : 0.f,
            any && residual > 0.f && residual < infinity() ? residual : 0.f};
}

// The chance of some rows, from the sums over them.
struct Chance {
    float uniform, by_keys, by_missed;

    DEVICE float of(int rows, float keys, float missed) const {
        return uniform * static_cast<float>(rows) + by_keys * keys + by_missed * missed;
    }
};

DEVICE float read(const float* residual, int row, int limit) { return row < limit ? residual[row] : 0.f; }

// The first lane of which the sum up to it and with it is beyond a place, or the last one.
DEVICE int first_beyond(float place, float sum, int last) {
    const u32 beyond = __ballot_sync(kFullWarp, place < sum);
    return beyond ? min(last, __ffs(beyond) - 1) : last;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_draw(const DrawParams params) {
    __shared__ float of_chunks[2][kWarps * kChunks], of_warps[2][kWarps];  // one over the keys, and residual
    const int warp = thread_index() / kWarpSize;
    const int lane = thread_index() % kWarpSize;
    const int share = block_index() >= params.heads;
    const i64 head = block_index() - share * params.heads;
    if (params.ranks[head] == params.head_dim) return;
    if (share == 0 && thread_index() == 0) params.counts[head] = 0;
    const float* residual = params.residual + head * params.seqlen_q;
    const int steps = (params.seqlen_q - 1) / kStepRows + 1;
    const int warp_steps = (steps - 1) / kWarps + 1;
    const int chunk_steps = (warp_steps - 1) / kChunks + 1;

    int step = min(steps, warp * warp_steps);
    const int last_step = min(steps, step + warp_steps);
    const int limit = min(params.seqlen_q, last_step * kStepRows);
    float next[kEach];  // of the next step, on its way while one is summed
#pragma unroll
    for (int i = 0; i < kEach; ++i) next[i] = read(residual, step * kStepRows + i * kWarpSize + lane, limit);
    float of_warp = 0.f;
    for (int chunk = warp * kChunks; step < last_step; ++chunk) {
        const int end = min(last_step, step + chunk_steps);
        float keys = 0.f;
        float missed = 0.f;
        for (; step < end; ++step) {
            const int row = step * kStepRows + lane;
            float x[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                x[i] = next[i];
                next[i] = read(residual, row + kStepRows + i * kWarpSize, limit);
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const Weights own = weights(params, row + i * kWarpSize, x[i]);
                keys += own.keys;
                missed += own.missed;
            }
        }
        // Half of the lanes sum the one, half the other.
        const bool lower = lane < kHalf;
        float sum = (lower ? keys : missed) + __shfl_xor_sync(kFullWarp, lower ? missed : keys, kHalf);
#pragma unroll
        for (int distance = kHalf / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
        of_warp += sum;
        if (lane % kHalf == 0) of_chunks[lane / kHalf][chunk] = fminf(sum, kLargest);
    }
    if (lane % kHalf == 0) of_warps[lane / kHalf][warp] = fminf(of_warp, kLargest);
    __syncthreads();  // the sums of all warps are there

    const float all_keys = warp_sum(of_warps[0][lane]);
    const float all_missed = warp_sum(of_warps[1][lane]);
    const bool any = all_missed >= kLeast && all_missed < infinity();
    const Chance chance = {0.25f * reciprocal_approx(static_cast<float>(params.seqlen_q)),
                           all_keys > 0.f ? 0.25f * reciprocal_approx(all_keys) : 0.f, any ? 0.5f / all_missed : 0.f};
    const int before = min(steps, lane * warp_steps) * kStepRows;
    const int own_rows = max(0, min(warp_steps * kStepRows, params.seqlen_q - before));
    const float until = sum_up_to(chance.of(own_rows, of_warps[0][lane], of_warps[1][lane]), lane);
    const float total = from_lane(until, kWarpSize - 1);
    for (int point = share * kWarps + warp; point < kRows; point += params.shares * kWarps) {
        float place = (static_cast<float>(point) + 0.5f) / kRows * total;
        const int group = first_beyond(place, until, kWarps - 1);
        if (group > 0) place -= from_lane(until, group - 1);
        int chunk = group * kChunks;
        int at = group * warp_steps;
        for (const int last = min(steps, at + warp_steps) - chunk_steps; at < last; at += chunk_steps, ++chunk) {
            const float of_chunk = chance.of(chunk_steps * kStepRows, of_chunks[0][chunk], of_chunks[1][chunk]);
            if (place < of_chunk) break;
            place -= of_chunk;
        }
        float chances[kEach], sum;
        for (const int last = min(steps, at + chunk_steps) - 1;; ++at) {
            const int row = at * kStepRows + lane * kEach;
            float own = 0.f;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const Weights of = weights(params, row + i, read(residual, row + i, params.seqlen_q));
                chances[i] = chance.of(1, of.keys, of.missed);
                own += row + i < params.seqlen_q ? chances[i] : 0.f;
            }
            sum = sum_up_to(own, lane);
            const float of_step = from_lane(sum, kWarpSize - 1);
            if (at >= last || place < of_step) break;
            place -= of_step;
        }
        const int first = at * kStepRows;
        const int chosen = first_beyond(place, sum, min(kWarpSize, (params.seqlen_q - 1 - first) / kEach + 1) - 1);
        if (chosen > 0) place -= from_lane(sum, chosen - 1);
        const int row = first + lane * kEach;
        int own = 0;
        float drawn = chances[0];
#pragma unroll
        for (int i = 1; i < kEach; ++i) {
            if (own < i - 1 || place < drawn || row + i >= params.seqlen_q) continue;
            place -= drawn;
            drawn = chances[i];
            own = i;
        }
        if (lane == chosen) {
            params.rows[head * kRows + point] = row + own;
            params.factors[head * kRows + point] = total * reciprocal_approx(drawn);
        }
    }
}
