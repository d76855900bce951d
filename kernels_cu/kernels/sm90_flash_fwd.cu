// Attention forward for sm_90a (Hopper), exact and DistrAttention: warpgroup products, and a warpgroup that only feeds
// them. A thread block takes tiles of BLOCK_M queries of one head, one after another; K and V stream through two stages
// each.
//
// Warpgroup 0 produces: one thread of it starts the copies, in the order in which they are needed, as soon as a stage
// is empty. Grouped, all of it sums the columns of each group of the transposed K, a tile ahead of its use. The others
// consume, 64 queries each. A consumer's products run while it computes: the scores of a tile are
// started together with P V of the tile before, and while that product runs, the scores become weights. Consumers may begin
// in turn, or compute exponentials in turn, such that one does so while another has the tensor cores.
//
// Constants, defined by the plan (see plan.py for how they are chosen):
//   DTYPE       0 float16, 1 bfloat16
//   HEAD_DIM    columns of Q and K; HEAD_DIM_V columns of V; multiples of 16
//   GROUP       0 exact; otherwise columns per group, and K comes transposed as (batch, heads_kv, HEAD_DIM, key_columns)
//   MEAN        1: a group is represented by the mean of its Q columns instead of its first
//   WEIGHTED    1: by their weighted mean, and columns of K are summed with weights too
//   BLOCK_M     queries per tile: 128 or 192; TILE_K keys per step
//   SCORE       0: score_scale > 0 is all; 1: softcap, or a scale that is not positive
//   RANKED      1: heads differ in the columns of Q and K that count, and may leave keys exact, see HopperParams; not with
//               GROUP
//   RANK        with RANKED, not 0: a head has so many columns, fewer than HEAD_DIM, or HEAD_DIM; not with COPIED
//   NEAR        1: with RANK, heads that are reduced keep some keys exact too
//   COPIED      1: with RANKED, of heads that all have HEAD_DIM columns: in what is reduced other queries stand for theirs,
//               see smxx_copied_queries.cu
//   KEPT        1: with GROUP, some keys are exact, see HopperParams
//   HALF        1: with GROUP, of bfloat16: K comes in float16, unless params.wide says otherwise; see smxx_lsh_prepare.cu
//   SHARED_BYTES  what the plan reserves
#include "ptx/atomic.cuh"
#include "tile/fuse.cuh"
#include "tile/mask.cuh"
#include "tile/softmax.cuh"
#include "tile/warpgroup.cuh"

typedef ElementOf<DTYPE>::type T;
typedef OnlineSoftmax<1> Softmax;
constexpr bool kWide = Traits<T>::kWide;  // weights may be large for a step; else they are brought down before they are packed

// Strides are in elements. Queries see keys from query + band_low to query + band_high.
struct HopperParams {
    // (batch, heads, seqlen, columns); boxes of a panel of QueryTile (RANKED: of kPartRows of its rows), KeyTile or RawTile,
    // ValueTile
    TensorMap q, k, v;
#if RANKED
    TensorMap qhat;  // in the place of q and k for heads of fewer than HEAD_DIM columns; COPIED: of q where it is reduced
#if !COPIED
    TensorMap khat;
    const i32* ranks;  // (batch, heads), contiguous: the columns that count, multiples of 16 from 0 to HEAD_DIM
#endif
#endif
#if RANKED || KEPT
    const float* shift;    // (batch, heads, seqlen_q), contiguous: what scores of Qhat and Khat lack; null for nothing
#endif
    T* out;
    float* lse;             // (batch, heads, seqlen_q), contiguous; null if not wanted
    const u8* permutation;  // (batch, heads, group_blocks, HEAD_DIM), contiguous; null if exact
    i32* counter;  // zero at first: tiles taken beyond the first of each block; null: every gridDim.x-th is taken
#if HALF
    const i32* wide;  // not zero: Q or K has numbers that float16 has not, and K is as it was
#endif
#if WEIGHTED
    const float* weights;  // as permutation, of the columns in this order: for K, T has them exactly, the first of a group is 1
    const float* shares;   // for Q
#endif
    i64 out_batch, out_head, out_row;
#if RANKED || KEPT
    Passes passes;
#else
    i64 band_low, band_high;
#endif
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 row_blocks;    // tiles of BLOCK_M that cover seqlen_q
    u32 tiles;         // row_blocks of every head of every batch; those that are shared out count for each of their parts
    u32 turns;         // pieces of work that consumers begin one after another, where they may
    i32 all_heads;     // over all batches
    i32 section;       // of these, those whose tiles are taken in turn
    i32 shared_first;  // from this tile on, so many are
    i32 shared_tiles;  // shared out: every consumer has its part of one in a thread block of its own; not with GROUP
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
constexpr bool kWeighted = WEIGHTED;
constexpr bool kRanks = RANKED && !COPIED;  // whether heads may differ in their columns
constexpr bool kExactLoop = KEPT || RANK;   // whether exact tiles have a loop of their own
constexpr bool kFirstExact = KEPT || NEAR;  // whether every tile of queries begins with one
// A tile is short for a consumer whose queries see none but its first keys, so many: such tiles come before the loops and
// are multiplied so far only. With groups and tiles of 128 keys that saves less than it takes; under a causal mask also
// where tiles of keys are as long as those of queries, each of which has one that is short for its first consumer alone.
constexpr int kShortKeys = 64;
constexpr bool kShortWhole = !kGrouped && TILE_K > kShortKeys && TILE_K != BLOCK_M;  // of heads that are exact
constexpr bool kShortTiles = kShortWhole || (RANKED && TILE_K > kShortKeys) || (kGrouped && TILE_K > 2 * kShortKeys);
static_assert(RANKED || !COPIED, "queries change where exact keys end");
static_assert(!RANK || (RANKED && !COPIED && RANK < HEAD_DIM), "heads of one rank have fewer columns where they are reduced");
static_assert(!NEAR || RANK, "where ranks are read, the first tile of keys may be of any");
static_assert(!HALF || (kGrouped && DTYPE == 1 && !kWeighted), "float16 sums are of bfloat16 columns without weights");
static_assert(kConsumers == 2 || kConsumers == 3, "two or three consumers: registers are shared out for these");
static_assert(BLOCK_M % kGroupRows == 0 && TILE_K % 16 == 0, "tiles are made of warpgroup products");

// The block starts with 168 or 128 registers a thread; copying needs few, so consumers get what it gives back. Sums
// need more, for loads in flight: fewer of them where a long tile of keys takes registers from the consumers.
constexpr bool kLongTiles = TILE_K > 128;
constexpr int kProducerRegisters = kGrouped ? (kLongTiles ? 72 : 88) : kConsumers == 2 ? 24 : 32;
constexpr int kConsumerRegisters = kGrouped ? (kLongTiles ? 216 : 208) : kConsumers == 2 ? 240 : 160;
static_assert(!kGrouped || kConsumers == 2, "grouped: registers are shared out for two consumers");
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * (kConsumers == 2 ? 168 : 128),
              "a warpgroup would wait for registers that nobody gives back");

// Whether exponentials are computed before the wait for the last product, while it runs, or after it, together with the
// packing of weights and the rescaling of the output, which fill each other's gaps. With three consumers, which compute
// exponentials most of the time, before is no slower at (64, 64); with two, after is 3 to 5% faster at 128 columns of V,
// and 18% with LSH(2) of 64 columns, whose tiles are long (one H100, 16k tokens). With groups in short tiles before is 1 to
// 2% faster (one H200).
constexpr bool kEarlyWeights = kConsumers == 3 || (kGrouped && !kLongTiles);

// Whether consumers have no register to keep their lane.
constexpr bool kCrowded = RANKED || HEAD_DIM_V > 192;

