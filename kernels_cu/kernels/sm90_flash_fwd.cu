// Attention forward for sm_90a (Hopper), exact and DistrAttention: warpgroup products, and a warpgroup that only feeds
// them. A thread block takes tiles of BLOCK_M queries of one head, one after another; K and V stream through two stages
// each.
//
// Warpgroup 0 produces: one thread of it starts the copies, in the order in which they are needed, as soon as a stage
// is empty. Grouped, all of it sums the columns of each group of the transposed K, a tile ahead of its use. The others
// consume, 64 queries each. A consumer's products run while it computes: the scores of a tile are
// started together with P V of the tile before, and while that product runs, the scores become weights. Consumers take
// turns at starting products, so that one computes exponentials while another has the tensor cores.
//
// Constants, defined by the plan (see plan.py for how they are chosen):
//   DTYPE       0 float16, 1 bfloat16
//   HEAD_DIM    columns of Q and K; HEAD_DIM_V columns of V; multiples of 16
//   GROUP       0 exact; otherwise columns per group, and K comes transposed as (batch, heads_kv, HEAD_DIM, key_columns)
//   MEAN        1: a group is represented by the mean of its Q columns instead of its first
//   BLOCK_M     queries per tile: 128 or 192; TILE_K keys per step
//   SCORE       0: score_scale > 0 is all; 1: softcap, or a scale that is not positive
//   RANKED      1: heads differ in the columns of Q and K that count, and may leave keys exact, see HopperParams; not with
//               GROUP
//   SHARED_BYTES  what the plan reserves
#include "ptx/atomic.cuh"
#include "tile/fuse.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"
#include "tile/warpgroup.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements. Queries see keys from query + band_low to query + band_high.
struct HopperParams {
    TensorMap q, k, v;  // (batch, heads, seqlen, columns), boxes of a panel of QueryTile, KeyTile or RawTile, ValueTile
#if RANKED
    TensorMap qhat, khat;  // in the place of q and k for heads of fewer than HEAD_DIM columns
    const i32* ranks;      // (batch, heads), contiguous: the columns that count, multiples of 16 up to HEAD_DIM
    const float* shift;    // (batch, heads, seqlen_q), contiguous: what scores of Qhat and Khat lack; null for nothing
#endif
    T* out;
    float* lse;             // (batch, heads, seqlen_q), contiguous; null if not wanted
    const u8* permutation;  // (batch, heads, group_blocks, HEAD_DIM), contiguous; null if exact
    i32* counter;  // zero at first: tiles taken beyond the first of each block; null: every gridDim.x-th is taken
    i64 out_batch, out_head, out_row;
#if RANKED
    Passes passes;
#else
    i64 band_low, band_high;
#endif
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 row_blocks;    // tiles of BLOCK_M that cover seqlen_q
    u32 tiles;         // row_blocks of every head of every batch
    i32 section;       // heads, over all batches, whose tiles are taken in turn
    i32 group_blocks;      // blocks of queries with one column order
    i32 tiles_per_block;   // tiles of BLOCK_M in such a block
    i32 out_aligned;   // whether rows of out start on 16 bytes
    float scale;       // SCORE 1: applied before the softcap
    float softcap;     // SCORE 1: 0 for none
    float score_scale; // from scores to powers of two
};

