// Attention forward for sm_80 and newer: exact; DistrAttention with Khat made in shared memory; and with the columns of
// each block that have the most energy.
// One thread block per tile of BLOCK_M queries of one head; K and V stream through in tiles of TILE_K keys. Where that
// leaves multiprocessors idle, the keys of a tile are shared by several thread blocks, and smxx_merge_splits.cu merges
// what they found. Few queries of heads with the same keys may be packed into one tile.
//
// Constants, defined by the plan (see plan.py for how they are chosen):
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K; HEAD_DIM_V columns of V
//   GROUP       0 exact; otherwise columns per group, and K comes transposed as (batch, heads_kv, HEAD_DIM, key_columns)
//   FUSE_IN_SHARED  0: the columns of a group are summed on the way from shared memory to the product, by every warp; 1:
//               in shared memory, once for all warps; 2: the same a step ahead, beside the product of the tile before
//   MEAN        1: a group is represented by the mean of its Q columns instead of its first
//   WEIGHTED    1: by their weighted mean, and columns of K are summed with weights too
//   HALF        1: with FUSE_IN_SHARED 1 or 2, of bfloat16: K comes in float16, unless params.wide says otherwise; see
//               smxx_lsh_prepare.cu
//   KEEP        0, or with GROUP 1: the first KEEP columns of the permutation are multiplied, and for the others the
//               means of Q's columns stand in the place of Q
//   BLOCK_M     queries per thread block; TILE_K keys per step; ROW_TILES 16-row tiles per warp
//   ALIGNED     1: every row of q, k and v starts on 16 bytes
//   SCORE       0: score_scale > 0 is all; 1: softcap, or a scale that is not positive
//   RANKED      1: heads differ in the columns of Q and K that count, and may leave keys exact, see AttentionParams;
//               not with GROUP
//   KEPT        1: with GROUP, some keys are exact, see AttentionParams; they come first, EXACT_TILE_K of them per step
//   SPLIT       float32 by three TF32 products, if not 0: so many steps of scores are added up by tensor cores alone
//   VALUE_STAGES  tiles of V: with 2, the next one is copied while this one is multiplied
//   SHARE_KEYS  1: thread blocks may share the keys of a tile; in large tiles this costs registers that they do not have
//   SHARED_BYTES  what the plan reserves
#include "tile/fuse.cuh"
#include "tile/mask.cuh"
#include "tile/product.cuh"
#include "tile/softmax.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements. Queries see keys from query + band_low to query + band_high.
struct AttentionParams {
    const T* q;
    const T* k;
    const T* v;
    T* out;
    float* lse;             // (splits, batch, heads, seqlen_q), contiguous; null if not wanted
    float* partial;         // (splits, batch, heads, seqlen_q, HEAD_DIM_V), contiguous: takes the place of out
    const u8* permutation;  // (batch, heads, group_blocks, HEAD_DIM), contiguous
#if HALF
    const i32* wide;  // not zero: Q or K has numbers that float16 has not, and K is as it was
#endif
#if WEIGHTED || KEEP
    const float* weights;   // the same shape: of the columns in this order, weights for K, or the means of Q
#endif
#if WEIGHTED
    const float* shares;    // the same shape: weights for Q
#endif
#if KEPT
    const T* exact_k;    // (batch, heads_kv, seqlen, HEAD_DIM): k is the transposed one
    const float* shift;  // (batch, heads, seqlen_q), contiguous: what scores of Qhat and Khat lack; null for nothing
    i64 exact_k_batch, exact_k_head, exact_k_row;
#endif
#if RANKED
    const T* qhat;     // in the place of q and k for heads of fewer than HEAD_DIM columns
    const T* khat;
    const i32* ranks;  // (batch, heads), contiguous: the columns that count, multiples of 16 from 0 on, or HEAD_DIM
    const float* shift;  // (batch, heads, seqlen_q), contiguous: what scores of Qhat and Khat lack; null for nothing
    i64 qhat_batch, qhat_head, qhat_row;
    i64 khat_batch, khat_head, khat_row;
#endif
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i64 v_batch, v_head, v_row;
    i64 out_batch, out_head, out_row;
#if RANKED || KEPT
    Passes passes;
#else
    i64 band_low, band_high;
#endif
    i64 split_rows;         // batch * heads * seqlen_q, if there are several splits
    // With packed query heads, heads and rows are those of the packed matrix: row = head * queries + query.
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 packed;             // query heads in one matrix of seqlen_q rows; more than 1 where BLOCK_M is at most 64
    i32 queries;            // seqlen_q / packed
    i32 splits;             // thread blocks that share the keys of a tile
    i32 row_blocks;         // tiles of BLOCK_M that cover seqlen_q
    i32 section;            // heads, over all batches, whose tiles are taken in turn
    i32 group_blocks;       // blocks of queries with one column order
    i32 tiles_per_block;    // tiles of BLOCK_M in such a block
    i32 key_columns;        // row length of the transposed K
    i32 out_aligned;        // whether rows of out start on 16 bytes
    float scale;            // SCORE 1: applied before the softcap
    float softcap;          // SCORE 1: 0 for none
    float score_scale;      // from scores to powers of two
};

