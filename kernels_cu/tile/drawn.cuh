// What the two kernels share that sample the scores of a call for its low-rank factors: smxx_lowrank_rows.cu and
// smxx_lowrank_sums.cu. A unit is a KV head of a batch entry, with the query heads that read it. Of these, kDrawn rows are
// drawn; their scores with the keys, or with kMostKeys of them all over the sequence, say which keys matter.
//
// Both work in bfloat16, whatever the dtype: what they find decides on the factors, whose error a call does not add to.
// Keys come less a center, which softmax does not see, so that rounding does not hide how they differ. What is not a
// finite number counts as zero, since one such row must not spoil the factors of all.
#pragma once
#include "tile/mask.cuh"
#include "tile/product.cuh"

constexpr int kDrawn = 64;             // LOWRANK_ROWS in plan.py
constexpr int kMostKeys = 1 << 11;     // LOWRANK_KEYS in plan.py
constexpr int kCenterKeys = 128;       // of these, that the center is the mean of
constexpr int kRowWarps = kDrawn / 16;
constexpr int kPartKeys = 16;          // of a tile, that a warp has
constexpr int kKeyTiles = kPartKeys / 8;
constexpr int kEights = 8;             // columns that a thread reads at once
constexpr float kLog2E = 1.4426950409f;

// Which row of q is a sampled one: its head within the unit, and its place.
struct DrawnRow {
    i32 head, row;
};

// Where rows are, as both kernels need it. Strides are in elements.
struct DrawnCall {
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i32 heads_kv, heads_per_kv, seqlen_k;
    i32 samples;  // keys that are looked at: all, or kMostKeys

    // Of a unit's keys the first, and one of its queries, counted from those of all.
    DEVICE i64 keys(int unit) const { return unit / heads_kv * k_batch + unit % heads_kv * k_head; }
    DEVICE i64 row(int unit, const DrawnRow& drawn) const {
        return unit / heads_kv * q_batch + (unit % heads_kv * heads_per_kv + drawn.head) * q_head + drawn.row * q_row;
    }
    // A sampled key: one of each of kMostKeys equal parts of the sequence, at places that are all different.
    DEVICE int key(int sample) const {
        if (samples < kMostKeys) return sample;
        const u32 place = static_cast<u32>(sample) << 16 | static_cast<u32>(sample) * 2654435769u >> 16;
        return static_cast<int>(static_cast<u64>(place) * static_cast<u32>(seqlen_k) >> 27);
    }
};
static_assert(kMostKeys << 16 == 1 << 27, "places are parts of the sequence");

// Columns of sums of products, filled up with zeros: whole matrix instructions, and beyond 128 two halves of those
// (lowrank_columns in plan.py).
template <int kHeadDim>
constexpr int kDrawnColumns = kHeadDim > 128 ? (kHeadDim + 63) / 64 * 64 : (kHeadDim + 31) / 32 * 32;

// What a part of a drawn row's softmax adds up to: its maximum, in powers of two, and sums of weights, of all keys and of those
// that are not exact.
struct RowSums {
    float maximum = -infinity(), sum = 0.f, reduced = 0.f;

    // Makes weights those beside a maximum that is not lower.
    DEVICE void rise(float top) {
        const float rescale = exp2_approx(maximum - (top == -infinity() ? 0.f : top));
        sum *= rescale;
        reduced *= rescale;
        maximum = top;
    }
    DEVICE float weight(float score) const { return exp2_approx(score - (maximum == -infinity() ? 0.f : maximum)); }
    // With those of the lanes next to this one, so many in all.
    DEVICE void gather(int lanes) {
#pragma unroll
        for (int distance = 1; distance < lanes; distance *= 2) {
            rise(fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, distance)));
            sum += __shfl_xor_sync(kFullWarp, sum, distance);
            reduced += __shfl_xor_sync(kFullWarp, reduced, distance);
        }
    }
};

// Two drawn rows of a lane, and what they see.
struct OwnRows {
    KeySpan seen[2];
    KeyRange near[2];  // that stay exact