namespace {

constexpr int kGroupRows = 64;
constexpr int kGroupThreads = 128;
constexpr int kConsumers = BLOCK_M / kGroupRows;
constexpr int kBuilderThreads = kGroupThreads - kWarpSize;
constexpr int kConsumerThreads = kConsumers * kGroupThreads;
constexpr int kThreads = kGroupThreads + kConsumerThreads;
constexpr int kStages = 2;
constexpr int kKeyTiles = TILE_K / 8;
constexpr int kOutTiles = HEAD_DIM_V / 8;
constexpr bool kGrouped = GROUP != 0;
constexpr int kMembers = kGrouped ? GROUP : 1;
constexpr int kTerms = HEAD_DIM / kMembers;  // of a score
static_assert(kConsumers == 2 || kConsumers == 3, "two or three consumers: registers are shared out for these");
static_assert(BLOCK_M % kGroupRows == 0 && TILE_K % 16 == 0, "tiles are made of warpgroup products");

// The block starts with 168 or 128 registers a thread; copying needs few, so consumers get what it gives back. Sums
// need more, for loads in flight: fewer of them where a long tile of keys takes registers from the consumers.
constexpr bool kLongTiles = TILE_K > 128;
constexpr int kProducerRegisters = kGrouped ? (kLongTiles ? 72 : 88) : RANKED && kConsumers == 2 ? 40 : kConsumers == 2 ? 24 : 32;
constexpr int kConsumerRegisters = kGrouped ? (kLongTiles ? 216 : 208) : RANKED && kConsumers == 2 ? 232 : kConsumers == 2 ? 240 : 160;
static_assert(!kGrouped || kConsumers == 2, "grouped: registers are shared out for two consumers");

// Whether exponentials are computed before the wait for the last product, while it runs, or after it, together with the
// packing of weights and the rescaling of the output, which fill each other's gaps. With three consumers, which compute
// exponentials most of the time, before is 3% faster at (64, 64) and 5% at (32, 64); with two, after is 2 to 3% faster
// (one H100, 16k tokens).
constexpr bool kEarlyWeights = kConsumers == 3;

typedef PanelTile<T, BLOCK_M, HEAD_DIM> QueryTile;
typedef PanelTile<T, TILE_K, HEAD_DIM> KeyTile;
typedef PanelTile<T, TILE_K, HEAD_DIM_V> ValueTile;
// Grouped: the transposed K, and the sums of its groups.
typedef PanelTile<T, HEAD_DIM, TILE_K> RawTile;
typedef PanelTile<T, kTerms, TILE_K> FusedTile;

constexpr u32 kValueStage = sizeof(ValueTile) / 16;  // from stage to stage, in a descriptor's units

template <bool kOfGroups>
struct KeyStorage {
    KeyTile k[kStages];
};
template <>
struct KeyStorage<true> {
    FusedTile k[kStages];
    RawTile raw[kStages];
    RingBarriers<kStages> raw_barriers;
    u8 order[HEAD_DIM];  // of the columns, for the tile of queries in q
};
struct SharedStorage {
    QueryTile q;
    ValueTile v[kStages];
    KeyStorage<kGrouped> keys;
    RingBarriers<1> q_barriers;
    RingBarriers<kStages> k_barriers, v_barriers, work_barriers;
    i32 work[kStages];  // the tile of queries after the current one
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");
static_assert(sizeof(HopperParams) % 64 == 0, "tensor maps start on 64 bytes");

// Columns of Q and K that count for a head.
DEVICE int columns_of(const HopperParams& params, int batch_head) {
#if RANKED
    return params.ranks[batch_head];
#else
    return HEAD_DIM;
#endif
}

// A tile of queries.
struct Place {
    int batch_head, batch, head, first_row;

    // Tiles are taken a section of heads after another, so that the section's K and V stay in L2, and in it the last
    // rows first: under a causal mask they have the most keys, and short tiles fill the tail.
    DEVICE Place(const HopperParams& params, u32 tile) {
        const int work = static_cast<int>(tile);
        const int of_section = params.section * params.row_blocks;
        const int first_head = work / of_section * params.section;
        const int heads = min(params.section, static_cast<int>(params.tiles) / params.row_blocks - first_head);
        const int in_section = work % of_section;
        batch_head = first_head + in_section % heads;
        batch = batch_head / params.heads;
        head = batch_head % params.heads;
        first_row = (params.row_blocks - 1 - in_section / heads) * BLOCK_M;
    }
};

// The tiles of keys that the rows of a tile of queries see within a band, from the last to the first; maybe none.
struct KeyTiles {
    int tile, first_tile;

    template <class AnyBand>
    DEVICE KeyTiles(const HopperParams& params, const Place& place, const AnyBand& band) {
        const int last_row = min(place.first_row + BLOCK_M, params.seqlen_q) - 1;
        const int first_key = band.first_key(place.first_row);
        const int last_key = band.last_key(last_row);
        first_tile = first_key / TILE_K;
        tile = last_key < first_key ? first_tile - 1 : last_key / TILE_K;
    }
    DEVICE bool inside() const { return tile >= first_tile; }
};

// All tiles of keys of a tile of queries, one after another.
#if RANKED
struct Walk {
    const HopperParams& params;
    const Place& place;
    int columns;  // of the head
    int pass;
    KeyTiles keys;