// Whether consumers may begin a tile of queries one after another: each with its first scores when those of the one before
// are there. Consumers that begin in step stay in step, and find the tensor cores taken and then idle, one tile of keys after
// another: 16% of the time for few tiles of 128 columns. For how many tiles the plan says. Grouped it costs up to 10%, but
// gains up to 2% beside exact keys (one H100, as below).
constexpr bool kBeginInTurn = !kGrouped || (KEPT && !kLongTiles);
// Whether they compute exponentials one after another. Grouped, in long tiles, two that do so at the same time take longer:
// 4 to 6% of the time at 64 columns. In short ones waiting costs 4%.
constexpr bool kExponentsInTurn = kGrouped && kLongTiles;

// Whether consumers tell which rows lost weights before they store the output, or when they have packed it, which takes half
// as many instructions. What it does to the loop, by way of ptxas, decides: so it is 1 to 3% faster, and else 1% slower; and
// of many columns some variants would spill.
constexpr bool kTellFirst = KEPT || (kGrouped && kLongTiles) || HEAD_DIM_V > 192;

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
#if WEIGHTED
    float shares[HEAD_DIM];  // of the columns in this order, such that a group's sum is its Qhat
    // For the sums of K, once for every panel. Two of them: a builder may still sum for a tile of queries when another
    // begins the next.
    T weights[2][FusedTile::kPanels * HEAD_DIM];
#endif
};

// Whether Qhat and Khat have to be T; else they are float16.
DEVICE bool is_wide(const HopperParams& params) {
#if HALF
    // Broadcast, so that the compiler knows it to be the same for all.
    return __shfl_sync(kFullWarp, *params.wide, 0) != 0;
#else
    return true;
#endif
}

// Tiles of queries are work for a thread block, as numbers. With this bit a tile is done once more: in some row the
// maximum of the first tiles of keys, which stayed, was too low for a weight.
constexpr u32 kAgain = Softmax::kAgain;
constexpr u32 kNoWork = kAgain - 1;  // no tile has this number
DEVICE bool is_work(const HopperParams& params, u32 work) { return (work & ~kAgain) < params.tiles; }

// Where a tile of queries is, and the only consumer that takes part if it is shared out, else -1.
struct alignas(16) Place {
    int batch_head, batch, head, first_row, only;
#if RANKED || KEPT
    KeyRange near;  // the keys that stay exact, for the thread that starts copies
#endif
};
// Known at once: those of the work that consumers end with, of the current work and of the next; a power of two.
constexpr int kPlaces = 4;

// Tiles are taken a section of heads after another, so that the section's K and V stay in L2, and in it the last rows
// first: under a causal mask they have the most keys, and short tiles fill the tail. That takes a thousand clocks, so one
// thread finds it ahead.
DEVICE Place find_place(const HopperParams& params, u32 tile) {
    const int of_section = params.section * params.row_blocks;
    int work = static_cast<int>(tile);
    int only = -1;
    if constexpr (!kGrouped) {
        const int beyond = work - params.shared_first;
        if (beyond >= params.shared_tiles * kConsumers) {
            work -= params.shared_tiles * (kConsumers - 1);
        } else if (beyond >= 0) {
            work = params.shared_first + beyond / kConsumers;
            only = beyond % kConsumers;
        }
    }
    const int first_head = work / of_section * params.section;
    const int heads = min(params.section, params.all_heads - first_head);
    const int in_section = work % of_section;
    const int batch_head = first_head + in_section % heads;
    const int first_row = (params.row_blocks - 1 - in_section / heads) * BLOCK_M;
    Place place = {batch_head, batch_head / params.heads, batch_head % params.heads, first_row, only};
#if RANKED || KEPT
    place.near = params.passes.near.of(first_row, params.seqlen_k);
#endif
    return place;
}

// The tile of queries that this thread block takes after work, if all goes well. Asked for early and told at the end:
// nothing waits for the answer of global memory.
DEVICE u32 following(const HopperParams& params, u32 work) {
    const u32 next = gridDim.x + (params.counter ? static_cast<u32>(atomic_add(params.counter, 1)) : work);
    return next < params.tiles ? next : kNoWork;
}

// What the thread block does, in order, as the thread that starts copies decides it: pieces of work, with a number each.
struct Agenda {
    u32 next;    // tile that was not taken yet
    u32 judged;  // so many pieces of work are known to be well, or come again

    template <class Shared>
    DEVICE u32 first(const HopperParams& params, Shared& shared) {
        judged = 0;
        shared.places[0] = find_place(params, block_index());
        return tell(shared, 0, block_index());
    }

    // Begins with a piece of work.
    DEVICE void begin(const HopperParams& params, u32 work) {
        if (!(work & kAgain)) next = following(params, work);
    }

    // While the number-th is under way: finds where the next tile is.
    template <class Shared>
    DEVICE void prepare(const HopperParams& params, Shared& shared, u32 number) const {
        if (next != kNoWork) shared.places[(number + 1) % kPlaces] = find_place(params, next);
    }

    // What comes after the number-th, of which all copies are started: the work before that, again, if weights were lost;
    // else the next tile. Consumers have long been done with the work before; the last one is waited for.
    template <class Shared>
    DEVICE u32 after(Shared& shared, u32 number) {
        u32 chosen = next;
        while (judged < number + (next == kNoWork)) {
            const u32 slot = judged % kStages;
            wait_barrier(shared_address(&shared.done[slot]), judged / kStages % 2);
            u32 lost = 0;
#pragma unroll
            for (int warp = 0; warp < kConsumerThreads / kWarpSize; ++warp) lost |= shared.lost[slot][warp];
            if (lost) {
                chosen = shared.work[slot] | kAgain;
                shared.again[(number + 1) % kStages] = slot;
                shared.places[(number + 1) % kPlaces] = shared.places[judged % kPlaces];
            }
            ++judged;
            if (lost) break;
        }
        return tell(shared, number + 1, chosen);
    }

    template <class Shared>
    DEVICE u32 tell(Shared& shared, u32 number, u32 work) {
        shared.work_barriers.wait_empty(number);
        shared.work[number % kStages] = work;
        mbarrier_arrive(shared_address(&shared.work_barriers.full[number % kStages]));
        return work;
    }
};

// A tile of keys of RANKED or KEPT, as the thread that starts copies finds it and tells the consumers.
struct alignas(16) Step {
    // Query i of the tile of queries sees, of this tile's keys, those from i + low to i + high that come before end.
    i32 low, high, end;
    i32 cut;  // bit g: consumer g has queries that do not see all of them; bit 4 + g: the tile is short for it
    i32 key;  // the first of the tile
#if KEPT
    i32 first;  // no query sees a key before it
#else
    i32 columns;  // with the first tile: of the head
#endif
    // With the first tile: tiles for this tile of queries, and how many of them multiply Q and K.
    i32 count, exact;
};

// What that thread keeps for itself; it has few registers.
struct Notes {
    Place place;  // of the current work, where it need not look for the slot with every tile of keys
    i32 head_kv, columns;
    i32 low, high, end;  // of the pass, as in Step
#if KEPT
    i32 first;  // the same
#endif
    Agenda agenda;
    u32 number;          // of pieces of work so far
};

// Kept: consumers look at one after they have given its tile of keys back, and of KEPT run behind the builders.
constexpr int kSteps = KEPT ? 8 : 4;

// Queries that are copied at once. RANKED changes them in the middle of a tile: each consumer has a copy of its own
// queries, which are on their way while the others still multiply the old ones.
constexpr int kQueryParts = RANKED ? kConsumers : 1;
constexpr int kPartRows = BLOCK_M / kQueryParts;

struct SharedStorage {
    QueryTile q;
    ValueTile v[kStages];
    KeyStorage<kGrouped> keys;
    RingBarriers<1> q_barriers[kQueryParts];
    RingBarriers<kStages> k_barriers, v_barriers, work_barriers;
    u64 done[kStages];  // barriers: with a piece of work
    u32 work[kStages];   // pieces of work: the tile of queries
    u32 again[kStages];  // of work that is done again: where it stands in what follows
    Place places[kPlaces];  // of work
    // Of a piece of work: whether a warp lost weights, and of which of the two rows that four lanes have.
    u8 lost[kStages][kConsumerThreads / kWarpSize];
    u8 lost_rows[kStages][kConsumerThreads / 4];
#if RANKED || KEPT
    Step steps[kSteps];
    Notes notes;
#endif
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");
static_assert(sizeof(HopperParams) % 64 == 0, "tensor maps start on 64 bytes");

// The tiles of keys of a tile of queries, one after another, from the last to the first of a band.
#if RANKED || KEPT
// As consumers and builders know them: the producer finds them, and tells how many there are with the first one, at least one.
struct Walk {
    int index, count, exact;
    int columns;  // of the head

