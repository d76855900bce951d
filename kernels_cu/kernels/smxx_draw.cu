// Query rows that stand for all of their head, drawn where they may matter: what smxx_probe.cu computes. One thread block
// has one head; a warp has neighbouring rows, a lane every 32nd of them.
//
// A row's chance is a quarter each of: uniform, and by one over the number of keys that do not stay exact and that it sees;
// and half by its residual, the energy of the row that Qhat misses, if there are such keys. A row that takes more than its
// share of 1 / ROWS is drawn for certain: points a constant apart are laid along the sum of all chances. The sum is one of
// whole numbers, so that it is the same in any order, and every point has one row.
//
// Constants: KEPT, 1 if some keys stay exact.
#include "tile/mask.cuh"
#include "tile/warp.cuh"

// Queries see keys from query + band_low to query + band_high.
struct DrawParams {
    const float* residual;  // (batch, heads, seqlen_q), contiguous
    const i32* ranks;       // (batch, heads): of Qhat and Khat; head_dim: nothing to compare
    i32* rows;              // (batch, heads, ROWS): drawn, in order
    float* factors;         // the same shape: one over the chance of each
    i64 band_low, band_high;
    i64 near_low, near_high;  // the keys that stay exact, from query + near_low to query + near_high,
    i32 sinks;                // and the first of all
    i32 seqlen_q, seqlen_k, head_dim;
};

namespace {

constexpr int kRows = 64;  // PROBE_ROWS in plan.py
constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr float kUnits = 72057594037927936.f;  // 2**56 of them are a chance of 1

// What a row's chance is made of.
struct Chances {
    Band band, near;
    int sinks;
    const float* residual;
    float uniform, by_keys, by_residual;  // parts of a chance for: each row, one over its keys, all of the residual
    float missed;                         // the residual of all rows

    // Keys that the row sees and that do not stay exact.
    DEVICE int count(int row) const {
        const int first = max(band.first_key(row), sinks);
        const int last = band.last_key(row);
        if (!KEPT) return last - first + 1;
        const int kept = min(last, near.last_key(row)) - max(first, near.first_key(row)) + 1;
        return max(0, last - first + 1) - max(0, kept);
    }
    DEVICE float keys_of(int seen) const { return seen > 0 ? 1.f / static_cast<float>(seen) : 0.f; }
    DEVICE float missed_of(int row, int seen) const {
        const float x = residual[row];
        return x > 0.f && x < infinity() && seen > 0 ? x : 0.f;
    }
    DEVICE u64 of(int row) const {
        const int seen = count(row);
        const float chance = uniform + by_keys * keys_of(seen) + by_residual * (missed_of(row, seen) / missed);
        return static_cast<u64>(chance * kUnits);
    }
};

// The number of points before a place along the sum of chances: point j is at (j + 1/2) / kRows of it.
DEVICE int points_before(u64 place, float total) {
    const float points = static_cast<float>(place) / total * kRows - 0.5f;
    const int whole = static_cast<int>(points);
    return min(kRows, whole + (points > static_cast<float>(whole)));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_draw(const DrawParams params) {
    __shared__ float keys_sums[kWarps], missed_sums[kWarps];
    __shared__ u64 chance_sums[kWarps];
    const int warp = thread_index() / kWarpSize;
    const int lane = thread_index() % kWarpSize;
    const i64 head = block_index();
    if (params.ranks[head] == params.head_dim) return;
    const Band band = {params.band_low, params.band_high, params.seqlen_k};
    const Band near = {params.near_low, params.near_high, params.seqlen_k};
    Chances chances = {band, near, KEPT ? params.sinks : 0, params.residual + head * params.seqlen_q, 0.f, 0.f, 0.f, 0.f};
    const int each = ((params.seqlen_q - 1) / kThreads + 1) * kWarpSize;
    const int first = min(params.seqlen_q, warp * each);
    const int last = first + min(each, params.seqlen_q - first);

    float keys = 0.f;
    float missed = 0.f;
#pragma unroll 4
    for (int row = first + lane; row < last; row += kWarpSize) {
        const int seen = chances.count(row);
        keys += chances.keys_of(seen);
        missed += chances.missed_of(row, seen);
    }
    keys = warp_sum(keys);
    missed = warp_sum(missed);
    if (lane == 0) {
        keys_sums[warp] = keys;
        missed_sums[warp] = missed;
    }
    __syncthreads();  // the sums of all warps are there
    keys = warp_sum(keys_sums[lane]);
    missed = warp_sum(missed_sums[lane]);
    chances.uniform = 0.25f / static_cast<float>(params.seqlen_q);
    chances.by_keys = keys > 0.f ? 0.25f / keys : 0.f;
    const bool any = missed > 0.f && missed < infinity();
    chances.by_residual = any ? 0.5f : 0.f;
    chances.missed = any ? missed : infinity();

    u64 sum = 0;
#pragma unroll 4
    for (int row = first + lane; row < last; row += kWarpSize) sum += chances.of(row);
    sum = warp_sum(sum);
    if (lane == 0) chance_sums[warp] = sum;
    __syncthreads();  // all chances are known
    const u64 of_warp = chance_sums[lane];
    const float total = static_cast<float>(warp_sum(of_warp));
    u64 place = warp_sum(lane < warp ? of_warp : u64(0));
    for (int start = first; start < last; start += kWarpSize) {
        const int row = start + lane;
        const u64 chance = row < last ? chances.of(row) : 0;
        const u64 end = place + sum_up_to(chance, lane);
        const int until = points_before(end, total);
        for (int point = points_before(end - chance, total); point < until; ++point) {
            params.rows[head * kRows + point] = row;
            params.factors[head * kRows + point] = total / static_cast<float>(chance);
        }
        place = from_lane(end, kWarpSize - 1);
    }
}