namespace {

constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kGroup = GROUP;
constexpr int kMembers = kGroup ? kGroup : 1;
constexpr int kGroups = KEEP ? KEEP : HEAD_DIM / kMembers;  // terms of a score
constexpr int kDepth = (kGroups + 15) / 16 * 16;            // the same, padded with zero columns
constexpr int kOutColumns = (HEAD_DIM_V + 15) / 16 * 16;
constexpr int kWarps = BLOCK_M / (16 * ROW_TILES);
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStepColumns = Traits<T>::kMmaDepth;
constexpr int kColumns = (HEAD_DIM + 15) / 16 * 16;         // of Q and K where they are multiplied themselves, padded
constexpr int kSteps = kDepth / kStepColumns;
constexpr int kKeyTiles = TILE_K / 8;
constexpr int kExactKeys = KEPT ? EXACT_TILE_K : TILE_K;  // per step of those that are exact
constexpr int kOutTiles = kOutColumns / 8;
constexpr int kValueStages = VALUE_STAGES;
constexpr bool kSplit = SPLIT;
constexpr bool kWide = Traits<T>::kWide;  // weights may be large for a step, so that not all maxima need be found
// Whether weights are made between products. Parts of the time if they are (one H200, 4k and 8k tokens): float16, 64
// columns 0.93, 96 columns 0.91, 128 columns 0.97 to 0.98, 160 to 256 columns 0.89 to 0.93; bfloat16, 64 columns 0.96, 96
// columns 0.98, 128 columns 1.02, more 1.00. In groups it is up to 5% slower.
constexpr bool kBeside = sizeof(T) == 2 && !GROUP && !RANKED && (!kWide || HEAD_DIM_V <= 96);
// Whether float16 asks first if any maximum of the warp moves. Then nothing stands between exponentials and products with
// values, which go side by side. Parts of the time if it does (one H200, 2k to 8k tokens): exact attention and groups of
// 96 and 128 columns 0.94 to 0.99, groups of 256 columns 0.90 to 0.92; of 64 columns 1.01 to 1.02.
constexpr bool kVotes = !kWide && HEAD_DIM_V > 64;
typedef OnlineSoftmax<ROW_TILES, kWide && GROUP <= 8 && !kBeside> Softmax;  // of the others some would spill
constexpr bool kShareKeys = SHARE_KEYS;
constexpr bool kWeighted = WEIGHTED;
constexpr bool kPasses = RANKED || KEPT;
constexpr bool kLacks = WEIGHTED || KEEP;  // of KEPT: whether scores of groups may lack what params.shift has
constexpr bool kSmall = BLOCK_M <= 64;  // tiles of few queries: heads may be packed, and warps may have nothing to do
// How the keys come to the product: as they are; summed on the way from shared memory, which 16-bit types can; summed
// within shared memory first, before the product or a tile ahead of it; or some columns as they are, the others summed
// to one number for each key.
enum Fusion { kExact, kOnTheWay, kInShared, kAhead, kKept };
constexpr Fusion kFusions[] = {kOnTheWay, kInShared, kAhead};
constexpr Fusion kFusion = !kGroup ? kExact : KEEP ? kKept : kFusions[FUSE_IN_SHARED];
// Whether a warp takes no weights, and no product with values, of a tile of keys behind all that it sees: with a head_dim of
// 64, whose tiles are long. With 128 columns ptxas would give up more in every tile than that saves.
constexpr bool kHides = kFusion == kAhead && kWide && TILE_K > 64 && TILE_K < BLOCK_M;
static_assert(kFusion != kOnTheWay || (sizeof(T) == 2 && !kWeighted), "these are fused in shared memory");
static_assert(!HALF || (FUSE_IN_SHARED && DTYPE == 1 && !kWeighted), "float16 sums are of bfloat16 columns");
static_assert(kFusion != kAhead || (sizeof(T) == 2 && !kWeighted), "no registers for these sums beside the product");
static_assert(kFusion != kAhead || kThreads >= 128, "a slice for a step");
static_assert(kFusion != kAhead || (!kSmall && ALIGNED), "every warp has a product, and copies are in order");
static_assert(!KEEP || (kGroup == 1 && KEEP % 16 == 0 && KEEP < HEAD_DIM), "whole matrix instructions, and a rest");
static_assert(HEAD_DIM % kMembers == 0 && kGroups % 8 == 0, "a group size must leave a multiple of 8 columns");
static_assert(!RANKED || !kGroup, "ranks are for products of columns, not of groups");
static_assert(!KEPT || kGroup, "without groups all keys are exact");
static_assert(BLOCK_M % (16 * ROW_TILES) == 0 && TILE_K % 16 == 0, "tiles are made of 16-row matrix instructions");

typedef SharedTile<T, BLOCK_M, kDepth> QueryTile;
typedef SharedTile<T, TILE_K, kOutColumns> ValueTile;
typedef SharedTile<T, BLOCK_M, kOutColumns> OutTile;

// Exact: all columns of Q and K.
typedef SharedTile<T, BLOCK_M, kColumns> PlainQueryTile;
typedef SharedTile<T, kExactKeys, kColumns> PlainKeyTile;
typedef SharedTile<T, kExactKeys, kOutColumns> PlainValueTile;

// Grouped: the transposed K, and perhaps its fused Khat, (columns, keys). A pad of 8 is one chunk for 16-bit types;
// float32 lanes read single elements of four rows, which a pitch of 8 words modulo 32 keeps in different banks.
typedef SharedTile<T, KEEP ? HEAD_DIM : kMembers * kDepth, TILE_K, 8> RawKeyTile;
typedef SharedTile<T, kDepth, TILE_K, 8> FusedKeyTile;

// The weights of the rows of the transposed K tile.
template <bool kSome>
struct RowWeights {
    T weight[kMembers * kDepth];
};
template <>
struct RowWeights<false> {
    static constexpr const T* weight = nullptr;
};

template <Fusion kHow>
struct LoopShared {
    QueryTile q;
    RawKeyTile k;
    ValueTile v[kValueStages];
    const T* key_row[kMembers * kDepth];  // where each row of the tile comes from in the transposed K
};
template <>
struct LoopShared<kInShared> : RowWeights<kWeighted> {
    QueryTile q;
    RawKeyTile k;
    FusedKeyTile khat;
    ValueTile v[kValueStages];
    const T* key_row[kMembers * kDepth];
};
template <>
struct LoopShared<kAhead> {
    QueryTile q;
    RawKeyTile k;
    FusedKeyTile khat[2];  // of this tile and of the next
    ValueTile v[kValueStages];
    u32 key_chunk[kDepth][kMembers];  // where the rows of a group begin in the transposed K, in chunks
};
template <>
struct LoopShared<kKept> {
    QueryTile q;
    RawKeyTile k;
    ValueTile v[kValueStages];
    const T* key_row[HEAD_DIM];
    float mean[HEAD_DIM - KEEP];  // of the columns that are not kept
    float sum[TILE_K];            // of their part in the scores of each key
};
template <>
struct LoopShared<kExact> {
    PlainQueryTile q;
    PlainKeyTile k;
    PlainValueTile v[kValueStages];
};
union SharedStorage {
    LoopShared<kFusion> loop;
#if KEPT
    LoopShared<kExact> exact;  // of the loop before
#endif
    OutTile out;
};
DEVICE LoopShared<kFusion>& of_loop(SharedStorage& storage, LoopShared<kFusion>*) { return storage.loop; }
#if KEPT
DEVICE LoopShared<kExact>& of_loop(SharedStorage& storage, LoopShared<kExact>*) { return storage.exact; }
#endif

// The keys that stay exact, where nothing else lies: behind the columns of the first query.
template <class Queries>
DEVICE KeyRange& near_keys(Queries& q) {
    static_assert((Queries::kPitch - Queries::kColumns) * sizeof(T) >= sizeof(KeyRange), "a row has a pad");
    return *reinterpret_cast<KeyRange*>(&q.at(0, Queries::kColumns));
}
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// Rows of the transposed K tile in (member, group) order, so that the members of a group lie a constant apart and
// neighbouring groups side by side: the permutation costs an address per row, and fusion reads whole rows. Groups that
// only pad the sum to whole matrix instructions have the first row, which is not read. Where columns are kept, all rows
// lie in the order of the permutation.
template <class Shared>
DEVICE void find_key_rows(Shared& shared, const T* k, i64 row_stride, const u8* permutation, const float* weights,
                          int thread) {
    if constexpr (kFusion == kAhead) {
        for (int row = thread; row < kMembers * kDepth; row += kThreads) {
            const int group = row / kMembers;
            const int column = group < kGroups ? permutation[row] : 0;
            shared.key_chunk[group][row % kMembers] = static_cast<u32>(column * (row_stride / kElements));
        }
    } else if constexpr (KEEP) {
        for (int row = thread; row < HEAD_DIM; row += kThreads) {
            shared.key_row[row] = k + permutation[row] * row_stride;
            if (row >= KEEP) shared.mean[row - KEEP] = weights[row];
        }
    } else {
        for (int row = thread; row < kMembers * kDepth; row += kThreads) {
            const int group = row % kDepth;
            shared.key_row[row] = k + (group < kGroups ? permutation[group * kMembers + row / kDepth] : 0) * row_stride;
            if constexpr (kWeighted) {
                const float weight = group < kGroups ? weights[group * kMembers + row / kDepth] : 0.f;
                shared.weight[row] = Traits<T>::from_float(weight);
            }
        }
    }
}

// Whether Qhat and Khat have to be T; else they are float16.
DEVICE bool is_wide(const AttentionParams& params) {
#if HALF
    return *params.wide != 0;
#else
    return true;
#endif
}

constexpr int kUsed = MEAN ? kMembers : 1;  // columns of Q that stand for a group

// What stands for a group in a row, or the zero that pads the sum. wide: whether it has to be T.
DEVICE T representative(const T (&columns)[kUsed], bool padding, bool wide) {
    T value = columns[0];
    if constexpr (MEAN) {
        float total = 0.f;
#pragma unroll
        for (int member = 0; member < kUsed; ++member) total += Traits<T>::to_float(columns[member]);
        value = Traits<T>::from_float(total * (1.f / kMembers));
    }
    if (padding) value = Traits<T>::from_float(0.f);
#if HALF
    if (!wide) value.bits = float_to_f16(Traits<T>::to_float(value));
#endif
    return value;
}

// Qhat: one column per group, sampled or averaged. Padding becomes zero. wide: whether it has to be T.
template <class Shared>
DEVICE void gather_queries(Shared& shared, const T* q, i64 row_stride, int rows, const u8* permutation,
                           const float* weights, const float* shares, bool wide, int thread) {
    for (int i = thread; i < BLOCK_M * kDepth; i += kThreads) {
        const int row = i / kDepth;
        const int group = i % kDepth;
        const bool valid = row < rows && group < kGroups;
        T value = Traits<T>::from_float(0.f);
        if (valid) {
            const T* source = q + row * row_stride;
            const u8* columns = permutation + group * kMembers;
            if constexpr (kWeighted) {
                float total = 0.f;
                float square = 0.f;
#pragma unroll
                for (int member = 0; member < kMembers; ++member) {
                    const float share = shares[group * kMembers + member];
                    total = fmaf(share, Traits<T>::to_float(source[columns[member]]), total);
                    square = fmaf(share, weights[group * kMembers + member], square);
                }
                value = Traits<T>::from_float(total / square);
            } else {
                T members[kUsed];
#pragma unroll
                for (int member = 0; member < kUsed; ++member) members[member] = source[columns[member]];
                value = representative(members, false, wide);
            }
        }
        shared.q.at(row, group) = value;
    }
}

// Whether gather_rows makes Qhat. gather_queries looks a column up before every element: an LSH(2) call of 128 columns took
// 9.8% longer under a causal mask of 4096 keys, 4.5% without (one H200). Of other groups ptxas would spill.
constexpr bool kGatherRows = !KEEP && !kWeighted && kMembers <= 4;

// The same: a thread has one group, or few, of many rows, and reads several of these at once.
template <class Shared>
DEVICE void gather_rows(Shared& shared, const T* q, i64 row_stride, int rows, const u8* permutation, bool wide, int thread) {
    constexpr int kAcross = kDepth < kThreads ? kDepth : kThreads;
    constexpr int kDown = kThreads / kAcross;
    // What these two do to the loop over keys, by way of ptxas, decides: up to 2% of the time.
    constexpr bool kClamp = HEAD_DIM > 64;  // whether rows beyond the last are read as the last, or are zeros
    constexpr int kAtOnce = (kClamp ? 12 : 20) / kUsed;
    if (thread >= kAcross * kDown) return;
#pragma unroll
    for (int first = 0; first < kDepth; first += kAcross) {
        const int group = first + thread % kAcross;
        if (group >= kDepth) return;
        const T* columns[kUsed];
#pragma unroll
        for (int member = 0; member < kUsed; ++member) {
            columns[member] = q + permutation[min(group, kGroups - 1) * kMembers + member];
        }
#pragma unroll 1
        for (int start = thread / kAcross; start < BLOCK_M; start += kDown * kAtOnce) {
            T values[kAtOnce][kUsed];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = start + i * kDown;
                const i64 place = (kClamp ? min(row, rows - 1) : row) * row_stride;
#pragma unroll
                for (int member = 0; member < kUsed; ++member) {
                    values[i][member] = Traits<T>::from_float(0.f);
                    if (kClamp || row < rows) values[i][member] = columns[member][place];
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int row = start + i * kDown;
                const T value = representative(values[i], group >= kGroups, wide);
                if (BLOCK_M % (kDown * kAtOnce) == 0 || row < BLOCK_M) shared.q.at(row, group) = value;
            }
        }
    }
}

// Whether PickQueries does where there is room. Parts of the time if it does (one H200, 4k tokens, full, causal): float16 of
// 64 columns, LSH(2) 0.98, 0.94, LSH(4) 0.99, 0.98; bfloat16, LSH(4) 0.99, 0.98. LSH(2) of 64 columns in bfloat16 is 4% slower,
// and 128 columns up to 4%, because ptxas makes another loop over keys of them.
constexpr bool kStages = HEAD_DIM_V <= 64 && (!kWide || kMembers > 2);

// The same from rows in shared memory, which were copied while the groups were looked up. A thread has two groups that are
// neighbours, of many rows.
struct PickQueries {
    static constexpr int kAcross = kDepth / 2;
    static constexpr int kDown = kThreads / kAcross;

