// Sampled query rows of every head, computed from q and k and from Qhat and Khat: what smxx_decide.cu compares.
// One thread block has ROWS rows of one head, one of the variants, and one of the splits of the keys. The variants are
// exact and reduced; where some keys stay exact, they are the far keys, exact, those that stay exact, and the far keys,
// reduced: the first two make the exact row, the last two the reduced one.
//
// Rows are drawn where they may matter. A row's chance is a quarter each of: uniform, and by one over the number of keys
// that do not stay exact and that it sees; and half by its residual, the energy of the row that Qhat misses, if there are
// such keys. A row that takes more than its share of 1 / ROWS is drawn for certain: points a constant apart are laid along
// the sum of all chances.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K, a multiple of 16; HEAD_DIM_V columns of V
//   TILE_K      keys per step
//   KEPT        1: some keys stay exact
//   ALIGNED     1: every row of q, k and v starts on 16 bytes
//   SPLIT       1: float32 by three TF32 products; 0: one
//   SHARED_BYTES  what the plan reserves
#include "tile/mask.cuh"
#include "tile/product.cuh"
#include "tile/softmax.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements. Queries see keys from query + band_low to query + band_high.
struct ProbeParams {
    const T* q;
    const T* k;
    const T* v;
    const T* qhat;          // (batch, heads, seqlen_q, columns), contiguous
    const T* khat;          // (batch, heads_kv, seqlen_k, columns), contiguous
    const float* residual;  // (batch, heads, seqlen_q), contiguous
    const float* shift;     // (batch, heads, seqlen_q), contiguous: what scores of Khat lack; null if nothing stays exact
    const i32* ranks;       // (batch, heads): columns of Qhat and Khat to use; HEAD_DIM: nothing to compare
    float* factors;         // (batch, heads, ROWS): one over a drawn row's chance
    float* outputs;         // (batch, heads, variants, splits, ROWS, HEAD_DIM_V), not normalised
    float* sums;            // (batch, heads, variants, splits, ROWS, 2): maximum, in powers of two, and sum
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i64 v_batch, v_head, v_row;
    i64 band_low, band_high;
    i64 near_low, near_high;  // the keys that stay exact, from query + near_low to query + near_high,
    i32 sinks;                // and the first of all
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 columns, splits;
    float scale;
};