    DEVICE Walk(const HopperParams& params_, const Place& place_, int columns_)
        : params(params_), place(place_), columns(columns_), pass(params_.passes.begin(whole())), keys(tiles(pass)) {
        if (!keys.inside()) enter(following());
    }
    DEVICE bool whole() const { return columns == HEAD_DIM; }
    DEVICE int end() const { return params.passes.after(whole()); }
    DEVICE KeyTiles tiles(int of) const { return {params, place, params.passes.band(of)}; }
    DEVICE CutBand band() const { return params.passes.band(pass); }
    DEVICE bool reduced() const { return params.passes.reduced(pass); }
    // The next pass with a tile, or the end.
    DEVICE int following() const {
        int next = pass + 1;
        while (next < end() && !tiles(next).inside()) ++next;
        return next;
    }
    DEVICE void enter(int next) {
        pass = next;
        if (inside()) keys = tiles(pass);
    }
    DEVICE bool inside() const { return pass < end(); }
    DEVICE int tile() const { return keys.tile; }
    DEVICE int width() const { return reduced() ? columns : HEAD_DIM; }
    // Whether the next tile has another band, with other queries, or does not exist.
    DEVICE bool last_of_band() const { return keys.tile == keys.first_tile; }
    DEVICE bool last_of_queries() const {
        if (!last_of_band()) return false;
        const int next = following();
        return next == end() || params.passes.reduced(next) != reduced();
    }
    DEVICE bool more() const { return !last_of_band() || following() < end(); }
    // Returns whether the next tile has another band.
    DEVICE bool advance() {
        const bool other_band = last_of_band();
        if (other_band) {
            enter(following());
        } else {
            --keys.tile;
        }
        return other_band;
    }
};
#else
struct Walk {
    const HopperParams& params;
    KeyTiles keys;