    DEVICE void find(const DrawnRow* drawn, int place, const Band& band, const ExactBlocks& blocks) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = drawn[place + half * 8].row;
            seen[half] = {band.first_key(row), band.last_key(row)};
            near[half] = blocks.of(row, band.seqlen_k);
        }
    }
    DEVICE bool keeps(int half, int key, int sinks) const {
        return key < sinks || (key >= near[half].first && key < near[half].end);
    }
};

// The keys of a lane, of its warp's part of a tile: those of the samples first + 8 nt + lane % 4 * 2 (+ 1).
struct OwnKeys {
    int key[kKeyTiles][2];  // beyond the last ones that no row sees

    DEVICE void find(const DrawnCall& call, int first, int lane) {
#pragma unroll
        for (int n = 0; n < 2 * kKeyTiles; ++n) {
            key[n / 2][n % 2] = call.key(first + n / 2 * 8 + lane % 4 * 2 + n % 2);
        }
    }
};

// What goes by the columns of Q and K, and whether every row of theirs starts on 16 bytes.
template <int kHeadDim, bool kAligned>
struct Drawn {
    static constexpr bool kWide = kHeadDim > 128;
    static constexpr int kKeys = kWide ? 32 : 64;  // of a tile; lowrank_keys in plan.py
    static constexpr int kThreads = kWide ? 256 : 512;
    static constexpr int kKeyParts = kThreads / kWarpSize / kRowWarps;  // of a tile, that warps with the same rows share
    static constexpr int kColumns = kDrawnColumns<kHeadDim>;
    static constexpr int kRowEights = kHeadDim / kEights;
    static_assert(kHeadDim % kEights == 0 && kKeys == kKeyParts * kPartKeys, "rows are whole eights, and warps share tiles");

    typedef SharedTile<bf16, kDrawn, kColumns> QueryTile;
    typedef SharedTile<bf16, kKeys, kColumns> KeyTile;
    typedef SharedTile<bf16, kPartKeys, kColumns> PartTile;

    // Eight neighbours of a row as they are in memory.
    template <class T>
    struct Eight {
        static constexpr int kChunks = kEights * int(sizeof(T)) / kChunkBytes;
        Chunk chunk[kChunks];

