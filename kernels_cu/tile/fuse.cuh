// Fusion: the columns of K that a group has in common, summed.
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

// khat (groups, keys) from keys (members x groups, keys): row g of khat is the sum of the rows g, g + groups, ...
// Threads side by side take chunks side by side: with rows of eight chunks (64 keys of 16 bits) and more, neither reads
// nor writes have bank conflicts; shorter rows have a few.
template <class T, int kMembers, int kThreads, class RawTile, class FusedTile>
DEVICE void fuse_keys(FusedTile& khat, const RawTile& keys, int thread) {
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
            *reinterpret_cast<Chunk*>(khat.data + offset) = sum_chunks<T>(chunks);
        }
    }
}
