// Which keys a query sees: a band around its own position, cut at the ends of the sequence.
#pragma once
#include "ptx/arch.cuh"

// Query i sees the keys from i + low to i + high, within [0, seqlen_k).
struct Band {
    i64 low;
    i64 high;
    int seqlen_k;

    DEVICE int first_key(int query) const {
        const i64 key = query + low;
        return key < 0 ? 0 : key > seqlen_k ? seqlen_k : static_cast<int>(key);
    }
    DEVICE int last_key(int query) const {
        const i64 key = query + high;
        return key < -1 ? -1 : key > seqlen_k - 1 ? seqlen_k - 1 : static_cast<int>(key);
    }
    // Bounds of a query's keys, counted from a tile's first.
    DEVICE int lowest(int bound, int) const { return bound; }
    DEVICE int highest(int bound, int first_key) const { return min(bound, seqlen_k - first_key - 1); }
};

// The same, of the keys from first up to but not including end.
struct CutBand {
    i64 low;
    i64 high;
    int first, end;

    DEVICE int first_key(int query) const {
        const i64 key = query + low;
        return key < first ? first : key > end ? end : static_cast<int>(key);
    }
    DEVICE int last_key(int query) const {
        const i64 key = query + high;
        return key < first - 1 ? first - 1 : key > end - 1 ? end - 1 : static_cast<int>(key);
    }
    DEVICE int lowest(int bound, int first_key) const { return max(bound, first - first_key); }
    DEVICE int highest(int bound, int first_key) const { return min(bound, end - first_key - 1); }
};

// Keys from the first up to but not including the end; none if there is nothing between them.
struct KeyRange {
    i32 first, end;
};

// Keys that stay exact, whole blocks of them, for a block of queries: those from start to stop, counted from the first of
// these queries, and what is left of the blocks of keys that they begin and end in.
struct ExactBlocks {
    i64 start, stop;
    i32 rows, keys;  // of a block

    // Those of a query's block, none of them before key 0. Bounds beyond the last key may be brought nearer.
    DEVICE KeyRange of(int query, int seqlen_k) const {
        const i64 block = query / rows * rows;
        const int from = static_cast<int>(max(i64(0), min(i64(seqlen_k), block + start)));
        const int to = static_cast<int>(max(i64(0), min(i64(seqlen_k), block + stop)));
        return {from / keys * keys, (to + keys - 1) / keys * keys};
    }
};

// The passes over their keys that the queries of a head make, one after another, if heads differ in the columns of Q and K
// that count, and some keys may stay exact. A head that is reduced makes the first count of them, of which the first exact
// ones multiply Q and K themselves; a head that is whole makes kWhole alone. No query sees a key in two passes.
struct Passes {
    static constexpr int kWhole = 5;
    enum Part { kAll, kBefore, kNear, kAfter };  // of the keys, as the exact blocks of a tile of queries divide them
    i64 low[kWhole + 1], high[kWhole + 1];
    ExactBlocks near;  // a block has whole tiles of queries, if a pass is of a part
    i32 first[kWhole + 1], end[kWhole + 1];
    i32 part[kWhole + 1];
    i32 exact, count;

    // What the queries of a block see, of which these keys stay exact.
    DEVICE CutBand band(int pass, const KeyRange& exact) const {
        CutBand band = {low[pass], high[pass], first[pass], end[pass]};
        const int own = part[pass];
        if (own == kNear) band.first = max(band.first, exact.first);
        if (own == kAfter) band.first = max(band.first, exact.end);
        if (own == kBefore) band.end = min(band.end, exact.first);
        if (own == kNear) band.end = min(band.end, exact.end);
        return band;
    }
    // Of a head that is whole, or not: the first pass, the one after the last, and whether the last is reduced.
    DEVICE int begin(bool whole) const { return whole ? kWhole : 0; }
    DEVICE int after(bool whole) const { return whole ? kWhole + 1 : count; }
    DEVICE bool ends_reduced(bool whole) const { return !whole && exact < count; }
    DEVICE bool reduced(int pass) const { return pass >= exact && pass < kWhole; }
};

// Which query a row below the lane's first has, counted from the first of the tile.
struct PlainRows {
    int row;
    DEVICE int query(int below) const { return row + below; }
};
// Rows of several heads, one after another, each with the same queries.
struct PackedRows {
    int row, queries;
    DEVICE int query(int below) const { return (row + below) % queries; }
};

// Sets the scores of invisible keys to minus infinity. scores[mt][nt] is the accumulator of the lane's rows 16 mt (+ 8)
// and keys key + 8 nt (+ 1), counted from first_query and first_key of the tile.
template <class AnyBand, class Rows, int kRowTiles, int kKeyTiles>
DEVICE void apply_mask(float (&scores)[kRowTiles][kKeyTiles][4], const AnyBand& band, int first_query, int first_key,
                       const Rows& rows, int key) {
    // Relative to the tile everything fits 32 bits; a bound that is far away may be brought nearer.
    const i64 far = 1 << 28;
    const int low = static_cast<int>(max(-far, min(far, band.low + first_query - first_key)));
    const int high = static_cast<int>(max(-far, min(far, band.high + first_query - first_key)));
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = rows.query(mt * 16 + half * 8);
            const int first = band.lowest(query + low, first_key) - key;
            const int last = band.highest(query + high, first_key) - key;
#pragma unroll
            for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int offset = nt * 8 + i;
                    if (offset < first || offset > last) scores[mt][nt][half * 2 + i] = -infinity();
                }
            }
        }
    }
}

// The keys that one query sees, first to last.
struct KeySpan {
    int first, last;
};

// The same for the accumulator of a warpgroup: scores[nt] has the keys key + 8 nt (+ 1) of two rows, one after another.
template <int kKeyTiles>
DEVICE void apply_mask(float (&scores)[kKeyTiles][4], const KeySpan (&rows)[2], int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = rows[half].first - key;
        const int last = rows[half].last - key;
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int offset = nt * 8 + i;
                if (offset < first || offset > last) scores[nt][half * 2 + i] = -infinity();
            }
        }
    }
}

// Of the keys 8 n and 8 n + 1, n < kKeyTiles, those below a bound: bits 2 n and 2 n + 1.
template <int kKeyTiles>
DEVICE u64 keys_below(int bound) {
    static_assert(kKeyTiles < 32, "keys_below: all of them fit a word, and a shift by their number is defined");
    const int key = max(0, min(bound, kKeyTiles * 8));
    return (1ull << (key / 8 * 2 + min(key % 8, 2))) - 1;
}

// The same mask in fewer instructions, half of them for each score that is tested: the bounds become bits first.
template <int kKeyTiles>
DEVICE void apply_mask_by_bits(float (&scores)[kKeyTiles][4], const KeySpan (&rows)[2], int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u64 visible = keys_below<kKeyTiles>(rows[half].last + 1 - key) & ~keys_below<kKeyTiles>(rows[half].first - key);
#pragma unroll
        for (int nt = 0; nt < kKeyTiles; ++nt) {
            const u32 word = static_cast<u32>(visible >> (nt / 16 * 32));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!(word >> (nt % 16 * 2 + i) & 1)) scores[nt][half * 2 + i] = -infinity();
            }
        }
    }
}
