// K (batch, heads_kv, seqlen_k, head_dim) to its transpose (batch, heads_kv, head_dim, key_columns): rows padded with
// zeros to key_columns, a multiple of 8, so that the attention kernel copies whole chunks. One thread block per
// 64 keys x 64 columns.
//
// Constants: BYTES of an element (2 or 4), ALIGNED (1: every row of k starts on 16 bytes).
#include "tile/shared.cuh"

namespace {
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
    typedef u16 type;
};
template <>
struct Bits<4> {
    typedef u32 type;
};
constexpr int kTile = 64;
constexpr int kThreads = 256;
}  // namespace

typedef Bits<BYTES>::type T;

struct TransposeParams {
    const T* k;
    T* out;
    i64 k_batch, k_head, k_row;
    i32 heads_kv, seqlen_k, head_dim, key_columns;
    i32 key_blocks, column_blocks;
};

extern "C" __global__ void __launch_bounds__(kThreads) smxx_transpose(const TransposeParams params) {
    constexpr int kElements = kChunkBytes / BYTES;
    constexpr int kChunks = kTile / kElements;
    __shared__ SharedTile<T, kTile, kTile> tile;

    int index = blockIdx.x;
    const int key = index % params.key_blocks * kTile;
    index /= params.key_blocks;
    const int column = index % params.column_blocks * kTile;
    const int batch_head = index / params.column_blocks;
    const int keys = min(kTile, params.seqlen_k - key);
    const int columns = min(kTile, params.head_dim - column);
    const T* k = params.k + batch_head / params.heads_kv * params.k_batch +
                 batch_head % params.heads_kv * params.k_head + key * params.k_row + column;

    for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int offset = i % kChunks * kElements;
        const T* source = k + row * params.k_row + offset;
        const bool valid = row < keys && offset < columns;
        Chunk chunk = {{0, 0, 0, 0}};
        if (ALIGNED) {
            if (valid) chunk = *reinterpret_cast<const Chunk*>(source);
        } else {
            chunk = gather_chunk(source, valid);
        }
        *reinterpret_cast<Chunk*>(&tile.at(row, offset)) = chunk;
    }
    __syncthreads();

    T* out = params.out + (static_cast<i64>(batch_head) * params.head_dim + column) * params.key_columns + key;
    const int stored = min(kTile, params.key_columns - key);
    for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int offset = i % kChunks * kElements;
        if (row >= columns || offset >= stored) continue;
        union {
            Chunk chunk;
            T element[kElements];
        } value;
#pragma unroll
        for (int j = 0; j < kElements; ++j) value.element[j] = tile.at(offset + j, row);
        *reinterpret_cast<Chunk*>(out + static_cast<i64>(row) * params.key_columns + offset) = value.chunk;
    }
}