    DEVICE Walk(const HopperParams& params_, const Place& place, int) : params(params_), keys(params, place, band()) {}
    DEVICE Band band() const { return {params.band_low, params.band_high, params.seqlen_k}; }
    DEVICE bool reduced() const { return false; }
    DEVICE bool inside() const { return keys.inside(); }
    DEVICE int tile() const { return keys.tile; }
    DEVICE int width() const { return HEAD_DIM; }
    DEVICE bool last_of_queries() const { return keys.tile == keys.first_tile; }
    DEVICE bool more() const { return keys.tile > keys.first_tile; }
    DEVICE bool advance() {
        --keys.tile;
        return false;
    }
};
#endif

// Starts the copy of a tile of queries, of the columns that count, from where a head has them. A branch rather than a
// pointer: the producer has few registers.
DEVICE void load_queries(const HopperParams& params, SharedStorage& shared, u32 place_number, const Place& place, u64 policy,
                         int columns) {
    const u32 barrier = shared.q_barriers.open(place_number, QueryTile::bytes(columns));
#if RANKED
    if (columns < HEAD_DIM) {
        shared.q.load(&params.qhat, barrier, place.first_row, place.head, place.batch, policy, columns);
        return;
    }
#endif
    shared.q.load(&params.q, barrier, place.first_row, place.head, place.batch, policy);
}

// The same for a tile of keys.
DEVICE void load_keys(const HopperParams& params, KeyStorage<false>& keys, RingBarriers<kStages>& barriers, u32 step,
                      const Place& place, int tile, u64 policy, int columns) {
    const u32 barrier = barriers.open(step, KeyTile::bytes(columns));
    const int head_kv = place.head / params.heads_per_kv;
#if RANKED
    if (columns < HEAD_DIM) {
        keys.k[step % kStages].load(&params.khat, barrier, tile * TILE_K, head_kv, place.batch, policy, columns);
        return;
    }
#endif
    keys.k[step % kStages].load(&params.k, barrier, tile * TILE_K, head_kv, place.batch, policy);
}

// Grouped: of the transposed K, whose panels are keys side by side, and whose rows are all columns.
DEVICE void load_keys(const HopperParams& params, KeyStorage<true>& keys, RingBarriers<kStages>&, u32 step,
                      const Place& place, int tile, u64 policy, int) {
    const u32 barrier = keys.raw_barriers.open(step, RawTile::kBytes);
    const u32 to = shared_address(keys.raw[step % kStages].data);
#pragma unroll
    for (int panel = 0; panel < RawTile::kPanels; ++panel) {
        const int key = tile * TILE_K + panel * RawTile::kPanelColumns;
        const int x[4] = {key, 0, place.head / params.heads_per_kv, place.batch};
        tma_load_4d(to + panel * RawTile::kPanelBytes, &params.k, barrier, x, policy);
    }
}

// One thread: starts all copies of this thread block. A consumer multiplies with V one step later than with K, so V of
// a tile comes after K of the next.
DEVICE void produce(const HopperParams& params, SharedStorage& shared) {
    const u64 once = policy_evict_first();
    const u64 again = policy_evict_last();
    u32 step = 0;  // tiles of keys so far
    u32 place_number = 0;
    u32 next;  // unsigned: it may be past the last tile, of which there can be 2**31 - 1
    u32 work_number = 0;
    for (u32 work = block_index(); work < params.tiles; work = next, ++work_number) {
        // Asked for now and told at the end: nothing waits for the answer of global memory.
        next = gridDim.x + (params.counter ? static_cast<u32>(atomic_add(params.counter, 1)) : work);
        const Place place(params, work);
        Walk walk(params, place, columns_of(params, place.batch_head));
        if (walk.inside()) {
            load_keys(params, shared.keys, shared.k_barriers, step, place, walk.tile(), again, walk.width());
            load_queries(params, shared, place_number, place, once, walk.width());
            ++place_number;
            for (; walk.inside(); walk.advance(), ++step) {
                Walk next = walk;
                next.advance();
                if (walk.more()) {
                    load_keys(params, shared.keys, shared.k_barriers, step + 1, place, next.tile(), again, next.width());
                }
                const u32 barrier = shared.v_barriers.open(step, ValueTile::kBytes);
                shared.v[step % kStages].load(&params.v, barrier, walk.tile() * TILE_K, place.head / params.heads_per_kv,
                                              place.batch, again);
                if (RANKED && walk.more() && walk.last_of_queries()) {
                    load_queries(params, shared, place_number++, place, once, next.width());
                }
            }
        }
        shared.work_barriers.wait_empty(work_number);
        shared.work[work_number % kStages] = next;
        mbarrier_arrive(shared_address(&shared.work_barriers.full[work_number % kStages]));
    }
}

// The tile of queries after the current one, which the producer chose; every warp of the readers gives it back.
DEVICE u32 next_work(SharedStorage& shared, u32 work_number, int lane) {
    shared.work_barriers.wait(work_number);
    const u32 next = __shfl_sync(kFullWarp, lane == 0 ? shared.work[work_number % kStages] : 0, 0);
    if (lane == 0) shared.work_barriers.release(work_number);
    return next;
}

// Grouped: three warps that make Khat, a tile ahead of the consumers. The warp that starts copies takes no part: the
// fence after the sums would wait for its copies.
// Threads side by side sum chunks side by side, eight of them a row of a panel: reads and writes have no bank conflicts.
template <class Keys>
struct Builder {
    static constexpr int kAcross = 8;
    static constexpr int kDown = kBuilderThreads / kAcross;
    static constexpr int kRows = FusedTile::kPanels * kTerms;  // of Khat, its panels one below the other
    static constexpr int kOwn = (kRows + kDown - 1) / kDown;
    // As many at once as make so many reads in flight; the compiler cannot know that no write hits a later read.
    static constexpr int kReads = kLongTiles ? 4 : 8;
    static constexpr int kAtOnce = kMembers >= kReads ? 1 : kOwn * kMembers <= kReads ? kOwn : kReads / kMembers;
    static_assert(!kGrouped || (RawTile::kWidth == 128 && kTerms % 8 == 0), "Builder: a row has eight chunks");
    static_assert(!kGrouped || RawTile::kBytes <= 1 << 16, "Builder: two offsets in a word");

    const HopperParams& params;
    SharedStorage& shared;
    Keys& keys;
    int thread, lane;
    // Where in a tile of raw keys the chunks lie that this thread sums, two offsets in a word.
    u32 members[(kOwn * kMembers + 1) / 2];

    DEVICE int row(int i) const { return thread / kAcross + i * kDown; }
    DEVICE u32 member(int i) const { return i % 2 ? members[i / 2] >> 16 : members[i / 2] & 0xffff; }