    int columns[2][kUsed];

    DEVICE explicit PickQueries(const u8* permutation) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int group = thread_index() % kAcross * 2 + i;
#pragma unroll
            for (int member = 0; member < kUsed; ++member) {
                columns[i][member] = permutation[min(group, kGroups - 1) * kMembers + member];
            }
        }
    }

    DEVICE T one(const PlainQueryTile& rows, int row, int i, bool wide) const {
        T members[kUsed];
#pragma unroll
        for (int member = 0; member < kUsed; ++member) members[member] = (&rows.at(row, 0))[columns[i][member]];
        const bool padding = kGroups < kDepth && thread_index() % kAcross * 2 + i >= kGroups;
        return representative(members, padding, wide);
    }

    template <class Queries>
    DEVICE void run(Queries& q, const PlainQueryTile& rows, bool wide) const {
        const int thread = thread_index();
        if (thread >= kAcross * kDown) return;
#pragma unroll 4
        for (int row = thread / kAcross; row < BLOCK_M; row += kDown) {
            const Two<T> both = {{one(rows, row, 0, wide), one(rows, row, 1, wide)}};
            *reinterpret_cast<Two<T>*>(&q.at(row, thread % kAcross * 2)) = both;
        }
    }
};

// A tile of the transposed K: keys [key, key + TILE_K) of every column, columns in the block's order.
template <class Shared>
DEVICE void copy_transposed_keys(Shared& shared, int key, int key_columns, int thread) {
    typedef CopyShape<kThreads, TILE_K / kElements> Shape;
    const int first_row = thread / Shape::kAcross;
    const int column = thread % Shape::kAcross * kElements;
    T* to = &shared.k.at(first_row, column);
    const u32 to_address = shared_address(to);
#pragma unroll
    for (int row = 0; row < RawKeyTile::kRows; row += Shape::kRowsPerPass) {
        const bool row_inside = RawKeyTile::kRows % Shape::kRowsPerPass == 0 || first_row + row < RawKeyTile::kRows;
        if (!row_inside) continue;
        const bool padding = kGroups < kDepth && (first_row + row) % kDepth >= kGroups;
        const T* source = shared.key_row[first_row + row] + (key + column);
#pragma unroll
        for (int pass = 0; pass < Shape::kPassesAcross; ++pass) {
            const int offset = pass * Shape::kAcross * kElements;
            const bool valid = !padding && key + column + offset < key_columns;
            if (column + offset < TILE_K) {
                copy_chunk<true>(to, to_address, row * RawKeyTile::kPitch + offset, source + offset, valid);
            }
        }
    }
}

