// Sums of products of columns, HEAD_DIM x HEAD_DIM of every unit: of keys, weighted by the attention that the drawn rows pay
// them, and of queries. The second of three kernels that find the low-rank factors of a call (tile/drawn.cuh).
//
// To second order the divergence of a softmax from one of other scores is half the variance of their difference under the
// softmax itself; so keys count by how much they are attended to. Each also has a part that all have alike, because the
// drawn rows do not see all that others see.
//
// A thread block has a part of a unit's keys, or of its drawn queries, and up to 128 x 128 of the sums. While it multiplies
// the columns of a tile, it finds the weights of the next. Both operands of a product are multiplied by the square root of
// a key's weight, and rounded alike, so that the sums are squares.
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

struct LowRankSumsParams {
    const T* q;
    const T* k;
    const DrawnRow* drawn;    // (64): of which there are scores
    const DrawnRow* queries;  // (512): of which the sums are
    const float* sums;        // (units, row_splits, key parts, 64, 3), of smxx_lowrank_rows.cu
    const float* center;      // (units, columns), of the same
    float* of_keys;           // (units, splits, columns, columns)
    float* of_queries;        // (units, query_splits, columns, columns)
    DrawnCall call;
    i64 band_low, band_high;
    ExactBlocks near;  // the keys that stay exact,
    i32 sinks;         // and the first of all
    i32 row_splits, splits, query_splits;
    float scale;  // of scores, to powers of two
};

namespace {

constexpr int kQueries = 512;        // LOWRANK_QUERIES in plan.py
constexpr float kPlainPart = 0.1f;   // of all weights, that the keys have alike
constexpr int kHalves = OfColumns::kWide ? 2 : 1;
constexpr int kSide = kColumns / kHalves;  // of the square that a thread block makes
constexpr int kSideWarps = kSide / 32;     // warps below one another, of 32 columns each
constexpr int kAcrossWarps = OfColumns::kWide || kSideWarps == 1 ? 2 : kSideWarps == 3 ? 3 : 4;
constexpr int kAcross = kSide / kAcrossWarps;  // columns of a warp
constexpr int kShares = kThreads / kDrawn;     // threads of a row
constexpr u32 kNothing = 0x80008000u;          // two times -0, which adds nothing to a pair
static_assert(kSideWarps * kAcrossWarps <= kThreads / kWarpSize && kAcross % 16 == 0, "warps have whole instructions");

struct SharedStorage {
    QueryTile queries;
    KeyTile keys[2];
    alignas(16) float center[kColumns];
    float lse[kDrawn];
    float reduced[kDrawn];  // of each row's weights, the part of keys that are not exact
    float received[2][kRowWarps][kKeys];  // what the rows of a warp give to each key
    bf16 root[kKeys];                     // of their weights
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// lse of every drawn row, in powers of two, and the part of its weights that keys have which are not exact.
DEVICE void merge_sums(SharedStorage& shared, const float* sums, int parts) {
    const int row = thread_index() / kShares, share = thread_index() % kShares;
    RowSums all;
#pragma unroll 4
    for (int part = share; part < parts; part += kShares) {
        const float* own = sums + (static_cast<i64>(part) * kDrawn + row) * 3;
        const float top = fmaxf(all.maximum, own[0]);
        const float base = top == -infinity() ? 0.f : top;
        const float before = exp2_approx(all.maximum - base), now = exp2_approx(own[0] - base);
        all = {top, all.sum * before + own[1] * now, all.reduced * before + own[2] * now};
    }
    all.gather(kShares);
    if (share == 0) {
        // Of no key: all weights are 0.
        shared.lse[row] = all.sum > 0.f ? all.maximum + logf(all.sum) * kLog2E : infinity();
        shared.reduced[row] = all.sum > 0.f ? all.reduced / all.sum : 0.f;
    }
}

// What a warp's rows give to its part of a tile's keys.
DEVICE void receive(float (&received)[kKeys], const float (&scores)[kKeyTiles][4], const OwnRows& rows,
                    const OwnKeys& own, const float (&lse)[2], int sinks, int part, int lane) {
    float given[2][2];
#pragma unroll
    for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            given[nt][i] = 0.f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float weight = exp2_approx(scores[nt][half * 2 + i] - lse[half]);
                given[nt][i] += rows.keeps(half, own.key[nt][i], sinks) ? 0.f : weight;
            }
        }
    }
    // The sum over the lanes with the same keys, of which each is left with one key, or two of them.
    const bool upper = lane & 16, odd = lane & 8;
    float pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float other = __shfl_xor_sync(kFullWarp, upper ? given[0][i] : given[1][i], 16);
        pair[i] = (upper ? given[1][i] : given[0][i]) + other;
    }
    const float other = __shfl_xor_sync(kFullWarp, odd ? pair[0] : pair[1], 8);
    float sum = (odd ? pair[1] : pair[0]) + other;
    sum += __shfl_xor_sync(kFullWarp, sum, 4);
    if (!(lane & 4)) received[part * kPartKeys + upper * 8 + lane % 4 * 2 + odd] = sum;
}