    DEVICE void find_members(const u8* permutation) {
#pragma unroll
        for (int i = 0; i < kOwn * kMembers; ++i) {
            const int of = min(row(i / kMembers), kRows - 1);
            const u32 column = permutation[of % kTerms * kMembers + i % kMembers];
            const u32 offset = of / kTerms * RawTile::kPanelBytes + column * RawTile::kWidth +
                               (thread % kAcross ^ column % 8) * kChunkBytes;
            members[i / 2] = i % 2 ? members[i / 2] | offset << 16 : offset;
        }
    }

    DEVICE void sum_groups(u32 step) {
        const u8* raw = reinterpret_cast<const u8*>(keys.raw[step % kStages].data);
        u8* khat = reinterpret_cast<u8*>(keys.k[step % kStages].data);
#pragma unroll
        for (int first = 0; first < kOwn; first += kAtOnce) {
            Chunk chunks[kAtOnce][kMembers];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int m = 0; m < kMembers; ++m) {
                    const u32 from = member(min(first + i, kOwn - 1) * kMembers + m);
                    chunks[i][m] = *reinterpret_cast<const Chunk*>(raw + from);
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int of = row(first + i);
                const int to = of * FusedTile::kWidth + (thread % kAcross ^ of % 8) * kChunkBytes;
                if (first + i < kOwn && of < kRows) *reinterpret_cast<Chunk*>(khat + to) = sum_chunks<T>(chunks[i]);
            }
        }
    }

    DEVICE void run() {
        u32 step = 0, place_number = 0, work_number = 0;
        for (u32 work = block_index(); work < params.tiles; work = next_work(shared, work_number++, lane)) {
            const Place place(params, work);
            Walk walk(params, place, HEAD_DIM);
            if (!walk.inside()) continue;
            const i64 block = static_cast<i64>(place.batch_head) * params.group_blocks +
                              place.first_row / BLOCK_M / params.tiles_per_block;
            const u8* permutation = params.permutation + block * HEAD_DIM;
            find_members(permutation);
            shared.q_barriers.wait_empty(place_number);
            for (int i = thread; i < HEAD_DIM; i += kBuilderThreads) keys.order[i] = permutation[i];
            mbarrier_arrive(shared_address(shared.q_barriers.full));
            ++place_number;
            for (; walk.inside(); walk.advance(), ++step) {
                keys.raw_barriers.wait(step);
                shared.k_barriers.wait_empty(step);
                sum_groups(step);
                fence_proxy_async();
                __syncwarp();
                if (lane == 0) {
                    keys.raw_barriers.release(step);
                    mbarrier_arrive(shared_address(&shared.k_barriers.full[step % kStages]));
                }
            }
        }
    }
};

// What a consumer multiplies for its scores. Exact: queries and keys lie in shared memory.
template <bool kOfGroups>
struct Operands {
    u32 queries, keys;  // lower words of descriptors

    DEVICE Operands(SharedStorage& shared, int group)
        : queries(QueryTile::lower(shared_address(shared.q.data) + group * kGroupRows * QueryTile::kWidth)),
          keys(KeyTile::lower(shared_address(shared.keys.k[0].data))) {}

    // steps: of 16 columns, those that count.
    DEVICE void start(float (&scores)[kKeyTiles][4], u32 step, int steps) const {
        const u32 stage = keys + step % kStages * u32(sizeof(KeyTile) / 16);
        if constexpr (RANKED) {
            start_some_scores<T, QueryTile, KeyTile>(scores, queries, stage, steps);
        } else {
            start_scores<T, QueryTile, KeyTile>(scores, queries, stage);
        }
    }
};

// Grouped: queries are gathered into registers, one column for each group.
template <>
struct Operands<true> {
    u32 queries[kTerms / 16][4];
    u32 keys;

    DEVICE Operands(SharedStorage& shared, int) : keys(FusedTile::lower(shared_address(shared.keys.k[0].data))) {}

    DEVICE void start(float (&scores)[kKeyTiles][4], u32 step, int) const {
        start_scores_of_values<T, FusedTile>(scores, queries, keys + step % kStages * u32(sizeof(FusedTile) / 16));
    }

