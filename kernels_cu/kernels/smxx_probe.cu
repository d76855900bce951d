// Sampled query rows of every head, computed from q and k and from Qhat and Khat: what smxx_decide.cu compares.
// A thread block has ROWS of those that smxx_draw.cu drew of one head, and one of the splits of the keys. A warp has 16 rows,
// both exact and reduced, which differ in their scores alone: so every tile of values is copied once, and read once for
// both products. Where some keys stay exact, the reduced rows have their exact scores.
//
// K, Khat and V come through a ring of STAGES tiles, of which all but the one in use are on their way. A warp passes over
// tiles of which none of its rows sees a key; rows may lie far apart, so that others need the tile.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K, a multiple of 16; HEAD_DIM_V columns of V
//   ROWS        of a thread block: 64, 32 or 16 of the rows that were drawn
//   TILE_K      keys per step
//   STAGES      tiles of K, Khat and V in shared memory
//   BLOCKS      thread blocks that a multiprocessor should have registers for
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
    const T* qhat;       // (batch, heads, seqlen_q, columns), contiguous
    const T* khat;       // (batch, heads_kv, seqlen_k, columns), contiguous
    const float* shift;  // (batch, heads, seqlen_q), contiguous: what scores of Khat lack; null if nothing stays exact
    const i32* ranks;    // (batch, heads): columns of Qhat and Khat to use; HEAD_DIM: nothing to compare
    const i32* rows;     // (batch, heads, 64): drawn, in order
    float* outputs;      // (batch, heads, 2, splits, 64, HEAD_DIM_V): exact and reduced, not normalised
    float* sums;         // (batch, heads, 2, splits, 64, 2): maximum, in powers of two, and sum
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i64 v_batch, v_head, v_row;
    i64 band_low, band_high;
    ExactBlocks near;  // the keys that stay exact,
    i32 sinks;         // and the first of all
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 columns, splits;
    float scale;
};

namespace {

constexpr int kDrawn = 64;  // PROBE_ROWS in plan.py
constexpr int kGroups = kDrawn / ROWS;  // of rows, which have thread blocks of their own
constexpr int kParts = HEAD_DIM_V > 128 ? 2 : 1;  // of the columns of V: a warp has registers for one, and all scores of its rows
constexpr int kRowWarps = ROWS / 16;
constexpr int kThreads = kRowWarps * kParts * kWarpSize;
constexpr int kOutColumns = (HEAD_DIM_V + 16 * kParts - 1) / (16 * kParts) * 16;  // of a part
constexpr int kStepColumns = Traits<T>::kMmaDepth;
constexpr int kSteps = HEAD_DIM / kStepColumns;
constexpr int kKeyTiles = TILE_K / 8;
constexpr int kOutTiles = kOutColumns / 8;
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kChunks = HEAD_DIM / kElements;  // of a row, an even number
constexpr int kStages = STAGES;
constexpr bool kSplit = SPLIT;
constexpr float kLog2E = 1.4426950409f;
static_assert(HEAD_DIM % 16 == 0 && TILE_K % 16 == 0, "tiles are made of 16-row matrix instructions");
static_assert(ROWS == 64 || ROWS == 32 || ROWS == 16, "a thread block has whole matrix instructions of the rows");

typedef SharedTile<T, ROWS, HEAD_DIM> QueryTile;
typedef SharedTile<T, TILE_K, HEAD_DIM> KeyTile;
typedef SharedTile<T, TILE_K, kParts * kOutColumns> ValueTile;

// Of the exact row, then of the reduced one: scores of a tile, say.
typedef float Scores[2][kKeyTiles][4];

struct SharedStorage {
    QueryTile q, qhat;
    KeyTile k[kStages], khat[kStages];
    ValueTile v[kStages];
    // What each row sees, and those near it that stay exact: there are no registers for it.
    KeySpan seen[ROWS];
#if KEPT
    KeySpan near[ROWS];
#endif
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// The rows of a warp are those of 16 lanes, which have two of all rows each. Asked for anew where they are needed: held
// over the loop, they would be the registers that are missing.
DEVICE int own_row(const int (&rows)[2], int warp_row, int below) {
    return __shfl_sync(kFullWarp, warp_row < kWarpSize ? rows[0] : rows[1], warp_row % kWarpSize + below);
}

// Whether a key of the tile that begins with the given one is in a span.
DEVICE bool meets(const KeySpan& span, int key) { return max(span.first, key) <= min(span.last, key + TILE_K - 1); }
// Whether all of them are.
DEVICE bool covers(const KeySpan& span, int key) { return span.first <= key && span.last >= key + TILE_K - 1; }

DEVICE KeySpan span_of(const Band& band, int row) { return {band.first_key(row), band.last_key(row)}; }

// The tiles of keys and values of a thread block, one after another, on their way to the ring.
struct Ring {
    RowCopy<ALIGNED, kThreads, HEAD_DIM, T, KeyTile> keys;
    RowCopy<true, kThreads, HEAD_DIM, T, KeyTile> reduced;
    RowCopy<ALIGNED, kThreads, HEAD_DIM_V, T, ValueTile> values;
    i64 k_row, v_row;
    int khat_row, columns;  // of Khat
    int seqlen_k;
    int last_tile;  // the one after the last