namespace {

constexpr int kRows = 64;  // PROBE_ROWS in plan.py
constexpr int kWarps = kRows / 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kOutColumns = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int kStepColumns = Traits<T>::kMmaDepth;
constexpr int kSteps = HEAD_DIM / kStepColumns;
constexpr int kKeyTiles = TILE_K / 8;
constexpr int kOutTiles = kOutColumns / 8;
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr bool kSplit = SPLIT;
constexpr int kVariants = KEPT ? 3 : 2;
constexpr int kNear = 1, kReduced = kVariants - 1;  // variants; 0 is the exact one
constexpr float kLog2E = 1.4426950409f;
static_assert(HEAD_DIM % 16 == 0 && TILE_K % 16 == 0, "tiles are made of 16-row matrix instructions");

typedef SharedTile<T, kRows, HEAD_DIM> QueryTile;
typedef SharedTile<T, TILE_K, HEAD_DIM> KeyTile;
typedef SharedTile<T, TILE_K, kOutColumns> ValueTile;
typedef RowCopy<ALIGNED, kThreads, HEAD_DIM, T, KeyTile> KeyCopy;
typedef RowCopy<ALIGNED, kThreads, HEAD_DIM_V, T, ValueTile> ValueCopy;

// While rows are drawn: sums over the rows of each thread, and of chances before them.
struct Sums {
    float parts[kThreads];
    float ends[kThreads + 1];  // before that, a second kind of sums
};
struct SharedStorage {
    QueryTile q;
    union {
        KeyTile k;
        Sums sums;
    };
    ValueTile v;
    i32 rows[kRows];
};
static_assert(sizeof(Sums) <= sizeof(KeyTile), "the plan counts the tile");
static_assert((sizeof(SharedStorage) + 15) / 16 * 16 == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// What a row's chance is made of.
struct Chances {
    Band band, near;
    int sinks;
    const float* residual;
    float uniform, by_keys, by_residual;

    // Keys that the row sees and that do not stay exact.
    DEVICE int count(int row) const {
        const int first = max(band.first_key(row), sinks);
        const int last = band.last_key(row);
        if (!KEPT) return last - first + 1;
        const int kept = min(last, near.last_key(row)) - max(first, near.first_key(row)) + 1;
        return max(0, last - first + 1) - max(0, kept);
    }
    DEVICE float keys(int row) const {
        const int seen = count(row);
        return seen > 0 ? 1.f / static_cast<float>(seen) : 0.f;
    }
    DEVICE float missed(int row) const {
        const float x = residual[row];
        return x > 0.f && x < infinity() && count(row) > 0 ? x : 0.f;
    }
    DEVICE float of(int row) const { return uniform + by_keys * keys(row) + by_residual * missed(row); }
};

// The number of points before a place along the sum of chances: point j is at (j + 1/2) / kRows of it.
DEVICE int points_before(float place, float total) {
    const float points = place / total * kRows - 0.5f;
    const int whole = static_cast<int>(points);
    return min(kRows, whole + (points > static_cast<float>(whole)));
}

// Draws the rows, in order, and stores one over the chance of each.
DEVICE void draw(SharedStorage& shared, Chances chances, int seqlen_q, float* factors) {
    const int thread = thread_index();
    const int each = (seqlen_q + kThreads - 1) / kThreads;
    const int first = min(seqlen_q, thread * each);
    const int last = min(seqlen_q, first + each);
    float keys = 0.f;
    float missed = 0.f;
    for (int row = first; row < last; ++row) {
        keys += chances.keys(row);
        missed += chances.missed(row);
    }
    shared.sums.parts[thread] = keys;
    shared.sums.ends[thread] = missed;
    __syncthreads();
    keys = 0.f;
    missed = 0.f;
    for (int i = 0; i < kThreads; ++i) {
        keys += shared.sums.parts[i];
        missed += shared.sums.ends[i];
    }
    chances.uniform = 0.25f / static_cast<float>(seqlen_q);
    chances.by_keys = keys > 0.f ? 0.25f / keys : 0.f;
    chances.by_residual = missed > 0.f && missed < infinity() ? 0.5f / missed : 0.f;
    __syncthreads();
    float sum = 0.f;
    for (int row = first; row < last; ++row) sum += chances.of(row);
    shared.sums.parts[thread] = sum;
    __syncthreads();
    if (thread == 0) {
        float before = 0.f;
        for (int i = 0; i < kThreads; ++i) {
            shared.sums.ends[i] = before;
            before += shared.sums.parts[i];
        }
        shared.sums.ends[kThreads] = before;
    }
    __syncthreads();
    const float total = shared.sums.ends[kThreads];
    // The last thread with rows takes what rounding has left at the end.
    const int end = last == seqlen_q && first < last ? kRows : points_before(shared.sums.ends[thread + 1], total);
    float place = shared.sums.ends[thread];
    int point = first < last ? points_before(place, total) : end;
    for (int row = first; row < last; ++row) {
        const float chance = chances.of(row);
        place += chance;
        const int until = row == last - 1 ? end : min(end, points_before(place, total));
        for (; point < until; ++point) {
            shared.rows[point] = row;
            if (factors) factors[point] = total / chance;
        }
    }
    __syncthreads();
}

// Sets the scores of keys that stay exact to minus infinity, or those of all others. near: the others of two rows.
template <int kTiles>
DEVICE void keep_part(float (&scores)[kTiles][4], const KeySpan (&near)[2], int sinks, bool wanted, int key) {
#pragma unroll
    for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int own = key + nt * 8 + i % 2;
            const bool kept = own < sinks || (own >= near[i / 2].first && own <= near[i / 2].last);
            if (kept != wanted) scores[nt][i] = -infinity();
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_probe(const ProbeParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const int thread = thread_index();
    const int lane = thread % kWarpSize;
    const int warp_row = thread / kWarpSize * 16;
    const int split = block_index() % params.splits;
    const int variant = block_index() / params.splits % kVariants;
    const int batch_head = block_index() / (kVariants * params.splits);
    const int batch = batch_head / params.heads;
    const int head = batch_head % params.heads;
    const int head_kv = head / params.heads_per_kv;
    const int rank = params.ranks[batch_head];
    if (rank == HEAD_DIM) return;

    const Band band = {params.band_low, params.band_high, params.seqlen_k};
    const i64 first_row = static_cast<i64>(batch_head) * params.seqlen_q;
    const Band near_band = {params.near_low, params.near_high, params.seqlen_k};
    draw(shared, {band, near_band, KEPT ? params.sinks : 0, params.residual + first_row, 0.f, 0.f, 0.f}, params.seqlen_q,
         variant == 0 && split == 0 ? params.factors + batch_head * kRows : nullptr);

    const bool reduced = variant == kReduced;
    const int columns = reduced ? rank : HEAD_DIM;
    const i64 q_row = reduced ? params.columns : params.q_row;
    const i64 k_row = reduced ? params.columns : params.k_row;
    const T* q = reduced ? params.qhat + first_row * params.columns
                         : params.q + batch * params.q_batch + head * params.q_head;
    const i64 unit_kv = static_cast<i64>(batch) * (params.heads / params.heads_per_kv) + head_kv;
    const T* k = reduced ? params.khat + unit_kv * params.seqlen_k * params.columns
                         : params.k + batch * params.k_batch + head_kv * params.k_head;
    const T* v = params.v + batch * params.v_batch + head_kv * params.v_head;
    for (int i = thread; i < kRows * (HEAD_DIM / kElements); i += kThreads) {
        const int row = i / (HEAD_DIM / kElements);
        const int column = i % (HEAD_DIM / kElements) * kElements;
        if (column >= columns) continue;
        const T* source = q + shared.rows[row] * q_row + column;
        *reinterpret_cast<Chunk*>(&shared.q.at(row, column)) =
            ALIGNED ? *reinterpret_cast<const Chunk*>(source) : gather_chunk(source, true);
    }

    KeySpan seen[2];
#if KEPT
    KeySpan near[2];
#endif
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = shared.rows[warp_row + lane / 4 + half * 8];
        seen[half] = {band.first_key(row), band.last_key(row)};
#if KEPT
        near[half] = {near_band.first_key(row), near_band.last_key(row)};
#endif
    }
    const u32 queries = left_address<T>(shared.q, warp_row, lane);
    float output[1][kOutTiles][4] = {};
    OnlineSoftmax<1> softmax;
    softmax.clear();
    const i64 tiles = (params.seqlen_k + TILE_K - 1) / TILE_K;
    const int first_tile = static_cast<int>(tiles * split / params.splits);
    const int last_tile = static_cast<int>(tiles * (split + 1) / params.splits);
    KeyCopy key_copy;
    ValueCopy value_copy;
    key_copy.open(k + first_tile * (TILE_K * k_row), k_row);
    value_copy.open(v + first_tile * (TILE_K * params.v_row), params.v_row);
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const int key = tile * TILE_K;
        key_copy.run(shared.k, k_row, params.seqlen_k - key, columns);
        value_copy.run(shared.v, params.v_row, params.seqlen_k - key);
        cp_async_commit();
        key_copy.move(TILE_K * k_row);
        value_copy.move(TILE_K * params.v_row);
        cp_async_wait<0>();
        __syncthreads();  // the queries, keys and values have landed
        float scores[1][kKeyTiles][4] = {};
        multiply_queries_keys<T, kSplit, kSteps, 0, QueryTile::kPitch>(scores, queries, shared.k, lane,
                                                                       columns / kStepColumns);
        scale_scores(scores, params.scale, 0.f);
        apply_mask(scores[0], seen, key + lane % 4 * 2);
#if KEPT
        keep_part(scores[0], near, params.sinks, variant == kNear, key + lane % 4 * 2);
#endif
        softmax.update(scores, output, kLog2E);
        multiply_weights_values<T, kSplit, false>(output, scores, shared.v, lane);
        __syncthreads();  // every warp is done with the keys and values
    }
    softmax.reduce_sums();

    const i64 part = static_cast<i64>(block_index()) * kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + half * 8;
        float* out = params.outputs + (part + row) * HEAD_DIM_V;
#pragma unroll
        for (int nt = 0; nt < kOutTiles; ++nt) {
            const int column = nt * 8 + lane % 4 * 2;
            if (column >= HEAD_DIM_V) continue;
            out[column] = output[0][nt][half * 2];
            out[column + 1] = output[0][nt][half * 2 + 1];
        }
        if (lane % 4 == 0) {
            float* sums = params.sums + (part + row) * 2;
            float top = softmax.maximum[0][half];
#if KEPT
            if (reduced) top += params.shift[first_row + shared.rows[row]];
#endif
            sums[0] = top * kLog2E;
            sums[1] = softmax.sum[0][half];
        }
    }
}