    static DEVICE T value(const QueryTile& q, int row, const u8* columns) {
        if constexpr (!MEAN) return q.at(row, columns[0]);
        float total = 0.f;
#pragma unroll
        for (int member = 0; member < kMembers; ++member) total += Traits<T>::to_float(q.at(row, columns[member]));
        return Traits<T>::from_float(total * (1.f / kMembers));
    }

    // row: this lane's first row of the tile.
    template <class Keys>
    DEVICE void gather(const QueryTile& q, const Keys& storage, int row, int lane) {
#pragma unroll
        for (int i = 0; i < kTerms / 16 * 4; ++i) {
            const int group = i / 2 * 8 + lane % 4 * 2;
            const int own = row + i % 2 * 8;
            const T low = value(q, own, storage.order + group * kMembers);
            const T high = value(q, own, storage.order + (group + 1) * kMembers);
            queries[i / 4][i % 4] = low.bits | static_cast<u32>(high.bits) << 16;
        }
    }
};

// What the scores of a row lack that are products of Qhat and Khat. row: within the sequence.
DEVICE float lacking(const HopperParams& params, const Place& place, int row) {
#if RANKED
    if (params.shift && row < params.seqlen_q) {
        return params.shift[static_cast<i64>(place.batch_head) * params.seqlen_q + row];
    }
#endif
    return 0.f;
}

// Turns maxima of scores of Q and K into those of scores of Qhat and Khat, which only a constant of each row sets apart.
// row: this lane's first row within the sequence.
DEVICE void subtract_lacking(const HopperParams& params, const Place& place, WarpgroupSoftmax& softmax, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        softmax.maximum[half] -= lacking(params, place, row + half * 8) * (1.4426950409f / params.score_scale);
    }
}

// Normalises the output, and stores it and the lse. row: this lane's first row within the sequence. lacks: whether maxima
// are of scores of Qhat and Khat.
DEVICE void store_output(const HopperParams& params, const Place& place, float (&output)[1][kOutTiles][4],
                         WarpgroupSoftmax& softmax, int row, int lane, bool lacks) {
    softmax.reduce_sums();
    constexpr int kChunks = HEAD_DIM_V / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int own = row + half * 8;
        const bool inside = own < params.seqlen_q;
        const float sum = softmax.sum[half];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // a row without keys is zero
        T* out = params.out + place.batch * params.out_batch + place.head * params.out_head + own * params.out_row;
        // Each lane of a quad has two columns of every chunk; after the transpose it has a chunk out of four.
#pragma unroll
        for (int first = 0; first < kChunks; first += 4) {
            union {
                Chunk chunk;
                u32 word[4];
                T element[8];
            } value;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = output[0][first + i < kChunks ? first + i : 0];
                value.word[i] = Traits<T>::pack(pair[half * 2] * inverse, pair[half * 2 + 1] * inverse);
            }
            transpose_quad(value.word, lane);
            const int chunk = first + lane % 4;
            if (!inside || chunk >= kChunks) continue;
            if (params.out_aligned) {
                *reinterpret_cast<Chunk*>(out + chunk * 8) = value.chunk;
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) out[chunk * 8 + i] = value.element[i];
            }
        }
        if (params.lse && lane % 4 == 0 && inside) {
            float log_sum = fmaf(softmax.maximum[half], params.score_scale * 0.6931471806f, logf(sum));
            if (lacks) log_sum += lacking(params, place, own);
            params.lse[static_cast<i64>(place.batch_head) * params.seqlen_q + own] = sum == 0.f ? -infinity() : log_sum;
        }
    }
}

// One warpgroup of consumers.
struct Consumer {
    const HopperParams& params;
    SharedStorage& shared;
    int group;  // 0 to kConsumers - 1
    int lane;
    int row;  // of this lane, the first of two in the tile

    // Turns: barrier 1 + g is the turn of consumer g.
    DEVICE void wait_for_turn() { named_barrier_sync(1 + group, 2 * kGroupThreads); }
    DEVICE void pass_turn() { named_barrier_arrive(1 + (group + 1) % kConsumers, 2 * kGroupThreads); }

    // A warp is done with a stage: every warp tells, since each waits for its own part of a product.
    template <int kRingStages>
    DEVICE void release(RingBarriers<kRingStages>& ring, u32 n) {
        if (lane == 0) ring.release(n);
    }

    // Which keys the rows of a tile of queries see: those that every row of the warpgroup sees, and each of this lane's.
    struct Visible {
        KeySpan common, rows[2];