// A thread's part in making Khat, in slices of rows, beside the product of another tile of keys. It copies what it sums,
// so that it waits for its own copies alone, and starts the next ones when it has read these. kHalves: see sum_halves.
template <bool kHalves>
struct MakeKhat {
    typedef CopyShape<kThreads, TILE_K / kElements> Shape;
    static constexpr int kRows = Shape::kRowsPerPass;
    static constexpr int kSlices = (kDepth + kRows - 1) / kRows;
    static constexpr int kAcross = Shape::kAcross * kElements;
    static constexpr bool kUnroll = true;
    static constexpr int kTogether = TILE_K == 64 ? 4 : 2;  // longer tiles have no registers for more
    static constexpr bool kReadAhead = TILE_K > 16 && TILE_K <= 64;

    LoopShared<kAhead>& shared;
    const Chunk* from;  // where its first chunk of the next raw keys would be in column 0 of K
    T* raw;         // its first chunk of raw keys
    T* khat;        // and of Khat
    int row, column, columns_left;
    u32 places[kMembers];
    Chunk chunks[Shape::kPassesAcross][kMembers];

    // Of a tile of keys into one of the two of Khat; copies are for the tile that begins with a key, if it is wanted.
    DEVICE MakeKhat(LoopShared<kAhead>& shared, int which, const T* k, int key, int key_columns, bool wanted)
        : shared(shared) {
        row = thread_index() / Shape::kAcross;
        column = thread_index() % Shape::kAcross * kElements;
        raw = &shared.k.at(row, column);
        khat = &shared.khat[which].at(row, column);
        from = reinterpret_cast<const Chunk*>(anew(reinterpret_cast<i64>(k + (key + column))));
        columns_left = wanted ? key_columns - key - column : 0;
    }

    static DEVICE constexpr bool whole() { return kDepth % kRows == 0 && TILE_K % kAcross == 0; }
    DEVICE bool inside(int slice, int pass) const {
        return whole() || (row + slice * kRows < kDepth && column + pass * kAcross < TILE_K);
    }
    static DEVICE constexpr int offset(int slice, int pass) {
        return slice * kRows * RawKeyTile::kPitch + pass * kAcross;
    }

    DEVICE void copy(int slice) const {
        const u32 to = shared_address(raw);
        const bool padding = kGroups < kDepth && row + slice * kRows >= kGroups;
#pragma unroll
        for (int member = 0; member < kMembers; ++member) {
            const Chunk* source = from + places[member];
#pragma unroll
            for (int pass = 0; pass < Shape::kPassesAcross; ++pass) {
                if (!inside(slice, pass)) continue;
                const int place = offset(slice, pass) + member * kDepth * RawKeyTile::kPitch;
                const bool valid = !padding && pass * kAcross < columns_left;
                cp_async_chunk(to + place * int(sizeof(T)), source + pass * Shape::kAcross, valid);
            }
        }
    }

    DEVICE void find(int slice) {
        const int group = kDepth % kRows == 0 ? row + slice * kRows : min(row + slice * kRows, kDepth - 1);
#pragma unroll
        for (int member = 0; member < kMembers; ++member) places[member] = shared.key_chunk[group][member];
    }

