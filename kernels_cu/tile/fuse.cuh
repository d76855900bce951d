// Fusion: the columns of K that a group has in common, summed; and the sum of all columns with a number each.
#pragma once
#include "tile/dtype.cuh"
#include "tile/shared.cuh"

// The sum of chunks, element by element. Two numbers of 16 bits are added as they are; more are added in float32 and
// rounded once.
template <class T, int kMembers>
DEVICE Chunk sum_chunks(const Chunk (&chunks)[kMembers]) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    Chunk sum = chunks[0];
    if constexpr (kMembers == 2 && sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.word[i] = Traits<T>::add(sum.word[i], chunks[1].word[i]);
    } else if constexpr (kMembers > 1) {
        float total[kElements];
        union {
            Chunk chunk;
            T element[kElements];
        } value;
        value.chunk = sum;
#pragma unroll
        for (int i = 0; i < kElements; ++i) total[i] = Traits<T>::to_float(value.element[i]);
#pragma unroll
        for (int member = 1; member < kMembers; ++member) {
            value.chunk = chunks[member];
#pragma unroll
            for (int i = 0; i < kElements; ++i) total[i] += Traits<T>::to_float(value.element[i]);
        }
#pragma unroll
        for (int i = 0; i < kElements; ++i) value.element[i] = Traits<T>::from_float(total[i]);
        sum = value.chunk;
    }
    return sum;
}

// Pairs of bfloat16 as pairs of float16.
DEVICE u32 halve(u32 pair) {
    return floats_to_f16x2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
DEVICE void halve(Chunk& chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = halve(chunk.word[i]);
}

// The sum of chunks of float16 that were bfloat16, two numbers an instruction. Every addition rounds, but with three bits
// more than bfloat16 has: less is lost than by rounding the sum to bfloat16 once.
template <int kMembers>
DEVICE Chunk sum_halves(const Chunk (&chunks)[kMembers]) {
    Chunk sum = chunks[0];
#pragma unroll
    for (int member = 1; member < kMembers; ++member) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.word[i] = add_f16x2(sum.word[i], chunks[member].word[i]);
    }
    return sum;
}

// The sum of chunks with a weight for each, weight(member); the first is 1. Rounded once.
template <class T, int kMembers, class Weight>
DEVICE Chunk sum_weighted_chunks(const Chunk (&chunks)[kMembers], Weight weight) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    union {
        Chunk chunk;
        T element[kElements];
    } value;
    if constexpr (kMembers == 2 && sizeof(T) == 2) {
        const u32 pair = weight(1).bits * 0x10001u;
#pragma unroll
        for (int i = 0; i < 4; ++i) value.chunk.word[i] = Traits<T>::fma(chunks[1].word[i], pair, chunks[0].word[i]);
    } else {
        float total[kElements];
        value.chunk = chunks[0];
#pragma unroll
        for (int i = 0; i < kElements; ++i) total[i] = Traits<T>::to_float(value.element[i]);
#pragma unroll
        for (int member = 1; member < kMembers; ++member) {
            const float factor = Traits<T>::to_float(weight(member));
            value.chunk = chunks[member];
#pragma unroll
            for (int i = 0; i < kElements; ++i) total[i] = fmaf(factor, Traits<T>::to_float(value.element[i]), total[i]);
        }
#pragma unroll
        for (int i = 0; i < kElements; ++i) value.element[i] = Traits<T>::from_float(total[i]);
    }
    return value.chunk;
}

// khat (groups, keys) from keys (members x groups, keys): row g of khat is the sum of the rows g, g + groups, ...
// Threads side by side take chunks side by side: with rows of eight chunks (64 keys of 16 bits) and more, neither reads
// nor writes have bank conflicts; shorter rows have a few. kWeighted: weights has a number for each row of keys. kHalves:
// keys are float16, see sum_halves.
template <class T, int kMembers, int kThreads, bool kWeighted, bool kHalves = false, class RawTile, class FusedTile>
DEVICE void fuse_keys(FusedTile& khat, const RawTile& keys, const T* weights, int thread) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    constexpr int kAcross = FusedTile::kColumns / kElements;
    constexpr int kChunks = FusedTile::kRows * kAcross;
    static_assert(RawTile::kPitch == FusedTile::kPitch && RawTile::kRows == kMembers * FusedTile::kRows,
                  "fuse_keys: the tiles must have the same rows, one for each member");
#pragma unroll
    for (int start = 0; start < kChunks; start += kThreads) {
        const int i = start + thread;
        if (kChunks % kThreads == 0 || i < kChunks) {
            const int offset = i / kAcross * FusedTile::kPitch + i % kAcross * kElements;
            Chunk chunks[kMembers];
#pragma unroll
            for (int member = 0; member < kMembers; ++member) {
                const int distance = member * FusedTile::kRows * FusedTile::kPitch;
                chunks[member] = *reinterpret_cast<const Chunk*>(keys.data + offset + distance);
            }
            if constexpr (kWeighted) {
                const T* own = weights + i / kAcross;
                *reinterpret_cast<Chunk*>(khat.data + offset) =
                    sum_weighted_chunks<T>(chunks, [&](int member) { return own[member * FusedTile::kRows]; });
            } else {
                *reinterpret_cast<Chunk*>(khat.data + offset) = kHalves ? sum_halves(chunks) : sum_chunks<T>(chunks);
            }
        }
    }
}

// sums[key] = sum over the rows of keys from kFirst on of factors[row - kFirst] * keys(row, key). Each thread has two
// keys and every kSlices-th row; the slices of a sum lie side by side in a warp, which adds them up.
template <int kFirst, int kThreads, class Tile>
DEVICE void sum_rows(float (&sums)[Tile::kColumns], const Tile& keys, const float* factors, int thread) {
    constexpr int kPairs = Tile::kColumns / 2;
    constexpr int kMost = kThreads / kPairs < kWarpSize ? kThreads / kPairs : kWarpSize;
    constexpr int kSlices = kMost >= 32 ? 32 : kMost >= 16 ? 16 : kMost >= 8 ? 8 : kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
    constexpr int kRows = Tile::kRows - kFirst;
    constexpr int kTurns = (kPairs * kSlices + kThreads - 1) / kThreads;
    const int slice = thread % kSlices;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
        // Threads without a pair of their own sum the last one for nothing: a warp adds up together.
        const int pair = turn * (kThreads / kSlices) + thread / kSlices;
        const int key = min(pair, kPairs - 1) * 2;
        float low = 0.f;
        float high = 0.f;
#pragma unroll
        for (int start = 0; start < kRows; start += kSlices) {
            const int row = start + slice;
            if (kRows % kSlices == 0 || row < kRows) {
                const auto& two = *reinterpret_cast<const Two<typename Tile::Element>*>(&keys.at(kFirst + row, key));
                low = fmaf(factors[row], Traits<typename Tile::Element>::to_float(two.element[0]), low);
                high = fmaf(factors[row], Traits<typename Tile::Element>::to_float(two.element[1]), high);
            }
        }
#pragma unroll
        for (int step = 1; step < kSlices; step *= 2) {
            low += __shfl_xor_sync(kFullWarp, low, step);
            high += __shfl_xor_sync(kFullWarp, high, step);
        }
        if (slice == 0 && pair < kPairs) {
            sums[key] = low;
            sums[key + 1] = high;
        }
    }
}