        // Whether a tile of keys needs no mask.
        DEVICE bool all(int key) const { return key >= common.first && key + TILE_K - 1 <= common.last; }
    };
    template <class AnyBand>
    DEVICE Visible visible(const AnyBand& band, int first_row) const {
        const int group_row = first_row + group * kGroupRows;
        const int last_row = max(group_row, min(group_row + kGroupRows, params.seqlen_q) - 1);
        Visible keys;
        keys.common = {band.first_key(last_row), band.last_key(group_row)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first_row + row + half * 8;
            keys.rows[half] = {band.first_key(query), band.last_key(query)};
        }
        return keys;
    }

    // Grouped: the queries come into registers, and their place is free for the next tile.
    template <class Queries>
    DEVICE void take_queries(Queries& queries, u32 place_number) {
        queries.gather(shared.q, shared.keys, row, lane);
        shared.q_barriers.release(place_number);
    }

    // Steps of 16 columns that the scores of a head take. Broadcast, so that the compiler knows it to be the same for all.
    DEVICE int steps_of(int batch_head) const {
        if constexpr (!RANKED) return HEAD_DIM / 16;
        return __shfl_sync(kFullWarp, columns_of(params, batch_head) / 16, 0);
    }

    // Scores of a tile as the softmax wants them, and into its maxima.
    DEVICE void raise(float (&scores)[1][kKeyTiles][4], WarpgroupSoftmax& softmax, float (&shift)[2], float (&rescale)[2],
                      const Visible& keys, const Walk& walk, int first_row) {
        const int key = walk.tile() * TILE_K;
        if constexpr (SCORE) scale_scores(scores, params.scale, params.softcap);
        if (!keys.all(key)) {
            if constexpr (RANKED) {  // found anew: there are no registers to keep them
                apply_mask(scores[0], visible(walk.band(), first_row).rows, key + lane % 4 * 2);
            } else {
                apply_mask(scores[0], keys.rows, key + lane % 4 * 2);
            }
        }
        softmax.raise(scores[0], params.score_scale, shift, rescale);
    }

    DEVICE void run() {
        Operands<kGrouped> operands(shared, group);
        const u32 values = ValueTile::lower(shared_address(shared.v[0].data));
        if (group == kConsumers - 1) pass_turn();  // the first turn is that of consumer 0
        u32 step = 0;
        u32 place_number = 0;
        u32 work_number = 0;
        for (u32 work = block_index(); work < params.tiles; work = next_work(shared, work_number++, lane)) {
            const Place place(params, work);
            Walk walk(params, place, steps_of(place.batch_head) * 16);
            Visible visible_keys = visible(walk.band(), place.first_row);
            bool lacks = walk.reduced();  // whether maxima are of scores of Qhat and Khat
            float output[1][kOutTiles][4] = {};
            WarpgroupSoftmax softmax;
            softmax.clear();
            if (walk.inside()) {
                float scores[1][kKeyTiles][4];
                float shift[2], rescale[2];
                u32 weights[TILE_K / 16][4];
                shared.q_barriers.wait(place_number);
                if constexpr (kGrouped) take_queries(operands, place_number);
                shared.k_barriers.wait(step);
                operands.start(scores[0], step, walk.width() / 16);
                wgmma_wait<0>();
                wgmma_pin(scores[0]);
                release(shared.k_barriers, step);
                bool other_queries = !kGrouped && walk.last_of_queries();
                if (other_queries) release(shared.q_barriers, place_number);
                raise(scores, softmax, shift, rescale, visible_keys, walk, place.first_row);
                softmax.exponentiate(scores[0], params.score_scale, shift, rescale);
                pack_weights<T>(weights, scores[0]);

                if (!kGrouped && walk.more()) shared.k_barriers.wait(step + 1);
                for (bool other_band = walk.advance(); walk.inside(); other_band = walk.advance()) {
                    ++step;
                    if constexpr (kGrouped) shared.k_barriers.wait(step);
                    if (RANKED && other_queries) shared.q_barriers.wait(++place_number);
                    wait_for_turn();
                    operands.start(scores[0], step, walk.width() / 16);
                    shared.v_barriers.wait(step - 1);
                    wgmma_fence();
                    start_output<T, ValueTile>(output[0], weights, values + (step - 1) % kStages * kValueStage);
                    wgmma_commit();
                    pass_turn();
                    wgmma_wait<1>();
                    wgmma_pin(scores[0]);
                    release(shared.k_barriers, step);
                    if (other_band) visible_keys = visible(walk.band(), place.first_row);
                    if (RANKED && other_queries) {
                        subtract_lacking(params, place, softmax, place.first_row + row);
                        lacks = true;
                    }
                    other_queries = !kGrouped && walk.last_of_queries();
                    if (other_queries) release(shared.q_barriers, place_number);
                    raise(scores, softmax, shift, rescale, visible_keys, walk, place.first_row);
                    if constexpr (kEarlyWeights) softmax.exponentiate(scores[0], params.score_scale, shift, rescale);
                    // ptxas would move the wait for the last product up, before all this, if the next branch did not
                    // depend on it and end the block. Sums and factors are never negative.
                    const float (&last)[2] = kEarlyWeights ? softmax.sum : rescale;
                    const bool early = !kGrouped && walk.more();
                    if (early || last[0] + last[1] < 0.f) shared.k_barriers.wait(step + 1);
                    wgmma_wait<0>();
                    wgmma_pin(output[0]);
                    wgmma_pin(scores[0]);  // nothing is packed while the last product reads the old weights
                    release(shared.v_barriers, step - 1);
                    WarpgroupSoftmax::rescale_output(output[0], rescale);
                    if constexpr (!kEarlyWeights) softmax.exponentiate(scores[0], params.score_scale, shift, rescale);
                    pack_weights<T>(weights, scores[0]);
                }
                shared.v_barriers.wait(step);
                wgmma_fence();
                start_output<T, ValueTile>(output[0], weights, values + step % kStages * kValueStage);
                wgmma_commit();
                wgmma_wait<0>();
                wgmma_pin(output[0]);
                release(shared.v_barriers, step);
                ++step;
                ++place_number;
            }
            store_output(params, place, output, softmax, place.first_row + row, lane, lacks);
        }
    }
};