typedef float Square[2][kAcross / 8][4];

DEVICE void weigh(u32 (&fragment)[4], u32 first, u32 second, u32 third, u32 fourth) {
    const u32 weights[4] = {first, second, third, fourth};
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Traits<bf16>::fma(fragment[i], weights[i], kNothing);
}

// square += X^T W X of the tile's rows, this warp's part.
DEVICE void multiply_columns(Square& square, const KeyTile& tile, const bf16 (&root)[kKeys], int row_column, int column,
                             int lane) {
    const u32 left = shared_address(&tile.at(lane / 16 * 8 + lane % 8, row_column + lane / 8 % 2 * 8));
    const u32 right = transposed_address(tile, lane) + column * int(sizeof(bf16));
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
        // Of the keys that a lane has of both operands.
        const u32 low = *reinterpret_cast<const u32*>(&root[step * 16 + lane % 4 * 2]);
        const u32 high = *reinterpret_cast<const u32*>(&root[step * 16 + 8 + lane % 4 * 2]);
        u32 a[2][4];
#pragma unroll
        for (int mt = 0; mt < 2; ++mt) {
            ldmatrix_x4_trans(a[mt], left + (step * 16 * KeyTile::kPitch + mt * 16) * int(sizeof(bf16)));
            weigh(a[mt], low, low, high, high);
        }
#pragma unroll
        for (int pair = 0; pair < kAcross / 16; ++pair) {
            u32 b[4];
            ldmatrix_x4_trans(b, right + (step * 16 * KeyTile::kPitch + pair * 16) * int(sizeof(bf16)));
            weigh(b, low, high, low, high);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int mt = 0; mt < 2; ++mt) {
                    mma_m16n8k16_bf16(square[mt][pair * 2 + half], a[mt], b[half * 2], b[half * 2 + 1]);
                }
            }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_lowrank_sums(const LowRankSumsParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const DrawnCall& call = params.call;
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    const int quarter = block_index() % (kHalves * kHalves);  // of the sums
    const int block = block_index() / (kHalves * kHalves);
    const int shares = params.splits + params.query_splits;
    const int unit = block / shares, share = block % shares;
    const bool of_keys = share < params.splits;
    const int split = of_keys ? share : share - params.splits, splits = of_keys ? params.splits : params.query_splits;
    const int tiles = of_keys ? (call.samples + kKeys - 1) / kKeys : kQueries / kKeys;
    const int first_tile = static_cast<int>(static_cast<i64>(tiles) * split / splits);
    const int last_tile = static_cast<int>(static_cast<i64>(tiles) * (split + 1) / splits);
    const T* k = params.k + call.keys(unit);

    const int block_row = warp % kRowWarps * 16, part = warp / kRowWarps;
    OfColumns::clear_rest(shared.keys[0]);
    OfColumns::clear_rest(shared.keys[1]);
    OwnRows rows = {};
    OfColumns::Ahead<T, KeyTile> ahead;
    float lse[2] = {}, factor = 0.f, plain = 1.f / kQueries;
    if (of_keys) {
        ahead.keys(k, call, first_tile * kKeys, call.samples - first_tile * kKeys);
        {
            OfColumns::Ahead<T, QueryTile> of_queries;
            of_queries.queries(params.q, call, unit, params.drawn);
            of_queries.store<false>(shared.queries, nullptr, kDrawn);
        }
        OfColumns::clear_rest(shared.queries);
        const int parts = params.row_splits * kKeyParts;
        merge_sums(shared, params.sums + static_cast<i64>(unit) * parts * (kDrawn * 3), parts);
        for (int i = thread_index(); i < kColumns; i += kThreads) shared.center[i] = params.center[unit * kColumns + i];
        __syncthreads();
        const int place = block_row + lane / 4;
        rows.find(params.drawn, place, {params.band_low, params.band_high, call.seqlen_k}, params.near);
        lse[0] = shared.lse[place];
        lse[1] = shared.lse[place + 8];
        float all = 0.f;  // weights of all keys that are not exact
#pragma unroll 16
        for (int row = 0; row < kDrawn; ++row) all += shared.reduced[row];
        factor = all > 0.f ? 1.f / all : 0.f;
        plain = (all > 0.f ? kPlainPart : 1.f) / call.samples;
    } else {
        ahead.queries(params.q, call, unit, params.queries + first_tile * kKeys);
        for (int i = thread_index(); i < 2 * kRowWarps * kKeys; i += kThreads) {
            shared.received[i / kKeys / kRowWarps][i / kKeys % kRowWarps][i % kKeys] = 0.f;
        }
    }
    const u32 queries = left_address<bf16>(shared.queries, block_row, lane);
    const int row_column = quarter / kHalves * kSide + warp / kAcrossWarps * 32;
    const int column = quarter % kHalves * kSide + warp % kAcrossWarps * kAcross;
    const bool multiplies = warp < kSideWarps * kAcrossWarps;
    Square square = {};
    for (int tile = first_tile; tile <= last_tile; ++tile) {
        const int now = (tile - first_tile) % 2;
        const bool loads = tile < last_tile, follows = tile > first_tile;
        if (loads) {
            if (of_keys) {
                ahead.store<true>(shared.keys[now], shared.center, call.samples - tile * kKeys);
            } else {
                ahead.store<false>(shared.keys[now], nullptr, kKeys);
            }
        }
        if (follows && thread_index() < kKeys) {
            float weight = 0.f;
#pragma unroll
            for (int i = 0; i < kRowWarps; ++i) weight += shared.received[!now][i][thread_index()];
            shared.root[thread_index()] = Traits<bf16>::from_float(sqrtf(fmaf(weight, factor, plain)));
        }
        __syncthreads();  // the tile is there, and the weights of the one before
        if (loads) {
            if (of_keys) {
                const int next = (tile + 1) * kKeys;
                ahead.keys(k, call, next, tile + 1 < last_tile ? call.samples - next : 0);
                float scores[kKeyTiles][4] = {};
                OwnKeys own;
                own.find(call, tile * kKeys + part * kPartKeys, lane);
                OfColumns::score(scores, queries, shared.keys[now], part, rows, own, lane, params.scale);
                receive(shared.received[now][warp % kRowWarps], scores, rows, own, lse, params.sinks, part, lane);
            } else if (tile + 1 < last_tile) {
                ahead.queries(params.q, call, unit, params.queries + (tile + 1) * kKeys);
            }
        }
        if (follows && multiplies) {
            multiply_columns(square, shared.keys[!now], shared.root, row_column, column, lane);
        }
        __syncthreads();  // every warp is done with the tile before
    }
    if (!multiplies) return;
    float* out = (of_keys ? params.of_keys : params.of_queries) +
                 (static_cast<i64>(unit) * splits + split) * (kColumns * kColumns);
#pragma unroll
    for (int mt = 0; mt < 2; ++mt) {
#pragma unroll
        for (int nt = 0; nt < kAcross / 8; ++nt) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float* to = out + (row_column + mt * 16 + i * 8 + lane / 4) * kColumns + column + nt * 8 + lane % 4 * 2;
                *reinterpret_cast<Two<float>*>(to) = {{square[mt][nt][i * 2], square[mt][nt][i * 2 + 1]}};
            }
        }
    }
}