    DEVICE void open(const T* k, const T* khat, const T* v, int first_tile) {
        keys.open(k + first_tile * (TILE_K * k_row), k_row);
        reduced.open(khat + static_cast<i64>(first_tile) * (TILE_K * khat_row), khat_row);
        values.open(v + first_tile * (TILE_K * v_row), v_row);
    }
    // Starts the copies of the next tile, which are one group even if there is none.
    DEVICE void advance(SharedStorage& shared, int tile, int stage) {
        if (tile < last_tile) {
            const int rows = seqlen_k - tile * TILE_K;
            keys.run(shared.k[stage], k_row, rows);
            reduced.run(shared.khat[stage], khat_row, rows, columns);
            values.run(shared.v[stage], v_row, rows);
            keys.move(TILE_K * k_row);
            reduced.move(TILE_K * khat_row);
            values.move(TILE_K * v_row);
        }
        cp_async_commit();
    }
};

// Gives reduced rows the exact scores of keys that stay exact: those near a row, and the first of all.
DEVICE void keep(Scores& scores, const KeySpan (&rows)[2], int sinks, int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const KeySpan near = rows[half];
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int own = key + nt * 8 + i;
                const bool kept = own < sinks || (own >= near.first && own <= near.last);
                if (kept) scores[1][nt][half * 2 + i] = scores[0][nt][half * 2 + i];
            }
        }
    }
}

// One of the two: the product of queries and keys.
DEVICE void multiply(float (&scores)[kKeyTiles][4], u32 queries, const KeyTile& keys, int lane, int steps) {
    typedef float One[1][kKeyTiles][4];
    multiply_queries_keys<T, kSplit, kSteps, 0, QueryTile::kPitch>(reinterpret_cast<One&>(scores), queries, keys, lane, steps);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) smxx_probe(const ProbeParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const int thread = thread_index();
    const int lane = thread % kWarpSize;
    const int split = block_index() % params.splits;
    const int group = block_index() / params.splits % kGroups;
    const int batch_head = block_index() / (kGroups * params.splits);
    const int block_row = thread / kWarpSize % kRowWarps * 16;
    const int warp_row = group * ROWS + block_row;  // of those drawn
    const int batch = batch_head / params.heads;
    const int head = batch_head % params.heads;
    const int head_kv = head / params.heads_per_kv;
    const int rank = params.ranks[batch_head];
    if (rank == HEAD_DIM) return;

    const i32* drawn = params.rows + batch_head * kDrawn + lane;
    const int rows[2] = {drawn[0], drawn[kWarpSize]};
    const Band band = {params.band_low, params.band_high, params.seqlen_k};
    const i64 first_row = static_cast<i64>(batch_head) * params.seqlen_q;
    const T* q = params.q + batch * params.q_batch + head * params.q_head;
    const T* qhat = params.qhat + first_row * params.columns;
    const i64 unit_kv = static_cast<i64>(batch) * (params.heads / params.heads_per_kv) + head_kv;
    const T* k = params.k + batch * params.k_batch + head_kv * params.k_head;
    const T* khat = params.khat + unit_kv * params.seqlen_k * params.columns;
    const T* v = params.v + batch * params.v_batch + head_kv * params.v_head;
    if (thread < ROWS) {
        const int row = params.rows[batch_head * kDrawn + group * ROWS + thread];
        shared.seen[thread] = span_of(band, row);
#if KEPT
        const KeyRange near = params.near.of(row, params.seqlen_k);
        shared.near[thread] = {near.first, near.end - 1};
#endif
    }
    if (thread < kRowWarps * kWarpSize) {
        for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
            const i64 row = own_row(rows, warp_row, i / kChunks);
            const int column = i % kChunks * kElements;
            const int offset = (block_row + i / kChunks) * QueryTile::kPitch + column;
            copy_chunk<ALIGNED>(shared.q.data, shared_address(&shared.q), offset, q + row * params.q_row + column, true);
            if (column >= rank) continue;
            copy_chunk<true>(shared.qhat.data, shared_address(&shared.qhat), offset, qhat + row * params.columns + column, true);
        }
    }
    cp_async_commit();

    // Splits share the tiles between the first key that a row sees and the last.
    const int begin = band.first_key(__shfl_sync(kFullWarp, rows[0], 0)) / TILE_K;
    const int end = band.last_key(__shfl_sync(kFullWarp, rows[1], kWarpSize - 1)) / TILE_K + 1;
    const i64 tiles = max(0, end - begin);
    const int first_tile = begin + static_cast<int>(tiles * split / params.splits);
    const int last_tile = begin + static_cast<int>(tiles * (split + 1) / params.splits);
    Ring ring = {{}, {}, {}, params.k_row, params.v_row, params.columns, rank, params.seqlen_k, last_tile};
    ring.open(k, khat, v, first_tile);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) ring.advance(shared, first_tile + i, i);

    const u32 queries = left_address<T>(shared.q, block_row, lane);
    const u32 reduced_queries = left_address<T>(shared.qhat, block_row, lane);
    const int part_column = thread / kWarpSize / kRowWarps * kOutColumns;