    // ring: by which this warp learns that the first tile, of all that this thread block does, is there.
    DEVICE Walk(const SharedStorage& shared, RingBarriers<kStages>& ring, u32 first) : index(0) {
        __syncwarp();  // all lanes are done with the steps of the tile before
        ring.wait(first);
        const Step& step = shared.steps[first % kSteps];
        // Broadcast, so that the compiler knows them to be the same for all.
        count = __shfl_sync(kFullWarp, step.count, 0);
        exact = __shfl_sync(kFullWarp, step.exact, 0);
#if KEPT || COPIED
        columns = HEAD_DIM;
#else
        columns = RANK ? RANK : __shfl_sync(kFullWarp, step.columns, 0);
#endif
    }
    DEVICE bool inside() const { return index < count; }
    DEVICE bool ends_reduced() const { return exact < count; }
    DEVICE bool reduced() const { return index >= exact; }
    DEVICE int width() const { return reduced() ? columns : HEAD_DIM; }
    DEVICE bool in_first_loop() const { return kExactLoop ? !reduced() : width() > 0; }  // of a consumer
    DEVICE bool last_of_queries() const { return index + 1 == count || index + 1 == exact; }
    DEVICE bool more() const { return index + 1 < count; }
    DEVICE void advance() { ++index; }
};

// Those of a pass, as the producer finds them: from key to first_key; maybe none. They start at the first key that a query
// sees, so that few of them are cut; but those of heads that are whole where an exact call has them, for the same bits,
// and those of the transposed K, where keys lie side by side, on whole chunks.
struct PassTiles {
    int first_key, count;

    DEVICE PassTiles(const HopperParams& params, const Place& place, int pass) {
        const CutBand band = params.passes.band(pass, place.near);
        const int last_row = min(place.first_row + BLOCK_M, params.seqlen_q) - 1;
        first_key = band.first_key(place.first_row);
        const int last_key = band.last_key(last_row);
        if (pass == Passes::kWhole) first_key -= first_key % TILE_K;
        const int start = KEPT ? first_key / 8 * 8 : first_key;
        count = last_key < first_key ? 0 : (last_key - start) / TILE_K + 1;
        first_key = start;
    }
};
#else
struct Walk {
    int tile, first_tile;

    DEVICE Walk(const HopperParams& params, const Place& place) {
        const Band band = {params.band_low, params.band_high, params.seqlen_k};
        const int last_row = min(place.first_row + BLOCK_M, params.seqlen_q) - 1;
        const int first_key = band.first_key(place.first_row);
        const int last_key = band.last_key(last_row);
        first_tile = first_key / TILE_K;
        tile = last_key < first_key ? first_tile - 1 : last_key / TILE_K;
    }
    DEVICE bool inside() const { return tile >= first_tile; }
    DEVICE bool ends_reduced() const { return false; }
    DEVICE bool reduced() const { return kGrouped; }
    DEVICE int width() const { return HEAD_DIM; }
    DEVICE bool in_first_loop() const { return true; }
    DEVICE bool last_of_queries() const { return tile == first_tile; }
    DEVICE bool more() const { return tile > first_tile; }
    DEVICE void advance() { --tile; }
};
#endif

// Starts the copy of a tile of queries, of the columns that count, from where a head has them. exact: for a tile of keys
// that is. A branch rather than a pointer: the producer has few registers.
DEVICE void load_queries(const HopperParams& params, SharedStorage& shared, u32 place_number, const Place& place, u64 policy,
                         int columns, bool exact) {
#if RANKED
#pragma unroll
    for (int part = 0; part < kQueryParts; ++part) {
        const u32 barrier = shared.q_barriers[part].open(place_number, QueryTile::bytes(columns) / kQueryParts);
        const int row = part * kPartRows;
        if (COPIED ? !exact : columns < HEAD_DIM) {
            shared.q.load(&params.qhat, barrier, place.first_row + row, place.head, place.batch, policy, columns, row);
        } else {
            shared.q.load(&params.q, barrier, place.first_row + row, place.head, place.batch, policy, columns, row);
        }
    }
#else
    const u32 barrier = shared.q_barriers[0].open(place_number, QueryTile::bytes(columns));
    shared.q.load(&params.q, barrier, place.first_row, place.head, place.batch, policy);
#endif
}

// The head of K and V that a head of Q has.
DEVICE int head_of_keys(const HopperParams& params, SharedStorage& shared, const Place& place) {
#if RANKED || KEPT
    return shared.notes.head_kv;
#else
    return place.head / params.heads_per_kv;
#endif
}

// Tiles of keys are known by their number, those of RANKED and KEPT, which start anywhere, by their first key.
constexpr int kTileUnit = RANKED || KEPT ? 1 : TILE_K;

// The same for a tile of keys.
DEVICE void load_keys(const HopperParams& params, SharedStorage& shared, KeyStorage<false>& keys, u32 step,
                      const Place& place, int tile, u64 policy, int columns) {
    const u32 barrier = shared.k_barriers.open(step, KeyTile::bytes(columns));
    const int head_kv = head_of_keys(params, shared, place);
#if RANKED && !COPIED
    if (columns < HEAD_DIM) {
        keys.k[step % kStages].load(&params.khat, barrier, tile * kTileUnit, head_kv, place.batch, policy, columns);
        return;
    }
#endif
    keys.k[step % kStages].load(&params.k, barrier, tile * kTileUnit, head_kv, place.batch, policy);
}

// Grouped: of the transposed K, whose panels are keys side by side, and whose rows are all columns.
DEVICE void load_keys(const HopperParams& params, SharedStorage& shared, KeyStorage<true>& keys, u32 step,
                      const Place& place, int tile, u64 policy, int) {
    const u32 barrier = keys.raw_barriers.open(step, RawTile::kBytes);
    const u32 to = shared_address(keys.raw[step % kStages].data);
#pragma unroll
    for (int panel = 0; panel < RawTile::kPanels; ++panel) {
        const int key = tile * kTileUnit + panel * RawTile::kPanelColumns;
        const int x[4] = {key, 0, head_of_keys(params, shared, place), place.batch};
        tma_load_4d(to + panel * RawTile::kPanelBytes, &params.k, barrier, x, policy);
    }
}

DEVICE void load_values(const HopperParams& params, SharedStorage& shared, u32 step, const Place& place, int tile, u64 policy) {
    const u32 barrier = shared.v_barriers.open(step, ValueTile::kBytes);
    shared.v[step % kStages].load(&params.v, barrier, tile * kTileUnit, head_of_keys(params, shared, place), place.batch,
                                  policy);
}

// One thread: starts all copies of this thread block. A consumer multiplies with V one step later than with K, so V of
// a tile comes after K of the next.
#if RANKED || KEPT
struct Producer {
    const HopperParams& params;
    SharedStorage& shared;
    u64 once, again;  // policies
    u32 step;         // tiles of keys so far
    u32 place_number;
#if KEPT
    u32 exact_ones;  // bit i: the tile copied i before the next one is exact
#endif

    // Of the tile of keys that is copied next; what is told before its copy is there with it. There are few registers, so
    // that this is also where to look for what it was.
    DEVICE Step& own() { return shared.steps[step % kSteps]; }

#if KEPT
    // Builders give a tile of keys back at once if it is exact; it is free when the consumers are done with it.
    DEVICE void wait_for_consumers(bool exact) {
        shared.keys.raw_barriers.wait_empty(step);  // else the phase that is waited for below may not have begun
        if (exact_ones >> 1 & 1) shared.k_barriers.wait_empty(step);
        exact_ones = exact_ones << 1 | exact;
    }
#endif