// Templates, so that what an exact kernel lacks need not exist.
template <class Keys>
DEVICE void init_raw(Keys& keys) {
    keys.raw_barriers.init(kBuilderThreads / kWarpSize, 1);
}
template <class Keys>
DEVICE void build(const HopperParams& params, SharedStorage& shared, Keys& keys, int thread) {
    Builder<Keys>{params, shared, keys, thread, thread % kWarpSize, {}}.run();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_flash_fwd(const __grid_constant__ HopperParams params) {
    extern __shared__ __align__(1024) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const int thread = thread_index();
    if (thread == 0) {
        prefetch_tensor_map(&params.q);
        prefetch_tensor_map(&params.k);
        prefetch_tensor_map(&params.v);
#if RANKED
        prefetch_tensor_map(&params.qhat);
        prefetch_tensor_map(&params.khat);
#endif
        // Readers give back warp by warp, and so do the warps that write what no copy does; but each thread for itself the
        // order of columns and the queries, once for a tile of them.
        constexpr int kReaders = 4 * kConsumers;
        constexpr int kBuilders = kGrouped ? kBuilderThreads / kWarpSize : 0;
        shared.q_barriers.init(kGrouped ? kConsumerThreads : kReaders, 1 + kBuilders * kWarpSize);
        shared.k_barriers.init(kReaders, kGrouped ? kBuilders : 1);
        shared.v_barriers.init(kReaders, 1);
        shared.work_barriers.init(kReaders + kBuilders, 1);
        if constexpr (kGrouped) init_raw(shared.keys);
        fence_mbarrier_init();
    }
    __syncthreads();
    // The same for all lanes, and so that the compiler knows it: descriptors then live in uniform registers.
    const int warpgroup = __shfl_sync(kFullWarp, thread / kGroupThreads, 0);
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (thread == 0) produce(params, shared);
        if constexpr (kGrouped) {
            if (thread >= kWarpSize) build(params, shared, shared.keys, thread - kWarpSize);
        }
    } else {
        take_registers<kConsumerRegisters>();
        const int own = thread - kGroupThreads;
        const int lane = own % kWarpSize;
        Consumer{params, shared, warpgroup - 1, lane, own / kWarpSize * 16 + lane / 4}.run();
    }
}
