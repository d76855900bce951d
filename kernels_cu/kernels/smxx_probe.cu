// Sampled query rows of every head, computed from q and k and from Qhat and Khat: what smxx_decide.cu compares.
// One thread block has the ROWS rows that smxx_draw.cu drew of one head, one of the variants, and one of the splits of the
// keys. The variants are exact and reduced; where some keys stay exact, they are the far keys, exact, those that stay
// exact, and the far keys, reduced: the first two make the exact row, the last two the reduced one.
//
// K and V come through a ring of STAGES tiles, of which all but the one in use are on their way. A warp has 16 rows, and
// passes over tiles of which none of them sees a key; rows may lie far apart, so that others need the tile.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K, a multiple of 16; HEAD_DIM_V columns of V
//   TILE_K      keys per step
//   STAGES      tiles of K, and of V, in shared memory
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
    const i32* rows;     // (batch, heads, ROWS): drawn, in order
    float* outputs;      // (batch, heads, variants, splits, ROWS, HEAD_DIM_V), not normalised
    float* sums;         // (batch, heads, variants, splits, ROWS, 2): maximum, in powers of two, and sum
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
constexpr int kChunks = HEAD_DIM / kElements;  // of a row, an even number
constexpr int kStages = STAGES;
constexpr bool kSplit = SPLIT;
constexpr int kVariants = KEPT ? 3 : 2;
constexpr int kNear = 1, kReduced = kVariants - 1;  // variants; 0 is the exact one
constexpr float kLog2E = 1.4426950409f;
static_assert(HEAD_DIM % 16 == 0 && TILE_K % 16 == 0, "tiles are made of 16-row matrix instructions");

typedef SharedTile<T, kRows, HEAD_DIM> QueryTile;
typedef SharedTile<T, TILE_K, HEAD_DIM> KeyTile;
typedef SharedTile<T, TILE_K, kOutColumns> ValueTile;

struct SharedStorage {
    QueryTile q;
    KeyTile k[kStages];
    ValueTile v[kStages];
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// The rows of a warp are those of 16 lanes, which have two of all rows each. Asked for anew where they are needed: held
// over the loop, they would be the registers that are missing.
DEVICE int own_row(const int (&rows)[2], int warp_row, int below) {
    return __shfl_sync(kFullWarp, warp_row < kWarpSize ? rows[0] : rows[1], warp_row % kWarpSize + below);
}

// Whether a key of the tile that begins with the given one is in a span.
DEVICE bool meets(const KeySpan& span, int key) { return max(span.first, key) <= min(span.last, key + TILE_K - 1); }

// The keys that stay exact: those near a row, and the first of all.
struct Kept {
    Band near;
    int sinks;

    DEVICE KeySpan of(int row) const { return {near.first_key(row), near.last_key(row)}; }
    // Whether there are any in a tile for the rows of the warp's lanes.
    DEVICE bool some(int key, const int (&rows)[2]) const {
        return __any_sync(kFullWarp, key < sinks || meets(of(rows[0]), key) || meets(of(rows[1]), key));
    }
};

// The tiles of keys and values of a thread block, one after another, on their way to the ring.
struct Ring {
    RowCopy<ALIGNED, kThreads, HEAD_DIM, T, KeyTile> keys;
    RowCopy<ALIGNED, kThreads, HEAD_DIM_V, T, ValueTile> values;
    i64 k_row, v_row;
    int columns;  // of the keys
    int seqlen_k;
    int last_tile;  // the one after the last
    bool part;      // whether it is the keys that stay exact alone that are wanted,
    int every[2];   // of two rows, which among the lanes of a warp are all