    // Starts the copies of the keys from key on, and of the values of the tile before.
    DEVICE void copy_tile(const Place& place, int key, int width, bool exact, bool first, bool other_queries) {
        // Relative to the tile bounds that are far away may be brought nearer: sums with rows then fit 32 bits.
        const int far = 1 << 28;
        const int low = max(shared.notes.low, key - far) - key;
        const int high = min(max(shared.notes.high, key - far) - key, far);
        const int end = shared.notes.end - key;
        own().low = low;
        own().high = high;
        own().end = end;
        own().key = key;
#if KEPT
        own().first = shared.notes.first - key;
#endif
        int cut = 0;
#pragma unroll
        for (int group = 0; group < kConsumers; ++group) {
            int first_key = low + (group + 1) * kGroupRows - 1;  // of those that all queries see
#if KEPT
            first_key = max(first_key, own().first);
#endif
            const int last_key = min(high + group * kGroupRows, end - 1);
            cut |= (first_key > 0 || last_key < TILE_K - 1) << group;
            if (kShortTiles && (kShortWhole || !whole())) cut |= (min(high + (group + 1) * kGroupRows, end) <= kShortKeys) << (4 + group);
        }
        // Consumers that take turns begin with the same tile: one waits for another, which may wait for the tile to be free.
        if (kShortTiles && kBeginInTurn && params.turns > 0 && cut >> 4 != (1 << kConsumers) - 1) cut &= 15;
        own().cut = cut;
#if KEPT
        wait_for_consumers(exact);
#endif
        load_keys(params, shared, shared.keys, step, place, key, again, width);
        if (!first) copy_values(place, step - 1);
        if (other_queries) load_queries(params, shared, place_number++, place, once, width, exact);
        ++step;
    }
    DEVICE void copy_values(const Place& place, u32 of) {
        load_values(params, shared, of, place, shared.steps[of % kSteps].key, again);
    }

    // Notes what a pass sees. Of the bounds, all below the first key are alike.
    DEVICE void note(const Place& place, const CutBand& band) {
        const i64 least = -BLOCK_M, most = 0x7fffffff;
#if KEPT
        shared.notes.first = band.first;
#endif
        shared.notes.low = static_cast<int>(max(least, min(most, band.low + place.first_row)));
        shared.notes.high = static_cast<int>(max(least, min(most, band.high + place.first_row)));
        shared.notes.end = band.end;
    }

    // Of a head, whether all its columns count.
    DEVICE bool whole() const { return kRanks && shared.notes.columns == HEAD_DIM; }

    DEVICE void copy(const Place& place) {
        shared.notes.head_kv = place.head / params.heads_per_kv;
#if RANKED && !COPIED
        shared.notes.columns = own().columns = params.ranks[place.batch_head];
#else
        shared.notes.columns = HEAD_DIM;
#endif
        const i32& columns = shared.notes.columns;
        int count = 0, exact = 0;
        for (int pass = params.passes.begin(whole()); pass < params.passes.after(whole()); ++pass) {
            const int tiles = PassTiles(params, place, pass).count;
            count += tiles;
            exact += params.passes.reduced(pass) ? 0 : tiles;
        }
        // Consumers begin with a tile, maybe an exact one: it may have keys beyond the last, zeros and invisible.
        const bool none = (kFirstExact ? exact : count) == 0;
        own().count = count + none;
        own().exact = exact + (kFirstExact && none);
        if (none) {
            note(place, {0, 0, 0, 0});
            const int width = NEAR ? HEAD_DIM : columns;
            copy_tile(place, KEPT ? (params.seqlen_k + 7) / 8 * 8 : params.seqlen_k, width, true, true, true);
        }
        bool first = !(kFirstExact && none);
        for (int pass = params.passes.begin(whole()); pass < params.passes.after(whole()); ++pass) {
            const PassTiles tiles(params, place, pass);
            note(place, params.passes.band(pass, place.near));
            const int width = params.passes.reduced(pass) ? columns : HEAD_DIM;
            int key = tiles.first_key + (tiles.count - 1) * TILE_K;
            for (int left = tiles.count; left > 0; --left, key -= TILE_K) {
                copy_tile(place, key, width, !params.passes.reduced(pass), first, first || (RANKED && exact == 0));
                first = false;
                --exact;
            }
        }
        shared.notes.agenda.prepare(params, shared, shared.notes.number);
        copy_values(place, step - 1);
    }

    DEVICE void run() {
        Agenda& agenda = shared.notes.agenda;
        u32& number = shared.notes.number;
        number = 0;
        for (u32 work = agenda.first(params, shared); is_work(params, work); work = agenda.after(shared, number++)) {
            agenda.begin(params, work);
            shared.notes.place = shared.places[number % kPlaces];
            copy(shared.notes.place);
        }
    }
};
DEVICE void produce(const HopperParams& params, SharedStorage& shared) {
    Producer{params, shared, policy_evict_first(), policy_evict_last(), 0, 0}.run();
}
#else
DEVICE void produce(const HopperParams& params, SharedStorage& shared) {
    const u64 once = policy_evict_first();
    const u64 again = policy_evict_last();
    u32 step = 0;  // tiles of keys so far
    u32 place_number = 0;
    Agenda agenda;
    u32 work = agenda.first(params, shared);
    for (u32 number = 0; is_work(params, work); work = agenda.after(shared, number++)) {
        agenda.begin(params, work);
        const Place place = shared.places[number % kPlaces];
        Walk walk(params, place);
        if (walk.inside()) {
            load_keys(params, shared, shared.keys, step, place, walk.tile, again, HEAD_DIM);
            load_queries(params, shared, place_number, place, once, HEAD_DIM, true);
            ++place_number;
        }
        // What comes next is found before the last copy, which waits longest.
        do {
            if (walk.more()) {
                Walk next = walk;
                next.advance();
                load_keys(params, shared, shared.keys, step + 1, place, next.tile, again, HEAD_DIM);
            } else {
                agenda.prepare(params, shared, number);
            }
            if (walk.inside()) load_values(params, shared, step++, place, walk.tile, again);
            walk.advance();
        } while (walk.inside());
    }
}
#endif

// The piece of work with a number, which the producer chose; every warp of the readers gives it back.
DEVICE u32 take_work(SharedStorage& shared, u32 number, int lane) {
    shared.work_barriers.wait(number);
    const u32 work = __shfl_sync(kFullWarp, lane == 0 ? shared.work[number % kStages] : 0, 0);
    if (lane == 0) shared.work_barriers.release(number);
    return work;
}

// Where it is, as lane 0 has it: so that the compiler knows it to be the same for all.
DEVICE Place broadcast(const Place& place) {
    return {__shfl_sync(kFullWarp, place.batch_head, 0), __shfl_sync(kFullWarp, place.batch, 0),
            __shfl_sync(kFullWarp, place.head, 0), __shfl_sync(kFullWarp, place.first_row, 0),
            __shfl_sync(kFullWarp, place.only, 0)};
}
DEVICE Place place_of(const SharedStorage& shared, u32 number) { return broadcast(shared.places[number % kPlaces]); }

// Grouped: three warps that make Khat, a tile ahead of the consumers. The warp that starts copies takes no part: the
// fence after the sums would wait for its copies.
// Threads side by side sum chunks side by side, eight of them a row of a panel: reads and writes have no bank conflicts.
template <class Keys>
struct Builder {
    static constexpr int kAcross = 8;
    static constexpr int kDown = kBuilderThreads / kAcross;
    static constexpr int kRows = FusedTile::kPanels * kTerms;  // of Khat, its panels one below the other
    static constexpr int kOwn = (kRows + kDown - 1) / kDown;
    // So many reads are in flight; the compiler cannot know that no write hits a later read.
    static constexpr int kReads = kLongTiles ? 4 : 8;
    // Whether the next rows are read before these are summed and written. A step then takes builders half as long. Beside
    // exact keys, and with weights, this is 2 to 5% of the call; in other groups builders are not waited for, and sums in
    // a hurry are in the consumers' way: 0 to 2% slower (one H100, 4k to 16k tokens).
    static constexpr bool kAhead = (KEPT || kWeighted) && 2 * kMembers <= kReads;
    static constexpr int kParts = kAhead ? 2 : 1;  // of the reads in flight
    static constexpr int kAtOnce =
        kParts * kMembers >= kReads ? 1 : kOwn * kMembers <= kReads / kParts ? kOwn : kReads / kParts / kMembers;
    static_assert(!kGrouped || (RawTile::kWidth == 128 && kTerms % 8 == 0), "Builder: a row has eight chunks");
    static_assert(!kGrouped || RawTile::kBytes <= 1 << 16, "Builder: two offsets in a word");

