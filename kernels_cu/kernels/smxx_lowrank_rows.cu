// What the softmax of each drawn row adds up to, and the center of the keys: the first of three kernels that find the
// low-rank factors of a call (tile/drawn.cuh). A thread block has the rows of a unit, and a part of the keys; a warp 16 rows,
// and 16 keys of every tile.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K
//   ALIGNED     1: every row of q and k starts on 16 bytes
//   SHARED_BYTES  what the plan reserves
#include "tile/drawn.cuh"

typedef ElementOf<DTYPE>::type T;
typedef Drawn<HEAD_DIM, ALIGNED> OfColumns;
typedef OfColumns::QueryTile QueryTile;
typedef OfColumns::KeyTile KeyTile;
constexpr int kThreads = OfColumns::kThreads;
constexpr int kKeys = OfColumns::kKeys;
constexpr int kKeyParts = OfColumns::kKeyParts;
constexpr int kColumns = OfColumns::kColumns;
constexpr int kBlocks = OfColumns::kWide || sizeof(T) == 4 ? 1 : 2;  // that a multiprocessor has registers for

struct LowRankRowsParams {
    const T* q;
    const T* k;
    const DrawnRow* drawn;  // (64)
    float* sums;            // (units, splits, key parts, 64, 3): maximum, in powers of two, sum, and sum of reduced keys
    float* center;          // (units, columns)
    DrawnCall call;
    i64 band_low, band_high;
    ExactBlocks near;  // the keys that stay exact,
    i32 sinks;         // and the first of all
    i32 splits;
    float scale;  // of scores, to powers of two
};

namespace {

struct SharedStorage {
    QueryTile queries;
    KeyTile keys;
    alignas(16) float center[kColumns];
    float parts[kThreads * kEights];
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) smxx_lowrank_rows(const LowRankRowsParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const DrawnCall& call = params.call;
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    const int split = block_index() % params.splits, unit = block_index() / params.splits;
    const int tiles = (call.samples + kKeys - 1) / kKeys;
    const int first_tile = static_cast<int>(static_cast<i64>(tiles) * split / params.splits);
    const int last_tile = static_cast<int>(static_cast<i64>(tiles) * (split + 1) / params.splits);
    const T* k = params.k + call.keys(unit);

    {
        OfColumns::Ahead<T, QueryTile> ahead;
        ahead.queries(params.q, call, unit, params.drawn);
        OfColumns::clear_rest(shared.queries);
        OfColumns::clear_rest(shared.keys);
        OfColumns::find_center(shared.center, shared.parts, k, call);
        ahead.store<false>(shared.queries, nullptr, kDrawn);
    }
    OfColumns::Ahead<T, KeyTile> ahead;
    ahead.keys(k, call, first_tile * kKeys, call.samples - first_tile * kKeys);
    __syncthreads();
    if (split == 0) {
        for (int i = thread_index(); i < kColumns; i += kThreads) params.center[unit * kColumns + i] = shared.center[i];
    }

    const int block_row = warp % kRowWarps * 16, part = warp / kRowWarps;
    OwnRows rows;
    rows.find(params.drawn, block_row + lane / 4, {params.band_low, params.band_high, call.seqlen_k}, params.near);
    const u32 queries = left_address<bf16>(shared.queries, block_row, lane);
    RowSums softmax[2];
    for (int tile = first_tile; tile < last_tile; ++tile) {
        ahead.store<true>(shared.keys, shared.center, call.samples - tile * kKeys);
        __syncthreads();
        const int next = (tile + 1) * kKeys;
        ahead.keys(k, call, next, tile + 1 < last_tile ? call.samples - next : 0);
        float scores[kKeyTiles][4] = {};
        OwnKeys own;
        own.find(call, tile * kKeys + part * kPartKeys, lane);
        OfColumns::score(scores, queries, shared.keys, part, rows, own, lane, params.scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = softmax[half].maximum;
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) top = fmaxf(top, fmaxf(scores[nt][half * 2], scores[nt][half * 2 + 1]));
            softmax[half].rise(top);
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float weight = softmax[half].weight(scores[nt][half * 2 + i]);
                    softmax[half].sum += weight;
                    softmax[half].reduced += rows.keeps(half, own.key[nt][i], params.sinks) ? 0.f : weight;
                }
            }
        }
        __syncthreads();  // every warp is done with the tile
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        RowSums& own = softmax[half];
        own.gather(4);
        if (lane % 4 == 0) {
            const i64 place = ((static_cast<i64>(unit) * params.splits + split) * kKeyParts + part) * kDrawn;
            float* sums = params.sums + (place + block_row + lane / 4 + half * 8) * 3;
            sums[0] = own.maximum;
            sums[1] = own.sum;
            sums[2] = own.reduced;
        }
    }
}