#if KEPT
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        shift[half] = params.shift[first_row + own_row(rows, warp_row, lane / 4 + half * 8)];
    }
#endif
    float output[2][kOutTiles][4] = {};
    OnlineSoftmax<2> softmax;
    softmax.clear();
    int stage = 0;
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const int key = tile * TILE_K;
        const int next = tile + kStages - 1;
        const int stage_before = stage == 0 ? kStages - 1 : stage - 1;
        if (kStages == 1) ring.advance(shared, next, stage_before);
        cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
        __syncthreads();  // queries, keys, values and spans have landed, and every warp is done with the tile before
        if (kStages > 1) ring.advance(shared, next, stage_before);
        const int own = block_row + lane / 4;
        const KeySpan seen[2] = {shared.seen[own], shared.seen[own + 8]};
        if (__any_sync(kFullWarp, meets(seen[0], key) || meets(seen[1], key))) {
            Scores scores = {};
            multiply(scores[0], queries, shared.k[stage], lane, kSteps);
            multiply(scores[1], reduced_queries, shared.khat[stage], lane, rank / kStepColumns);
            scale_scores(scores, params.scale, 0.f);
#if KEPT
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[1][nt][i] += shift[i / 2];
            }
            const KeySpan near[2] = {shared.near[own], shared.near[own + 8]};
            if (__any_sync(kFullWarp, key < params.sinks || meets(near[0], key) || meets(near[1], key))) {
                keep(scores, near, params.sinks, key + lane % 4 * 2);
            }
#endif
            if (__any_sync(kFullWarp, !covers(seen[0], key) || !covers(seen[1], key))) {
                apply_mask(scores[0], seen, key + lane % 4 * 2);
                apply_mask(scores[1], seen, key + lane % 4 * 2);
            }
            float rescale[2][2] = {{1.f, 1.f}, {1.f, 1.f}}, of_tile[2][2];
            softmax.raise(scores, softmax.kAllRows, kLog2E, rescale);
            softmax.apply(rescale, output);
            softmax.exponentiate(scores, kLog2E, rescale, of_tile);
            const ValueTile& values = *reinterpret_cast<const ValueTile*>(&shared.v[stage].at(0, part_column));
            multiply_weights_values<T, kSplit, false>(output, scores, values, lane);
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
        if (kStages == 1) __syncthreads();  // every warp is done with the only tile
    }
    cp_async_wait<0>();  // for the queries, if there are no keys
    softmax.reduce_sums();

#pragma unroll
    for (int variant = 0; variant < 2; ++variant) {
        const i64 part = ((static_cast<i64>(batch_head) * 2 + variant) * params.splits + split) * kDrawn;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + lane / 4 + half * 8;
            float* out = params.outputs + (part + row) * HEAD_DIM_V;
#pragma unroll
            for (int nt = 0; nt < kOutTiles; ++nt) {
                const int column = part_column + nt * 8 + lane % 4 * 2;
                if (column >= HEAD_DIM_V) continue;
                const float(&two)[4] = output[variant][nt];
                *reinterpret_cast<Two<float>*>(out + column) = {{two[half * 2], two[half * 2 + 1]}};
            }
            if (lane % 4 == 0 && part_column == 0) {
                float* sums = params.sums + (part + row) * 2;
                sums[0] = softmax.maximum[variant][half];
                sums[1] = softmax.sum[variant][half];
            }
        }
    }
}