    DEVICE void read(int slice) {
        find(slice);
#pragma unroll
        for (int pass = 0; pass < Shape::kPassesAcross; ++pass) {
            if (!inside(slice, pass)) continue;
#pragma unroll
            for (int member = 0; member < kMembers; ++member) {
                const int place = offset(slice, pass) + member * kDepth * RawKeyTile::kPitch;
                chunks[pass][member] = *reinterpret_cast<const Chunk*>(raw + place);
            }
        }
    }

    DEVICE void sum(int slice) const {
#pragma unroll
        for (int pass = 0; pass < Shape::kPassesAcross; ++pass) {
            if (!inside(slice, pass)) continue;
            Chunk& to = *reinterpret_cast<Chunk*>(khat + offset(slice, pass));
            to = kHalves ? sum_halves(chunks[pass]) : sum_chunks<T>(chunks[pass]);
        }
    }

    // After one of the products of a step. What is read is used a step later.
    DEVICE void run(int step, int pair) {
        if (pair == 0 && step < kSlices) {
            if (!kReadAhead) read(step);
            sum(step);
            copy(step);
        }
        if (kReadAhead && pair == (kMembers > 2 ? kTogether - 1 : 1) && step + 1 < kSlices) read(step + 1);
    }
    DEVICE void all() {
        // Behind exact keys the output has its registers already.
#pragma unroll(KEPT ? 1 : kSlices)
        for (int slice = 0; slice < kSlices; ++slice) {
            read(slice);
            sum(slice);
            copy(slice);
        }
    }
};

typedef RowCopy<ALIGNED, kThreads, HEAD_DIM, T, PlainQueryTile> QueryCopy;
typedef RowCopy<ALIGNED, kThreads, HEAD_DIM, T, PlainKeyTile> KeyCopy;

// The first of this lane's accumulator rows.
DEVICE int own_row() {
    const int thread = thread_index();
    return thread / kWarpSize * 16 * ROW_TILES + thread % kWarpSize / 4;
}

// Where a thread block stands.
struct Place {
    int row_block, split, batch_head, batch, head, first_row, rows;

    // Heads of a section take turns, the last rows first: under a causal mask they have the most keys, and short blocks fill
    // the tail.
    DEVICE explicit Place(const AttentionParams& params) {
        const u32 tile = block_index();
        row_block = params.row_blocks - 1 - tile / params.section;
        // What this does to the loop over keys, by way of ptxas, decides: 3% less or more of the time.
        if constexpr (!kHides) row_block = anew(row_block);
        batch_head = block_index_y() * params.section + tile % params.section;
        split = kShareKeys ? block_index_z() : 0;
        batch = batch_head / params.heads;
        head = batch_head % params.heads;
        first_row = row_block * BLOCK_M;
        rows = min(BLOCK_M, params.seqlen_q - first_row);
    }

    // The first and the last query among the rows. A tile of packed heads is taken for one with all queries.
    DEVICE int first_query(const AttentionParams& params) const {
        return kSmall && params.packed > 1 ? 0 : first_row;
    }
    DEVICE int last_query(const AttentionParams& params) const {
        return kSmall && params.packed > 1 ? params.queries - 1 : first_row + rows - 1;
    }

    // Where a row of the tile goes in the results of all splits.
    DEVICE i64 result_row(const AttentionParams& params, int row) const {
        const i64 result_row = static_cast<i64>(batch_head) * params.seqlen_q + first_row + row;
        return kShareKeys ? split * params.split_rows + result_row : result_row;
    }

    DEVICE T* out_row(const AttentionParams& params, int row) const {
        T* out = params.out + batch * params.out_batch;
        if (kSmall && params.packed > 1) {
            const int in_head = (first_row + row) / params.queries;
            const int query = first_row + row - in_head * params.queries;
            return out + (head * params.packed + in_head) * params.out_head + query * params.out_row;
        }
        return out + head * params.out_head + (first_row + row) * params.out_row;
    }
};

// Where a thread stands in it, with the first row of its warp; and whether Qhat and Khat have to be T.
struct Position {
    int thread, lane, warp_row;
    Place place;
    bool wide;

    DEVICE explicit Position(const AttentionParams& params)
        : thread(thread_index()),
          lane(thread % kWarpSize),
          warp_row(thread / kWarpSize * 16 * ROW_TILES),
          place(params),
          wide(is_wide(params)) {}
};

#if RANKED || KEPT
// What the scores of a row lack that are products of Qhat and Khat.
DEVICE float lacking(const AttentionParams& params, const Place& place, int row) {
    if (!params.shift || row >= place.rows) return 0.f;
    return params.shift[static_cast<i64>(place.batch_head) * params.seqlen_q + place.first_row + row];
}

// Turns maxima of scores of Q and K into those of scores of Qhat and Khat, which only a constant of each row sets apart.
DEVICE void subtract_lacking(const AttentionParams& params, const Place& place, Softmax& softmax) {
#pragma unroll
    for (int mt = 0; mt < ROW_TILES; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float natural = lacking(params, place, own_row() + mt * 16 + half * 8);
            softmax.maximum[mt][half] -= natural * 1.4426950409f;
        }
    }
}
#endif

// Normalises the output, and stores it and the lse. What a split found is stored as it stands in registers: four lanes
// fill a sector of 32 bytes. Everything is derived anew here, see thread_index.
DEVICE void store_output(const AttentionParams& params, OutTile& out_tile,
                         const float (&output)[ROW_TILES][kOutTiles][4], const Softmax& softmax) {
    const Place place(params);
    const int thread = thread_index();
    const int lane = thread % kWarpSize;
#pragma unroll
    for (int mt = 0; mt < ROW_TILES; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = softmax.sum[mt][half];
            const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // a row without keys is zero
            const int row = own_row() + mt * 16 + half * 8;
            const i64 result_row = place.result_row(params, row);
            float* partial = params.partial + result_row * HEAD_DIM_V;
#pragma unroll
            for (int nt = 0; nt < kOutTiles; ++nt) {
                const float low = output[mt][nt][half * 2] * inverse;
                const float high = output[mt][nt][half * 2 + 1] * inverse;
                const int column = nt * 8 + lane % 4 * 2;
                if (kShareKeys && params.partial) {
                    if (row < place.rows && nt * 8 < HEAD_DIM_V) {
                        partial[column] = low;
                        partial[column + 1] = high;
                    }
                } else {
                    T* target = &out_tile.at(row, column);
                    target[0] = Traits<T>::from_float(low);
                    target[1] = Traits<T>::from_float(high);
                }
            }
            if (params.lse && lane % 4 == 0 && row < place.rows) {
                float log_sum = fmaf(softmax.maximum[mt][half], 0.6931471806f, logf(sum));
#if RANKED
                const bool whole = params.ranks[place.batch_head] == HEAD_DIM;
                if (params.passes.ends_reduced(whole)) log_sum += lacking(params, place, row);
#elif KEPT
                if (kLacks) log_sum += lacking(params, place, row);
#endif
                params.lse[result_row] = sum == 0.f ? -infinity() : log_sum;
            }
        }
    }
    if (kShareKeys && params.partial) return;
    __syncthreads();

    constexpr int kOutChunks = HEAD_DIM_V / kElements;
    if (params.out_aligned) {
        for (int i = thread; i < place.rows * kOutChunks; i += kThreads) {
            const int row = i / kOutChunks;
            const int column = i % kOutChunks * kElements;
            *reinterpret_cast<Chunk*>(place.out_row(params, row) + column) =
                *reinterpret_cast<const Chunk*>(&out_tile.at(row, column));
        }
    } else {
        for (int i = thread; i < place.rows * HEAD_DIM_V; i += kThreads) {
            place.out_row(params, i / HEAD_DIM_V)[i % HEAD_DIM_V] = out_tile.at(i / HEAD_DIM_V, i % HEAD_DIM_V);
        }
    }
}