    DEVICE void open(const T* k, const T* v, int first_tile) {
        keys.open(k + first_tile * (TILE_K * k_row), k_row);
        values.open(v + first_tile * (TILE_K * v_row), v_row);
    }
    // Starts the copies of the next tile, which are one group even if there is none, or no row wants it.
    DEVICE void advance(SharedStorage& shared, const Kept& kept, int tile, int stage) {
        if (tile < last_tile) {
            const int key = tile * TILE_K;
            if (!part || kept.some(key, every)) {
                keys.run(shared.k[stage], k_row, seqlen_k - key, columns);
                values.run(shared.v[stage], v_row, seqlen_k - key);
            }
            keys.move(TILE_K * k_row);
            values.move(TILE_K * v_row);
        }
        cp_async_commit();
    }
};

// Sets the scores of keys that stay exact to minus infinity, or those of all others.
template <int kTiles>
DEVICE void keep_part(float (&scores)[kTiles][4], const Kept& those, const int (&rows)[2], bool wanted, int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const KeySpan near = those.of(rows[half]);
#pragma unroll
        for (int nt = 0; nt < kTiles; ++nt) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int own = key + nt * 8 + i;
                const bool kept = own < those.sinks || (own >= near.first && own <= near.last);
                if (kept != wanted) scores[nt][half * 2 + i] = -infinity();
            }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) smxx_probe(const ProbeParams params) {
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

    const i32* drawn = params.rows + batch_head * kRows + lane;
    const int rows[2] = {drawn[0], drawn[kWarpSize]};
    const Band band = {params.band_low, params.band_high, params.seqlen_k};
    const i64 first_row = static_cast<i64>(batch_head) * params.seqlen_q;
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
    const u32 to = shared_address(&shared.q);
    for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
        const int row = own_row(rows, warp_row, i / kChunks);
        const int column = i % kChunks * kElements;
        const int offset = (warp_row + i / kChunks) * QueryTile::kPitch + column;
        if (column < columns) copy_chunk<ALIGNED>(shared.q.data, to, offset, q + row * q_row + column, true);
    }
    cp_async_commit();

    // Splits share the tiles between the first key that a row sees and the last.
    const int begin = band.first_key(__shfl_sync(kFullWarp, rows[0], 0)) / TILE_K;
    const int end = band.last_key(__shfl_sync(kFullWarp, rows[1], kWarpSize - 1)) / TILE_K + 1;
    const i64 tiles = max(0, end - begin);
    const int first_tile = begin + static_cast<int>(tiles * split / params.splits);
    const int last_tile = begin + static_cast<int>(tiles * (split + 1) / params.splits);
    const Kept kept = {{params.near_low, params.near_high, params.seqlen_k}, params.sinks};
    Ring ring = {{}, {}, k_row, params.v_row, columns, params.seqlen_k, last_tile, KEPT && variant == kNear,
                 {rows[0], rows[1]}};
    ring.open(k, v, first_tile);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) ring.advance(shared, kept, first_tile + i, i);

    const u32 queries = left_address<T>(shared.q, warp_row, lane);
    float output[1][kOutTiles][4] = {};
    OnlineSoftmax<1> softmax;
    softmax.clear();
    int stage = 0;
    for (int tile = first_tile; tile < last_tile; ++tile) {
        const int key = tile * TILE_K;
        const int next = tile + kStages - 1;
        const int stage_before = stage == 0 ? kStages - 1 : stage - 1;
        if (kStages == 1) ring.advance(shared, kept, next, stage_before);
        cp_async_wait<kStages == 1 ? 0 : kStages - 2>();
        __syncthreads();  // the queries, keys and values have landed, and every warp is done with the tile before
        if (kStages > 1) ring.advance(shared, kept, next, stage_before);
        const int own[2] = {own_row(rows, warp_row, lane / 4), own_row(rows, warp_row, lane / 4 + 8)};
        const KeySpan seen[2] = {{band.first_key(own[0]), band.last_key(own[0])},
                                 {band.first_key(own[1]), band.last_key(own[1])}};
        bool needed = meets(seen[0], key) || meets(seen[1], key);
#if KEPT
        const bool some_kept = kept.some(key, own);
        needed = needed && (some_kept || variant != kNear);
#endif
        if (__any_sync(kFullWarp, needed)) {
            float scores[1][kKeyTiles][4] = {};
            multiply_queries_keys<T, kSplit, kSteps, 0, QueryTile::kPitch>(scores, queries, shared.k[stage], lane,
                                                                           columns / kStepColumns);
            scale_scores(scores, params.scale, 0.f);
            apply_mask(scores[0], seen, key + lane % 4 * 2);
#if KEPT
            if (some_kept) keep_part(scores[0], kept, own, variant == kNear, key + lane % 4 * 2);
#endif
            float rescale[1][2] = {{1.f, 1.f}}, of_tile[1][2];
            softmax.raise(scores, softmax.kAllRows, kLog2E, rescale);
            softmax.apply(rescale, output);
            softmax.exponentiate(scores, kLog2E, rescale, of_tile);
            multiply_weights_values<T, kSplit, false>(output, scores, shared.v[stage], lane);
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
        if (kStages == 1) __syncthreads();  // every warp is done with the only tile
    }
    cp_async_wait<0>();  // for the queries, if there are no keys
    softmax.reduce_sums();

    const i64 part = static_cast<i64>(block_index()) * kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + half * 8;
        const int own = own_row(rows, warp_row, lane / 4 + half * 8);
        float* out = params.outputs + (part + row) * HEAD_DIM_V;
#pragma unroll
        for (int nt = 0; nt < kOutTiles; ++nt) {
            const int column = nt * 8 + lane % 4 * 2;
            if (column >= HEAD_DIM_V) continue;
            *reinterpret_cast<Two<float>*>(out + column) = {{output[0][nt][half * 2], output[0][nt][half * 2 + 1]}};
        }
        if (lane % 4 == 0) {
            float* sums = params.sums + (part + row) * 2;
            float top = softmax.maximum[0][half];
#if KEPT
            if (reduced) top += params.shift[first_row + own] * kLog2E;
#endif
            sums[0] = top;
            sums[1] = softmax.sum[0][half];
        }
    }
}