        DEVICE void read(const T* from, bool valid) {
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                const T* at = from + i * (kChunkBytes / int(sizeof(T)));
                if constexpr (kAligned) {
                    chunk[i] = valid ? *reinterpret_cast<const Chunk*>(at) : Chunk{{0, 0, 0, 0}};
                } else {
                    chunk[i] = gather_chunk(at, valid);
                }
            }
        }
        DEVICE float at(int i) const {
            const u32 word = chunk[i * int(sizeof(T)) / kChunkBytes].word[i * int(sizeof(T)) / 4 % 4];
            float x;
            if constexpr (sizeof(T) == 4) {
                x = __uint_as_float(word);
            } else {
                x = i % 2 ? Traits<T>::high(word) : Traits<T>::low(word);
            }
            return fabsf(x) < infinity() ? x : 0.f;
        }
    };

    // The mean of some of the keys, in every thread block the same bits. The caller waits for all threads afterwards.
    template <class T>
    static DEVICE void find_center(float (&center)[kColumns], float (&parts)[kThreads * kEights], const T* k,
                                   const DrawnCall& call) {
        constexpr int kShares = kThreads / kRowEights;
        constexpr int kReads = (kCenterKeys + kShares - 1) / kShares;
        const int eight = thread_index() % kRowEights, share = thread_index() / kRowEights;
        if (share < kShares) {
            Eight<T> own[kReads];
#pragma unroll
            for (int n = 0; n < kReads; ++n) {
                const int i = share + n * kShares;
                const bool valid = i < kCenterKeys;
                const i64 key = call.key(valid ? (2 * i + 1) * call.samples / (2 * kCenterKeys) : 0);
                own[n].read(k + key * call.k_row + eight * kEights, valid);
            }
#pragma unroll
            for (int c = 0; c < kEights; ++c) {
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < kReads; ++n) sum += own[n].at(c);
                parts[share * kHeadDim + eight * kEights + c] = sum;
            }
        }
        __syncthreads();
        for (int column = thread_index(); column < kColumns; column += kThreads) {
            float sum = 0.f;
            if (column < kHeadDim) {
#pragma unroll 8
                for (int i = 0; i < kShares; ++i) sum += parts[i * kHeadDim + column];
            }
            center[column] = sum / kCenterKeys;
        }
    }

    // A thread's part of a tile of rows, read ahead.
    template <class T, class Tile>
    struct Ahead {
        static constexpr int kAll = Tile::kRows * kRowEights;
        static constexpr int kReads = (kAll + kThreads - 1) / kThreads;
        Eight<T> own[kReads];

        static DEVICE bool inside(int index) { return kAll % kThreads == 0 || index < kAll; }

        // Keys from this sample on, of which so many are left.
        DEVICE void keys(const T* k, const DrawnCall& call, int first, int left) {
#pragma unroll
            for (int i = 0; i < kReads; ++i) {
                const int index = thread_index() + i * kThreads;
                const int row = index / kRowEights;
                const bool valid = inside(index) && row < left;
                const i64 key = call.key(valid ? first + row : 0);
                own[i].read(k + key * call.k_row + index % kRowEights * kEights, valid);
            }
        }
        DEVICE void queries(const T* q, const DrawnCall& call, int unit, const DrawnRow* drawn) {
#pragma unroll
            for (int i = 0; i < kReads; ++i) {
                const int index = thread_index() + i * kThreads;
                const DrawnRow row = drawn[inside(index) ? index / kRowEights : 0];
                own[i].read(q + call.row(unit, row) + index % kRowEights * kEights, inside(index));
            }
        }
        // Rows that are not left become zero.
        template <bool kCentered>
        DEVICE void store(Tile& tile, const float* center, int left) const {
#pragma unroll
            for (int i = 0; i < kReads; ++i) {
                const int index = thread_index() + i * kThreads;
                if (!inside(index)) break;
                const int row = index / kRowEights, column = index % kRowEights * kEights;
                Chunk packed, off[2];
                if constexpr (kCentered) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) off[half] = *reinterpret_cast<const Chunk*>(center + column + half * 4);
                }
#pragma unroll
                for (int pair = 0; pair < kEights / 2; ++pair) {
                    float x[2];
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int place = pair * 2 + c;
                        x[c] = own[i].at(place);
                        if constexpr (kCentered) x[c] -= __uint_as_float(off[place / 4].word[place % 4]);
                    }
                    packed.word[pair] = row < left ? Traits<bf16>::pack(x[0], x[1]) : 0;
                }
                *reinterpret_cast<Chunk*>(&tile.at(row, column)) = packed;
            }
        }
    };

    // Columns that are filled up.
    template <class Tile>
    static DEVICE void clear_rest(Tile& tile) {
        constexpr int kRest = kColumns / kEights - kRowEights;
        constexpr int kAcross = kRest > 0 ? kRest : 1;
        for (int i = thread_index(); i < Tile::kRows * kRest; i += kThreads) {
            *reinterpret_cast<Chunk*>(&tile.at(i / kAcross, (kRowEights + i % kAcross) * kEights)) = Chunk{{0, 0, 0, 0}};
        }
    }

    // Scores of a warp's 16 rows with its part of a tile's keys, in powers of two; minus infinity for what they do not see.
    static DEVICE void score(float (&scores)[kKeyTiles][4], u32 queries, const KeyTile& keys, int part, const OwnRows& rows,
                      const OwnKeys& own, int lane, float scale) {
        typedef float One[1][kKeyTiles][4];
        const PartTile& tile = *reinterpret_cast<const PartTile*>(&keys.at(part * kPartKeys, 0));
        multiply_queries_keys<bf16, 0, kColumns / 16, 0, QueryTile::kPitch>(reinterpret_cast<One&>(scores), queries, tile, lane);
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const KeySpan& seen = rows.seen[i / 2];
                const int key = own.key[nt][i % 2];
                const bool sees = key >= seen.first && key <= seen.last;
                scores[nt][i] = sees ? scores[nt][i] * scale : -infinity();
            }
        }
    }
};