// One number for each key, in all rows.
DEVICE void add_to_scores(float (&scores)[ROW_TILES][kKeyTiles][4], const float (&sums)[TILE_K], int thread) {
#pragma unroll
    for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = sums[nt * 8 + thread % 4 * 2 + i];
#pragma unroll
            for (int mt = 0; mt < ROW_TILES; ++mt) {
                scores[mt][nt][i] += sum;
                scores[mt][nt][i + 2] += sum;
            }
        }
    }
}

// All keys of a thread block's tile of queries; of KEPT those that are exact, or the others. A template, so that the branch
// not taken need not make sense. known: what the softmax knows of the tile before it begins.
template <Fusion kHow>
DEVICE void attend_keys(const AttentionParams& params, SharedStorage& storage, float (&output)[ROW_TILES][kOutTiles][4],
                        Softmax& softmax, u32 known) {
    constexpr bool kGrouped = kHow != kExact;
    // Whether queries, and the rows of K in their groups, are brought in the first pass alone, also if it has no keys. Of the
    // others ptxas would spill.
    constexpr bool kOnce = KEPT && !KEEP && ALIGNED;
    // Where ptxas would spill for reading values ahead.
    constexpr int kHold = kVotes && kGrouped && kGroup == 2 ? 1 : kGrouped || (kVotes && HEAD_DIM < HEAD_DIM_V) ? 2 : 0;
    LoopShared<kHow>& shared = of_loop(storage, static_cast<LoopShared<kHow>*>(nullptr));
    // Whether the queries come as rows, to where values will be, and their groups are picked from there.
    constexpr bool kStaged = kHow == kAhead && kStages && sizeof(PlainQueryTile) <= sizeof(shared.v);
    constexpr int kPitch = decltype(shared.q)::kPitch;
    constexpr int kKeys = kGrouped ? TILE_K : kExactKeys;
    typedef SharedTile<T, kKeys, kOutColumns> Values;
    typedef RowCopy<ALIGNED, kThreads, HEAD_DIM_V, T, Values> ValueCopy;
#if !RANKED && !KEPT
    // One pass. Found within its loop, as what follows below for several, the same would be other instructions, and some
    // groups of two would spill.
    const auto [thread, lane, warp_row, place, wide] = Position(params);
    constexpr int first_pass = 0, end_pass = 1;
    const T* q = params.q + place.batch * params.q_batch + place.head * params.q_head + place.first_row * params.q_row;
    const int head_kv = place.head / params.heads_per_kv;
    const T* k = params.k + place.batch * params.k_batch + head_kv * params.k_head;
    const i64& q_row = params.q_row;
    const i64& k_row = params.k_row;
    constexpr int columns = kGrouped ? kDepth : kColumns;
    const T* v = params.v + place.batch * params.v_batch + head_kv * params.v_head;
#endif
    if constexpr (!KEPT || !kGrouped) {  // else there are exact keys before
#pragma unroll
        for (int mt = 0; mt < ROW_TILES; ++mt) {
#pragma unroll
            for (int nt = 0; nt < kOutTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[mt][nt][i] = 0.f;
            }
        }
        softmax.clear();
    }
    if (kOnce && kGrouped) __syncthreads();  // the queries of exact keys, of which there may be none, have landed
#if RANKED || KEPT
    // Found by one thread: the others have no registers for it. Behind the barrier every warp is done with the loop before.
    if (thread_index() == 0) near_keys(shared.q) = params.passes.near.of(Place(params).first_row, params.seqlen_k);
    __syncthreads();
#endif
#if RANKED
    const bool whole = params.ranks[Place(params).batch_head] == HEAD_DIM;
    const int first_pass = params.passes.begin(whole);
    const int end_pass = params.passes.after(whole);
#elif KEPT
    const int first_pass = kGrouped ? params.passes.exact : 0;
    const int end_pass = kGrouped ? params.passes.count : params.passes.exact;
    if (kLacks && kGrouped) subtract_lacking(params, Place(params), softmax);
#endif

    for (int pass = first_pass; pass < end_pass; ++pass) {
#if RANKED || KEPT
        // Found anew for every pass, rather than held in registers.
        const auto [thread, lane, warp_row, place, wide] = Position(params);
        const int head_kv = place.head / params.heads_per_kv;
        const T* q = params.q + place.batch * params.q_batch + place.head * params.q_head;
        const T* k = params.k + place.batch * params.k_batch + head_kv * params.k_head;
        i64 q_row = params.q_row, k_row = params.k_row;
        int columns = kGrouped ? kDepth : kColumns;
#if RANKED
        const bool reduced = params.passes.reduced(pass);
        if (pass == params.passes.exact) subtract_lacking(params, place, softmax);
        if (reduced) {
            columns = params.ranks[place.batch_head];
            q = params.qhat + place.batch * params.qhat_batch + place.head * params.qhat_head;
            k = params.khat + place.batch * params.khat_batch + head_kv * params.khat_head;
            q_row = params.qhat_row;
            k_row = params.khat_row;
        }
#else
        if constexpr (!kGrouped) {
            k = params.exact_k + place.batch * params.exact_k_batch + head_kv * params.exact_k_head;
            k_row = params.exact_k_row;
        }
#endif
        if (pass > first_pass) {
            cp_async_wait<0>();
            __syncthreads();  // every warp is done with the last tile
        }
        q += place.first_row * q_row;
        const T* v = params.v + place.batch * params.v_batch + head_kv * params.v_head;
        const CutBand band = params.passes.band(pass, near_keys(shared.q));
#else
        const Band band = {params.band_low, params.band_high, params.seqlen_k};
#endif

        // Keys that any row of this tile sees, and, of those, the span that every row sees whole.
        const int first_query = place.first_query(params);
        const int last_query = place.last_query(params);
        const int first_key = band.first_key(first_query);
        const int last_key = band.last_key(last_query);
        const int first_common = band.first_key(last_query);
        const int last_common = band.last_key(first_query);
        int first_tile = first_key / kKeys;
        int tile = last_key < first_key ? first_tile - 1 : last_key / kKeys;
        if constexpr (kShareKeys) {
            const int tiles = tile - first_tile + 1;
            const int share = tiles / params.splits;
            const int larger = tiles % params.splits;  // so many of the first splits have one tile more
            first_tile += place.split * share + min(place.split, larger);
            tile = first_tile + share - (place.split < larger ? 0 : 1);
        }
        if (kPasses && tile < first_tile && (!kOnce || pass > first_pass)) continue;

        const u8* permutation = nullptr;
        const float* weights = nullptr;
        const float* shares = nullptr;
        if constexpr (kGrouped) {
            const i64 block =
                static_cast<i64>(place.batch_head) * params.group_blocks + place.row_block / params.tiles_per_block;
            permutation = params.permutation + block * HEAD_DIM;
#if WEIGHTED || KEEP
            weights = params.weights + block * HEAD_DIM;
#endif
#if WEIGHTED
            shares = params.shares + block * HEAD_DIM;
#endif
            if constexpr (kStaged) {
                if (!kOnce || pass == first_pass) {
                    QueryCopy query_copy;
                    query_copy.open(q, q_row);
                    query_copy.run(reinterpret_cast<PlainQueryTile&>(shared.v), q_row, place.rows);
                    cp_async_commit();
                }
            }
            if (!kOnce || pass == first_pass) {
                find_key_rows(shared, k, k_row, permutation, weights, thread);
                __syncthreads();
            }
        }
        // What is left of the sequence at the first tile of the loop; tiles go from the last keys to the first.
        int keys_left = params.seqlen_k - tile * kKeys;
        KeyCopy key_copy;
        ValueCopy value_copy;
        if constexpr (kGrouped) {
            if constexpr (kHow == kAhead) {
                MakeKhat<false> make(shared, 0, k, tile * kKeys, params.key_columns, tile >= first_tile);
#pragma unroll(KEPT ? 1 : MakeKhat<false>::kSlices)
                for (int slice = 0; slice < make.kSlices; ++slice) {
                    make.find(slice);
                    make.copy(slice);
                }
                cp_async_commit();
            } else if (tile >= first_tile) {
                copy_transposed_keys(shared, tile * kKeys, params.key_columns, thread);
            }
            if (!kOnce || pass == first_pass) {
                if constexpr (kStaged) {
                    const PickQueries pick(permutation);
                    cp_async_wait<1>();
                    __syncthreads();  // the rows have landed
                    pick.run(shared.q, reinterpret_cast<const PlainQueryTile&>(shared.v), wide);
                    __syncthreads();  // values may take their place
                } else if constexpr (kGatherRows) {
                    gather_rows(shared, q, q_row, place.rows, permutation, wide, thread);
                } else {
                    gather_queries(shared, q, q_row, place.rows, permutation, weights, shares, wide, thread);
                }
            }
        } else {
            key_copy.open(k + tile * (kKeys * k_row), k_row);
            if (tile >= first_tile) key_copy.run(shared.k, k_row, keys_left, columns);
            if (!kOnce || pass == first_pass) {
                QueryCopy query_copy;
                query_copy.open(q, q_row);
                query_copy.run(shared.q, q_row, place.rows, columns);
            }
        }
        value_copy.open(v + tile * (kKeys * params.v_row), params.v_row);
        if (kValueStages == 2 && tile >= first_tile) {
            value_copy.run(shared.v[tile % kValueStages], params.v_row, keys_left);
            value_copy.move(-kKeys * params.v_row);
        }
        cp_async_commit();
        if constexpr (kHow == kAhead) {
            cp_async_wait<1>();
            const int next = tile - 1;
            if (HALF && !wide) {
                MakeKhat<true>(shared, tile & 1, k, next * kKeys, params.key_columns, next >= first_tile).all();
            } else {
                MakeKhat<false>(shared, tile & 1, k, next * kKeys, params.key_columns, next >= first_tile).all();
            }
            cp_async_commit();
        }

        const u32 queries = left_address<T>(shared.q, warp_row, lane);
        const bool idle = kSmall && warp_row >= place.rows;  // a warp without queries copies, and leaves the products out

        for (; tile >= first_tile; --tile) {
            const int key = tile * kKeys;
            cp_async_wait<0>();
            __syncthreads();  // the keys have landed, or Khat is there, and every warp is done with the last tile
            if (KEPT) keys_left = params.seqlen_k - anew(tile) * kKeys;
            if constexpr (kValueStages == 1) {
                value_copy.run(shared.v[0], params.v_row, keys_left);
                value_copy.move(-kKeys * params.v_row);
                cp_async_commit();
            }
            keys_left = KEPT ? params.seqlen_k - anew(tile - 1) * kKeys : keys_left + kKeys;

            float scores[ROW_TILES][kKeys / 8][4] = {};
            if constexpr (kHow == kInShared) {
                if (HALF && !wide) {
                    fuse_keys<T, kMembers, kThreads, kWeighted, true>(shared.khat, shared.k, shared.weight, thread_index());
                } else {
                    fuse_keys<T, kMembers, kThreads, kWeighted>(shared.khat, shared.k, shared.weight, thread_index());
                }
                __syncthreads();  // Khat is complete, and the raw keys may be overwritten
                if (tile > first_tile) {
                    copy_transposed_keys(shared, key - kKeys, params.key_columns, thread_index());
                    if constexpr (kValueStages == 2) {
                        value_copy.run(shared.v[(tile - 1) % kValueStages], params.v_row, keys_left);
                        value_copy.move(-kKeys * params.v_row);
                    }
                }
                cp_async_commit();
                if (HALF && !wide && !idle) {
                    multiply_queries_keys<f16, SPLIT, kSteps, 1, kPitch>(scores, queries, shared.khat, lane);
                } else if (!idle) {
                    multiply_queries_keys<T, SPLIT, kSteps, 1, kPitch>(scores, queries, shared.khat, lane);
                }
                if constexpr (kValueStages == 1) {
                    cp_async_wait<1>();
                    __syncthreads();  // the values have landed, and every warp is done with Khat
                }
            } else if constexpr (kHow == kAhead) {
                const FusedKeyTile& khat = shared.khat[tile & 1];
                const bool wanted = tile - 2 >= first_tile;
                const int next = key - 2 * kKeys;
                if (HALF && !wide) {
                    MakeKhat<true> beside(shared, ~tile & 1, k, next, params.key_columns, wanted);
                    if (beside.kReadAhead) beside.read(0);
                    multiply_queries_keys<f16, SPLIT, kSteps, 1, kPitch>(scores, queries, khat, lane, kSteps, beside);
                } else {
                    MakeKhat<false> beside(shared, ~tile & 1, k, next, params.key_columns, wanted);
                    if (beside.kReadAhead) beside.read(0);
                    multiply_queries_keys<T, SPLIT, kSteps, 1, kPitch>(scores, queries, khat, lane, kSteps, beside);
                }
                if constexpr (kValueStages == 2) {
                    if (tile > first_tile) {
                        value_copy.run(shared.v[(tile - 1) % kValueStages], params.v_row, keys_left);
                        value_copy.move(-kKeys * params.v_row);
                    }
                }
                cp_async_commit();
                if constexpr (kValueStages == 1) {
                    cp_async_wait<1>();
                    __syncthreads();  // the values have landed
                }
            } else {
                if constexpr (kHow == kKept) {
                    sum_rows<KEEP, kThreads>(shared.sum, shared.k, shared.mean, thread_index());
                    __syncthreads();  // the sums are complete
                    add_to_scores(scores, shared.sum, thread_index());
                }
                if (!idle) {
                    constexpr int kMost = kGrouped ? kSteps : kColumns / kStepColumns;
                    multiply_queries_keys<T, SPLIT, kMost, kGrouped ? kGroup : 0, kPitch>(scores, queries, shared.k, lane,
                                                                                           columns / kStepColumns);
                }
                if constexpr (kValueStages == 1) cp_async_wait<0>();
                __syncthreads();  // the values have landed, and every warp is done with the keys and the queries
                if (tile > first_tile) {
                    if constexpr (kGrouped) {
                        copy_transposed_keys(shared, key - kKeys, params.key_columns, thread_index());
                    } else {
                        key_copy.move(-kKeys * k_row);
                        key_copy.run(shared.k, k_row, keys_left, columns);
                    }
                    if constexpr (kValueStages == 2) {
                        value_copy.run(shared.v[(tile - 1) % kValueStages], params.v_row, keys_left);
                        value_copy.move(-kKeys * params.v_row);
                    }
                }
                cp_async_commit();
            }

            if (idle) continue;
            if constexpr (SCORE) scale_scores(scores, params.scale, params.softcap);
            const bool cut = key < first_common || key + kKeys - 1 > last_common;
            if (cut) {
#if KEPT
                // Made again, rather than held in registers.
                const CutBand band = params.passes.band(anew(pass), near_keys(shared.q));
#endif
                if constexpr (kHides) {
                    const int last_row = thread_index() / kWarpSize * 16 * ROW_TILES + 16 * ROW_TILES - 1;
                    if (key > band.last_key(place.first_row + last_row)) continue;
                }
                const int column = thread_index() % 4 * 2;
                if (kSmall && params.packed > 1) {
                    apply_mask(scores, band, 0, key, PackedRows{place.first_row + own_row(), params.queries}, column);
                } else {
                    apply_mask(scores, band, place.first_row, key, PlainRows{own_row()}, column);
                }
            }
            float rescale[ROW_TILES][2], of_tile[ROW_TILES][2];
            softmax.begin(rescale);
            if constexpr (kWide) {
                if (softmax.raise_if_needed(scores, cut, known, params.score_scale, rescale)) softmax.apply(rescale, output);
            } else if constexpr (kVotes) {
                if (softmax.any_moves(scores, params.score_scale)) {
                    softmax.raise(scores, softmax.kAllRows, params.score_scale, rescale);
                    softmax.apply(rescale, output);
                    softmax.rescale_sum(rescale);
                }
                softmax.begin(rescale);
            } else {
                softmax.raise(scores, softmax.kAllRows, params.score_scale, rescale);
                if constexpr (kBeside) softmax.apply(rescale, output);
            }
            const Values& values = shared.v[tile % kValueStages];
            if constexpr (kBeside) {
                Softmax::Beside<kKeys / 8> beside(softmax, scores, params.score_scale);
                multiply_weights_values<T, kSplit, kHold>(output, scores, values, lane, beside);
                beside.end(rescale);
            } else {
                softmax.exponentiate(scores, params.score_scale, rescale, of_tile);
                if constexpr (!kWide && !kVotes) softmax.apply(rescale, output);
                multiply_weights_values<T, kSplit, kHold>(output, scores, values, lane);
            }
            if constexpr (kWide) {
                softmax.begin(rescale);
                if (softmax.follow<Traits<T>::kLarge>(softmax.sum, rescale)) {
                    softmax.rescale_sum(rescale);
                    softmax.apply(rescale, output);
                }
            }
        }
    }

    cp_async_wait<0>();
}

}  // namespace

// The 1 stops ptxas from spilling for the sake of one more thread block per multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, 1) sm80_flash_fwd(const AttentionParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    float output[ROW_TILES][kOutTiles][4];
    Softmax softmax;
    // Once; and again if in some row of the block the maximum of the first tiles, which stayed, was too low for a weight.
    u32 again = 0;
    do {
#if KEPT
        attend_keys<kExact>(params, shared, output, softmax, again | softmax.kUnsettled);
#endif
        attend_keys<kFusion>(params, shared, output, softmax, again | softmax.kUnsettled);
        if constexpr (kWide) again = again ? 0 : softmax.lost(output);
        // All threads are done with the tiles of the loop: they become those of another loop, or of the output.
        again = __syncthreads_or(again) ? again | softmax.kAgain : 0;
    } while (kWide && again);
    softmax.reduce_sums();
    store_output(params, shared.out, output, softmax);
}