    const HopperParams& params;
    SharedStorage& shared;
    Keys& keys;
    int thread, lane;
    // Where in a tile of raw keys the chunks lie that this thread sums, two offsets in a word.
    u32 members[(kOwn * kMembers + 1) / 2];
#if WEIGHTED
    const T* weights = nullptr;  // of the members of row(0); those of the others lie a constant apart
#endif

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

    template <bool kHalf>
    DEVICE void sum_groups(u32 step) {
        const u8* raw = reinterpret_cast<const u8*>(keys.raw[step % kStages].data);
        u8* khat = reinterpret_cast<u8*>(keys.k[step % kStages].data);
        Chunk chunks[kParts][kAtOnce][kMembers];
        read(chunks[0], raw, 0);
#pragma unroll
        for (int first = 0; first < kOwn; first += kAtOnce) {
            const int part = first / kAtOnce % kParts;
            if (kAhead && first + kAtOnce < kOwn) read(chunks[1 - part], raw, first + kAtOnce);
            if (!kAhead && first > 0) read(chunks[part], raw, first);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int of = row(first + i);
                const int to = of * FusedTile::kWidth + (thread % kAcross ^ of % 8) * kChunkBytes;
                const bool inside = kAhead && (kRows % kDown == 0 || first + i + 1 < kOwn) || of < kRows;
                if (first + i < kOwn && inside) {
                    const Chunk(&own)[kMembers] = chunks[part][i];
                    *reinterpret_cast<Chunk*>(khat + to) = kHalf ? sum_halves(own) : sum(own, first + i);
                }
            }
        }
    }

    // The chunks of row(first) and so many after it.
    DEVICE void read(Chunk (&chunks)[kAtOnce][kMembers], const u8* raw, int first) const {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int m = 0; m < kMembers; ++m) {
                const u32 from = member(min(first + i, kOwn - 1) * kMembers + m);
                chunks[i][m] = *reinterpret_cast<const Chunk*>(raw + from);
            }
        }
    }

    // Of the members of row(i).
    DEVICE Chunk sum(const Chunk (&chunks)[kMembers], int i) const {
#if WEIGHTED
        return sum_weighted_chunks<T>(chunks, [&](int member) { return weights[i * kDown * kMembers + member]; });
#else
        return sum_chunks<T>(chunks);
#endif
    }

#if WEIGHTED
    // Writes the weights of columns, which all builders read, and their shares over what these give of a column that is as
    // the weights say.
    DEVICE void tell_numbers(const float* of_columns, const float* shares, u32 place_number) {
        T* to = keys.weights[place_number % 2];
#pragma unroll 1
        for (int i = thread; i < HEAD_DIM; i += kBuilderThreads) {
            const int first = i / kMembers * kMembers;
            float square = 0.f;
            for (int column = first; column < first + kMembers; ++column) {
                square = fmaf(shares[column], of_columns[column], square);
            }
            keys.shares[i] = shares[i] / square;
#pragma unroll
            for (int panel = 0; panel < FusedTile::kPanels; ++panel) {
                to[panel * HEAD_DIM + i] = Traits<T>::from_float(of_columns[i]);
            }
        }
        weights = to + row(0) * kMembers;
        named_barrier_sync(1 + kConsumers, kBuilderThreads);  // behind the turns of consumers
    }
#endif

    DEVICE void run() {
        const bool wide = is_wide(params);
        u32 step = 0, place_number = 0;
        for (u32 number = 0; is_work(params, take_work(shared, number, lane)); ++number) {
            // Read by the lane that gives work back: nothing would order the others before what is written there next.
            Place told = {};
            if (lane == 0) told = shared.places[number % kPlaces];
            const Place place = broadcast(told);
#if !KEPT
            Walk walk(params, place);
            if (!walk.inside()) continue;
#endif
            const i64 block = static_cast<i64>(place.batch_head) * params.group_blocks +
                              place.first_row / BLOCK_M / params.tiles_per_block;
            const u8* permutation = params.permutation + block * HEAD_DIM;
            // There are no registers to keep what follows from it for the next tile.
            thread = anew(thread);
            find_members(permutation);
            shared.q_barriers[0].wait_empty(place_number);
            for (int i = thread; i < HEAD_DIM; i += kBuilderThreads) keys.order[i] = permutation[i];
#if WEIGHTED
            tell_numbers(params.weights + block * HEAD_DIM, params.shares + block * HEAD_DIM, place_number);
#endif
            mbarrier_arrive(shared_address(shared.q_barriers[0].full));
            ++place_number;
#if KEPT
            Walk walk(shared, keys.raw_barriers, step);
#endif
            for (; walk.inside(); walk.advance(), ++step) {
                keys.raw_barriers.wait(step);
                shared.k_barriers.wait_empty(step);
                if (HALF && !wide && walk.reduced()) {
                    sum_groups<true>(step);
                } else if (walk.reduced()) {
                    sum_groups<false>(step);
                }
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

    template <int kTiles>
    DEVICE void start_exact(float (&scores)[kTiles][4], u32 step) const {
        start_scores<T, QueryTile, KeyTile>(scores, queries, keys + step % kStages * u32(sizeof(KeyTile) / 16));
    }
    // steps: of 16 columns, those that count.
    DEVICE void start(float (&scores)[kKeyTiles][4], u32 step, int steps) const {
        const u32 stage = keys + step % kStages * u32(sizeof(KeyTile) / 16);
        if constexpr (RANKED && !COPIED) {
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
    bool wide = true;
#if KEPT
    u32 exact_queries, exact_keys;  // in shared memory as they came

    DEVICE Operands(SharedStorage& shared, int group)
        : keys(FusedTile::lower(shared_address(shared.keys.k[0].data))),
          exact_queries(QueryTile::lower(shared_address(shared.q.data) + group * kGroupRows * QueryTile::kWidth)),
          exact_keys(RawTile::lower(shared_address(shared.keys.raw[0].data))) {}
    template <int kTiles>
    DEVICE void start_exact(float (&scores)[kTiles][4], u32 step) const {
        const u32 stage = exact_keys + step % kStages * u32(sizeof(RawTile) / 16);
        if (HALF && !wide) {
            start_scores_down<f16, QueryTile, RawTile>(scores, exact_queries, stage);
        } else {
            start_scores_down<T, QueryTile, RawTile>(scores, exact_queries, stage);
        }
    }
#else
    DEVICE Operands(SharedStorage& shared, int) : keys(FusedTile::lower(shared_address(shared.keys.k[0].data))) {}
#endif

    template <int kTiles>
    DEVICE void start(float (&scores)[kTiles][4], u32 step, int) const {
        const u32 stage = keys + step % kStages * u32(sizeof(FusedTile) / 16);
        if (HALF && !wide) {
            start_scores_of_values<f16, FusedTile>(scores, queries, stage);
        } else {
            start_scores_of_values<T, FusedTile>(scores, queries, stage);
        }
    }

    // As a lane of a product has it: T, and of KEPT and HALF, whose queries are float16 by now, that.
    template <class Keys>
    DEVICE T value(const QueryTile& q, int row, const Keys& storage, int group) const {
        const u8* columns = storage.order + group * kMembers;
        float total = 0.f;
        if constexpr (kWeighted) {
#pragma unroll
            for (int member = 0; member < kMembers; ++member) {
                const float share = storage.shares[group * kMembers + member];
                total = fmaf(share, Traits<T>::to_float(q.at(row, columns[member])), total);
            }
            return Traits<T>::from_float(total);
        } else if constexpr (MEAN) {
#pragma unroll
            for (int member = 0; member < kMembers; ++member) {
                const T one = q.at(row, columns[member]);
                total += HALF && KEPT && !wide ? f16_to_float(one.bits) : Traits<T>::to_float(one);
            }
            total *= 1.f / kMembers;
            return HALF && KEPT && !wide ? T{float_to_f16(total)} : Traits<T>::from_float(total);
        } else {
            return q.at(row, columns[0]);
        }
    }

    // row: this lane's first row of the tile.
    template <class Keys>
    DEVICE void gather(const QueryTile& q, const Keys& storage, int row, int lane) {
#pragma unroll
        for (int i = 0; i < kTerms / 16 * 4; ++i) {
            const int group = i / 2 * 8 + lane % 4 * 2;
            const int own = row + i % 2 * 8;
            const T low = value(q, own, storage, group);
            const T high = value(q, own, storage, group + 1);
            const u32 pair = low.bits | static_cast<u32>(high.bits) << 16;
            queries[i / 4][i % 4] = HALF && !KEPT && !wide ? halve(pair) : pair;
        }
    }
};

// What the scores of a row lack that are products of Qhat and Khat. row: within the sequence.
DEVICE float lacking(const HopperParams& params, const Place& place, int row) {
#if RANKED || KEPT
    if (params.shift && row < params.seqlen_q) {
        return params.shift[static_cast<i64>(place.batch_head) * params.seqlen_q + row];
    }
#endif
    return 0.f;
}

// Turns maxima of scores of Q and K into those of scores of Qhat and Khat, which only a constant of each row sets apart.
// row: this lane's first row within the sequence.
DEVICE void subtract_lacking(const HopperParams& params, const Place& place, Softmax& softmax, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        softmax.maximum[0][half] -= lacking(params, place, row + half * 8) * 1.4426950409f;
    }
}

// Normalises the output, and stores it and the lse. row: this lane's first row within the sequence. lacks: whether maxima
// are of scores of Qhat and Khat. Returns which of this lane's two rows have an output, or a sum, beyond all numbers, or none.
DEVICE u32 store_output(const HopperParams& params, const Place& place, float (&output)[1][kOutTiles][4],
                        Softmax& softmax, int row, int lane, bool lacks) {
    softmax.reduce_sums();
    constexpr int kChunks = HEAD_DIM_V / 8;
    constexpr int kQuads = (kChunks + 3) / 4;
    // Each lane of a quad has two columns of every chunk; after the transpose it has a chunk out of four. All are made
    // before the first is stored, since what a branch leads past ptxas makes one after another.
    union {
        Chunk chunk;
        u32 word[4];
        T element[8];
    } values[2][kQuads];
    u32 lost = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = softmax.sum[0][half];
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // a row without keys is zero
        u32 zero = 0;  // unless a pair was none or infinite
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = output[0][min(quad * 4 + i, kChunks - 1)];
                const u32 word = Traits<T>::pack(pair[half * 2] * inverse, pair[half * 2 + 1] * inverse);
                zero = Traits<T>::fma(word, 0, zero);
                values[half][quad].word[i] = word;
            }
            transpose_quad(values[half][quad].word, lane);
        }
        if (zero != 0 || sum * 0.f != 0.f) lost |= 1 << half;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int own = row + half * 8;
        const bool inside = own < params.seqlen_q;
        T* out = params.out + place.batch * params.out_batch + place.head * params.out_head + own * params.out_row;
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const int chunk = quad * 4 + lane % 4;
            if (!inside || chunk >= kChunks) continue;
            if (params.out_aligned) {
                *reinterpret_cast<Chunk*>(out + chunk * 8) = values[half][quad].chunk;
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) out[chunk * 8 + i] = values[half][quad].element[i];
            }
        }
        const float sum = softmax.sum[0][half];
        if (params.lse && lane % 4 == 0 && inside) {
            float log_sum = fmaf(softmax.maximum[0][half], 0.6931471806f, logf(sum));
            if (lacks) log_sum += lacking(params, place, own);
            params.lse[static_cast<i64>(place.batch_head) * params.seqlen_q + own] = sum == 0.f ? -infinity() : log_sum;
        }
    }
    return lost;
}

// One warpgroup of consumers.
struct Consumer {
    const HopperParams& params;
    SharedStorage& shared;
    int group;  // 0 to kConsumers - 1
    int held_lane;

    DEVICE int lane() const { return kCrowded ? thread_index() % kWarpSize : held_lane; }

    // Of this lane, the first of two in the tile. Made where it is used.
    DEVICE int row() const {
        const int own = thread_index() - kGroupThreads;
        return own / kWarpSize * 16 + own % kWarpSize / 4;
    }

    // Barrier 1 + g is the turn of consumer g.
    DEVICE void wait_for_turn() { named_barrier_sync(1 + group, 2 * kGroupThreads); }
    DEVICE void pass_turn(int never = 0) { named_barrier_arrive(1 + (group + 1) % kConsumers + never, 2 * kGroupThreads); }

    // Scores to weights, in turn if they have to be; the turn is passed when a few exponentials are still to come, which takes
    // as long. ptxas moves barriers past what does not depend on them. So a branch that is not taken follows the first, and
    // a weight decides which the second one is: it is never negative, and ptxas knows it, but not that groups are not.
    template <int kTiles>
    DEVICE void exponentiate(float (&scores)[1][kTiles][4], Softmax& softmax, const float (&rescale)[1][2],
                             float (&of_tile)[1][2]) {
        const float least = -static_cast<float>(group);
        if constexpr (kExponentsInTurn) {
            wait_for_turn();
            if (rescale[0][0] < least) shared.k_barriers.wait(0);
        }
        softmax.exponentiate(scores, params.score_scale, rescale, of_tile);
        if constexpr (kExponentsInTurn) pass_turn(scores[0][kTiles - 3][0] < least);
    }

    // A warp is done with a stage: every warp tells, since each waits for its own part of a product.
    template <int kRingStages>
    DEVICE void release(RingBarriers<kRingStages>& ring, u32 n) {
        if (lane() == 0) ring.release(n);
    }

#if !RANKED && !KEPT
    // Which keys the rows of a tile of queries see: those that every row of the warpgroup sees, and each of this lane's.
    struct Visible {
        int first_tile, tiles;  // of keys that every row sees
        int last_key;           // that some row sees
        KeySpan rows[2];

        // Whether a tile of keys needs no mask.
        DEVICE bool all(int tile) const { return static_cast<u32>(tile - first_tile) < static_cast<u32>(tiles); }
    };
    DEVICE Visible visible(int first_row) const {
        const Band band = {params.band_low, params.band_high, params.seqlen_k};
        const int group_row = first_row + group * kGroupRows;
        const int last_row = max(group_row, min(group_row + kGroupRows, params.seqlen_q) - 1);
        Visible keys;
        keys.first_tile = (band.first_key(last_row) + TILE_K - 1) / TILE_K;
        keys.tiles = max((band.last_key(group_row) + 1) / TILE_K - keys.first_tile, 0);
        keys.last_key = band.last_key(last_row);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first_row + row() + half * 8;
            keys.rows[half] = {band.first_key(query), band.last_key(query)};
        }
        return keys;
    }
#else
    struct Visible {};
    DEVICE Visible visible(int) const { return {}; }
#endif

    // KEPT: K comes in float16, and so the queries have to, those of this consumer.
    DEVICE void halve_queries() {
        constexpr int kChunks = kGroupRows * QueryTile::kWidth / kChunkBytes;  // of a panel
        u8* queries = reinterpret_cast<u8*>(shared.q.data) + group * kGroupRows * QueryTile::kWidth;
        constexpr int kOwn = QueryTile::kPanels * kChunks / kGroupThreads;
        const auto place = [&](int turn) -> Chunk& {
            const int i = turn * kGroupThreads + thread_index() % kGroupThreads;
            return *reinterpret_cast<Chunk*>(queries + i / kChunks * QueryTile::kPanelBytes + i % kChunks * kChunkBytes);
        };
        Chunk chunks[kOwn];  // all are read before the first is written: the compiler cannot know that they differ
#pragma unroll
        for (int turn = 0; turn < kOwn; ++turn) chunks[turn] = place(turn);
#pragma unroll
        for (int turn = 0; turn < kOwn; ++turn) {
            halve(chunks[turn]);
            place(turn) = chunks[turn];
        }
        fence_proxy_async();
        named_barrier_sync(1 + kConsumers + group, kGroupThreads);
    }

    // Grouped: the queries come into registers, and their place is free for the next tile.
    template <class Queries>
    DEVICE void take_queries(Queries& queries, u32 place_number) {
        queries.gather(shared.q, shared.keys, row(), lane());
        shared.q_barriers[0].release(place_number);
    }

    // Scores of a tile. exact: of one that is, where these have a loop.
    template <class Queries>
    DEVICE void start(const Queries& queries, float (&scores)[kKeyTiles][4], u32 step, const Walk& walk, bool exact) {
        if constexpr (kExactLoop) {
            if (exact) return queries.start_exact(scores, step);
        }
        queries.start(scores, step, RANK ? RANK / 16 : walk.width() / 16);
    }

    // KEPT, behind the loop over exact tiles: the reduced ones, if there are any, have other queries, and other maxima.
    template <class Queries>
    DEVICE void change(int loop, Queries& queries, const Walk& walk, Softmax& softmax, u32 number) {
        if constexpr (KEPT) {
            if (loop != 0) return;
            if (!walk.inside()) return shared.q_barriers[0].release(number);
            take_queries(queries, number);
            const Place place = place_of(shared, number);
            subtract_lacking(params, place, softmax, place.first_row + row());
        }
    }

    // Whether the producer tells that this consumer has queries that do not see all keys of a tile. Asked before its scores
    // are waited for, so that the softmax does not begin with waiting for shared memory.
    DEVICE bool told_cut(u32 step) const {
#if RANKED || KEPT
        return shared.steps[step % kSteps].cut >> group & 1;
#else
        return false;
#endif
    }

    // Scores of a tile as the softmax wants them, and into its maxima.
    template <bool kCut = false, int kTiles>
    DEVICE void raise(float (&scores)[1][kTiles][4], Softmax& softmax, float (&rescale)[1][2], u32& known,
                      const Visible& keys, const Walk& walk, u32 step, bool cut) {
#if RANKED || KEPT
        if constexpr (SCORE) scale_scores(scores, params.scale, params.softcap);
        if (!kCut && !softmax.need_look(cut, known)) return;
        const Step& tile = shared.steps[step % kSteps];
        if (kCut || cut) {
            KeySpan rows[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = row() + half * 8;
                rows[half] = {query + tile.low, min(query + tile.high, tile.end - 1)};
#if KEPT
                rows[half].first = max(rows[half].first, tile.first);
#endif
            }
            apply_mask_by_bits(scores[0], rows, lane() % 4 * 2);
        }
#else
        const int key = walk.tile * TILE_K;
        if constexpr (SCORE) scale_scores(scores, params.scale, params.softcap);
        cut = kCut || !keys.all(walk.tile);
        if (!kCut && !softmax.need_look(cut, known)) return;
        if (cut) apply_mask(scores[0], keys.rows, key + lane() % 4 * 2);
#endif
        softmax.raise_known(scores, kCut || cut, known, params.score_scale, rescale);
    }

    // Whether a tile is short for this consumer, and not the last one of the first loop.
    DEVICE bool is_short(const Visible& keys, const Walk& walk, u32 step) const {
#if RANKED || KEPT
        // Broadcast, so that the compiler knows it to be the same for all.
        return walk.index + 1 < walk.exact && __shfl_sync(kFullWarp, shared.steps[step % kSteps].cut >> (4 + group) & 1, 0);
#else
        return walk.more() && keys.last_key < walk.tile * TILE_K + kShortKeys;
#endif
    }

    // All tiles of keys, of a tile of queries that has none for this consumer: given back as they come.
    DEVICE void leave_out(Walk& walk, u32& step, u32& place_number, RingBarriers<1>& own_queries, bool in_turn) {
        if (!walk.inside()) return;  // then nobody takes a turn
#if RANKED || KEPT
        __syncwarp();  // all lanes have read the first step
#endif
        for (; walk.inside(); walk.advance()) {
            shared.k_barriers.wait(step);
            if (kGrouped ? !walk.more() : walk.last_of_queries()) {
                own_queries.wait(place_number);
                if constexpr (kGrouped) {
                    own_queries.release(place_number);
                } else {
                    release(own_queries, place_number);
                }
                ++place_number;
            }
            skip(step++);
        }
        if (in_turn) {  // in the end: who begins before it may wait for tiles until then
            wait_for_turn();
            pass_turn();
        }
    }

    // A tile of which this consumer's queries see nothing.
    DEVICE void skip(u32 step) {
        release(shared.k_barriers, step);
        if constexpr (kExponentsInTurn) {
            wait_for_turn();
            pass_turn();
        }
        shared.v_barriers.wait(step);
        release(shared.v_barriers, step);
    }

    // output += P V of a tile, from the wait for its values to the end of the product.
    template <int kSteps>
    DEVICE void add_values(float (&output)[1][kOutTiles][4], const u32 (&weights)[kSteps][4], u32 values, u32 step) {
        shared.v_barriers.wait(step);
        wgmma_fence();
        start_output<T, ValueTile>(output[0], weights, values + step % kStages * kValueStage);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(output[0]);
    }

    // A short tile from its first product to its second. Nothing runs beside these here, but what the other consumers do.
    // What it finds to be known is forgotten, and the next tile looks for its maxima: see docs/hopper.md, "Short tiles".
    template <class Queries>
    DEVICE void do_short(const Queries& queries, float (&output)[1][kOutTiles][4], Softmax& softmax, u32 known,
                         const Visible& keys, const Walk& walk, u32 step, u32 values) {
        float scores[1][kShortKeys / 8][4];
        float rescale[1][2], of_tile[1][2];
        u32 weights[kShortKeys / 16][4];
#if !RANKED && !KEPT
        if (keys.last_key < walk.tile * TILE_K) return skip(step);
#endif
        if constexpr (kGrouped && !KEPT) {
            queries.start(scores[0], step, 0);
        } else {
            queries.start_exact(scores[0], step);
        }
        wgmma_wait<0>();
        wgmma_pin(scores[0]);
        release(shared.k_barriers, step);
        softmax.begin(rescale);
        raise<true>(scores, softmax, rescale, known, keys, walk, step, true);
        softmax.apply(rescale, output);
        exponentiate(scores, softmax, rescale, of_tile);
        pack_weights<T>(weights, scores[0]);
        add_values(output, weights, values, step);
#if RANKED || KEPT
        __syncwarp();  // all lanes have read this step, whose place may be written after the next one
#endif
        release(shared.v_barriers, step);
    }

    // This lane's rows that lost weights, in a piece of work before.
    DEVICE u8& lost_rows(u32 slot) { return shared.lost_rows[slot][row() % 8 + row() / 16 * 8]; }
    DEVICE void tell_lost(u32 rows, u32 slot) {
        __syncwarp();  // all lanes have read what they lost before
        if (lane() % 4 == 0) lost_rows(slot) = static_cast<u8>(rows);
        const bool any = __any_sync(kFullWarp, rows);
        if (lane() == 0) shared.lost[slot][row() / 16] = any;
        __syncwarp();
    }

    DEVICE void run() {
        Operands<kGrouped> operands(shared, group);
#if HALF
        operands.wide = is_wide(params);
#endif
        const u32 values = ValueTile::lower(shared_address(shared.v[0].data));
        RingBarriers<1>& own_queries = shared.q_barriers[RANKED ? group : 0];
        if (kExponentsInTurn || (kBeginInTurn && params.turns > 0)) {
            if (group == kConsumers - 1) pass_turn();  // the first turn is that of consumer 0
        }
        u32 step = 0;
        u32 place_number = 0;
        for (u32 work_number = 0;; ++work_number) {
            const u32 work = take_work(shared, work_number, lane());
            if (!is_work(params, work)) break;
            const Place place = place_of(shared, work_number);
#if RANKED || KEPT
            Walk walk(shared, shared.k_barriers, step);
#else
            Walk walk(params, place);
#endif
            const Visible visible_keys = visible(place.first_row);
            float output[1][kOutTiles][4] = {};
            Softmax softmax;
            softmax.clear();
            u32 known = Softmax::kUnsettled;
            if (work & kAgain) known |= kAgain | lost_rows(shared.again[work_number % kStages]);
            const bool apart = !kGrouped && place.only >= 0;
            const bool left_out = place.first_row + group * kGroupRows >= params.seqlen_q || (apart && place.only != group);
            if (left_out) {
                leave_out(walk, step, place_number, own_queries, kBeginInTurn && work_number < params.turns && !apart);
            } else if (walk.inside()) {
                float scores[1][kKeyTiles][4];
                float rescale[1][2] = {{1.f, 1.f}}, of_tile[1][2];
                u32 weights[TILE_K / 16][4];
                own_queries.wait(place_number);
                if constexpr (kGrouped && !KEPT) take_queries(operands, place_number);
#if HALF && KEPT
                if (!operands.wide) halve_queries();
#endif
                shared.k_barriers.wait(step);
                if constexpr (kShortTiles) {
                    for (; is_short(visible_keys, walk, step); walk.advance()) {
                        do_short(operands, output, softmax, known, visible_keys, walk, step, values);
                        shared.k_barriers.wait(++step);
                    }
                }
                bool cut = told_cut(step);
                const bool in_turn = kBeginInTurn && work_number < params.turns && !apart;
                if (in_turn) wait_for_turn();
                if (walk.width() > 0) {
                    start(operands, scores[0], step, walk, kFirstExact || !walk.reduced());
                    wgmma_wait<0>();
                } else {
                    wgmma_clear(scores[0]);
                }
                wgmma_pin(scores[0]);
                if (in_turn) pass_turn();
                release(shared.k_barriers, step);
                bool other_queries = !kGrouped && walk.last_of_queries();
                if (other_queries) release(own_queries, place_number);
                raise(scores, softmax, rescale, known, visible_keys, walk, step, cut);
                if constexpr (kShortTiles) softmax.apply(rescale, output);
                exponentiate(scores, softmax, rescale, of_tile);
                pack_weights<T>(weights, scores[0]);

                if (!kGrouped && walk.more()) shared.k_barriers.wait(step + 1);
                walk.advance();
                int loop = 0;
#if RANKED || KEPT
                // The tiles of which a head multiplies no columns are the last ones. They have a loop of their own: if a
                // branch led past a product, ptxas would let every product wait for the one before. So have those of
                // KEPT that are reduced, whose operands lie elsewhere, and those of RANK, whose products are fewer.
#pragma unroll
                for (; loop < 2; change(loop++, operands, walk, softmax, work_number))
#endif
                for (; walk.inside() && (loop == 1 || walk.in_first_loop()); walk.advance()) {
                    ++step;
                    if constexpr (kGrouped) shared.k_barriers.wait(step);
                    if (RANKED && other_queries) own_queries.wait(++place_number);
                    if (kExactLoop || loop == 0) start(operands, scores[0], step, walk, loop == 0);
                    shared.v_barriers.wait(step - 1);
                    wgmma_fence();
                    start_output<T, ValueTile>(output[0], weights, values + (step - 1) % kStages * kValueStage);
                    wgmma_commit();
                    softmax.begin(rescale);
                    if constexpr (kWide) softmax.follow<Traits<T>::kLarge>(softmax.sum, rescale);
                    if (RANKED && other_queries) {
                        const Place found = place_of(shared, work_number);
                        subtract_lacking(params, found, softmax, found.first_row + row());
                    }
                    if (!kExactLoop && loop == 1) wgmma_clear(scores[0]);
                    cut = told_cut(step);
#if RANKED || KEPT
                    __syncwarp();  // all lanes have read the steps before this one, whose places may be written next
#endif
                    wgmma_wait<1>();
                    wgmma_pin(scores[0]);
                    release(shared.k_barriers, step);
                    other_queries = !kGrouped && walk.last_of_queries();
                    if (other_queries) release(own_queries, place_number);
                    raise(scores, softmax, rescale, known, visible_keys, walk, step, cut);
                    if constexpr (kEarlyWeights) exponentiate(scores, softmax, rescale, of_tile);
                    // ptxas would move the wait for the last product up, before all this, if the next branch did not
                    // depend on it and end the block. Sums and factors are never negative.
                    const float (&last)[2] = kEarlyWeights ? of_tile[0] : rescale[0];
                    const bool early = !kGrouped && walk.more();
                    if (early || last[0] + last[1] < 0.f) shared.k_barriers.wait(step + 1);
                    wgmma_wait<0>();
                    wgmma_pin(output[0]);
                    wgmma_pin(scores[0]);  // nothing is packed while the last product reads the old weights
                    release(shared.v_barriers, step - 1);
                    softmax.apply(rescale, output);
                    if constexpr (!kEarlyWeights) exponentiate(scores, softmax, rescale, of_tile);
                    pack_weights<T>(weights, scores[0]);
                    if constexpr (!kWide) {
                        softmax.begin(rescale);
                        if (softmax.follow<Traits<T>::kLarge>(of_tile, rescale)) {
                            softmax.rescale_sum(rescale);
                            softmax.apply(rescale, scores);
                            softmax.apply(rescale, output);
                            pack_weights<T>(weights, scores[0]);
                        }
                    }
                }
                add_values(output, weights, values, step);
                release(shared.v_barriers, step);
                ++step;
                ++place_number;
            }
            const Place found = place_of(shared, work_number);  // again: in the loop it would take registers
            if constexpr (kTellFirst) tell_lost(known & kAgain ? 0 : softmax.lost(output), work_number % kStages);
            const int first_row = left_out ? params.seqlen_q : found.first_row + row();  // nothing to store
            u32 rows = store_output(params, found, output, softmax, first_row, lane(), walk.ends_reduced());
            if constexpr (!kTellFirst) {
                rows |= __shfl_xor_sync(kFullWarp, rows, 1);
                rows |= __shfl_xor_sync(kFullWarp, rows, 2);
                tell_lost(known & kAgain ? 0 : rows, work_number % kStages);
            }
            if (lane() == 0) mbarrier_arrive(shared_address(&shared.done[work_number % kStages]));
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
#if !COPIED
        prefetch_tensor_map(&params.khat);
#endif
#endif
        // Readers give back warp by warp, and so do the warps that write what no copy does; but each thread for itself the
        // order of columns and the queries, once for a tile of them.
        constexpr int kReaders = 4 * kConsumers;
        constexpr int kBuilders = kGrouped ? kBuilderThreads / kWarpSize : 0;
#pragma unroll
        for (int part = 0; part < kQueryParts; ++part) {
            shared.q_barriers[part].init((kGrouped ? kConsumerThreads : kReaders) / kQueryParts, 1 + kBuilders * kWarpSize);
        }
        shared.k_barriers.init(kReaders, kGrouped ? kBuilders : 1);
        shared.v_barriers.init(kReaders, 1);
        shared.work_barriers.init(kReaders + kBuilders, 1);
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared_address(&shared.done[stage]), kReaders);
        }
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
        Consumer{params, shared, warpgroup - 1, thread % kWarpSize}.run();
    }
}
