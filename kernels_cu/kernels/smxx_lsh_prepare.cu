// What grouped attention needs before it starts, in one launch: the column order of every block of queries, and K
// transposed. The first is arithmetic, the second memory traffic, so thread blocks of both kinds share the GPU.
//
// Order: angular LSH, Gray rank, stable sort. The NumPy twin is reference.order, and both give the same bits: float32
// sums over the rows in order, product and sum rounded apart. A product of 16-bit numbers with a projection, which has
// ten bits, is exact, so there one fma does both. A sum of exactly zero, or a NaN, gives bit 0.
// SIGNED: a column and its negative are alike, so of a code and its complement the smaller counts.
//
// Transpose: K (batch, heads_kv, seqlen_k, HEAD_DIM) to (batch, heads_kv, HEAD_DIM, key_columns), rows padded with
// zeros to key_columns, a multiple of 8, so that the attention kernel copies whole chunks.
//
// float16 has three bits more than bfloat16, so that columns of K that are bfloat16 can be summed in it as they are, two
// numbers an instruction, and the sums are more precise than sums in float32 that are rounded to bfloat16. What it lacks
// is range: where a number of Q or K is beyond a limit, that is told, and K is transposed again, as it is.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM (at most 256), ALIGNED (1: every row of q and k starts
// on 16 bytes), SIGNED.
//   HALF  0: K as it is. 1, of bfloat16: K in float16, and tells whether a number is beyond the limit. 2: K as it is, if
//         that was told; no order; each thread block transposes several tiles
#include "ptx/atomic.cuh"
#include "tile/fuse.cuh"
#include "tile/shared.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct PrepareParams {
    const T* q;
    const float* projections;  // (block_q, kProjections), contiguous: the transpose of reductions.projections
    u8* permutation;           // (batch, heads, group_blocks, HEAD_DIM), contiguous
    const T* k;
    T* transposed;
#if HALF
    i32* wide;  // zero at first: how many threads found a larger number than the limit
#endif
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i64 order_units;   // blocks of queries of all heads and batch entries
    i32 order_blocks;  // thread blocks that order columns; the others transpose
    i32 spacing;       // every spacing-th thread block orders, until all order_blocks have come
    i32 heads, seqlen_q, block_q, group_blocks;
    i32 heads_kv, seqlen_k, key_columns, key_blocks;
    u32 code_bits;  // SIGNED: the bits that a code has
    i32 tiles;      // to transpose
    float limit;    // HALF: numbers that are no larger may be float16
};

namespace {

constexpr int kThreads = 128;
constexpr int kProjections = 16;  // what LSH allows; fewer are padded with zero vectors, whose bits are 0
constexpr int kStageRows = 32;    // rows of the projections in shared memory at a time
// A thread has two columns, so that a projection read from shared memory is used twice.
constexpr int kSpan = (HEAD_DIM / 2 + kWarpSize - 1) / kWarpSize * kWarpSize;  // threads of one block of queries
constexpr int kUnits = kThreads / kSpan;                                       // blocks of queries per thread block
constexpr int kTile = 64;                                                      // keys, and columns, of a transpose

struct OrderStorage {
    float stage[kStageRows][kProjections];
    u32 keys[kUnits][HEAD_DIM];
};
// Rows are keys. Of 16-bit types, chunks are permuted within a row so that ldmatrix has no conflicts, see KeyRows.
constexpr bool kPairs = sizeof(T) == 2;
typedef SharedTile<T, kTile, kTile, kPairs ? 0 : kChunkBytes / int(sizeof(T))> TransposeTile;
union Storage {
    OrderStorage order;
    TransposeTile tile;
};

// Adds one where a thread found a number beyond the limit.
DEVICE void tell(const PrepareParams& params, float largest) {
#if HALF == 1
    if (largest > params.limit) atomic_add(params.wide, 1);
#endif
}

struct alignas(2 * sizeof(T)) Pair {
    T element[2];
};

DEVICE Pair load_pair(const T* source) {
    if constexpr (ALIGNED) {
        return *reinterpret_cast<const Pair*>(source);
    } else {
        return {{source[0], source[1]}};
    }
}

// The position of a column's code in the Gray sequence, and the column: all keys differ, so sorting is stable.
DEVICE u32 sort_key(const float (&sums)[kProjections], u32 code_bits, int column) {
    u32 rank = 0;
#pragma unroll
    for (int b = 0; b < kProjections; ++b) rank |= sums[b] > 0.f ? 1u << b : 0u;
    if constexpr (SIGNED) rank = min(rank, rank ^ code_bits);
#pragma unroll
    for (int shift = 1; shift < kProjections; shift *= 2) rank ^= rank >> shift;
    return rank << 8 | static_cast<u32>(column);
}

// Thread block `index` orders the columns of kUnits blocks of queries.
DEVICE void order_columns(const PrepareParams& params, OrderStorage& shared, int index) {
    const int unit = threadIdx.x / kSpan;
    const int thread = threadIdx.x % kSpan;
    const i64 block = static_cast<i64>(index) * kUnits + unit;
    const bool active = unit < kUnits && block < params.order_units;
    const int column = thread * 2;
    // Threads without a column of their own read column 0, and without a block no rows, but all meet at the barriers.
    const T* q = params.q;
    int rows = 0;
    if (active) {
        const i64 batch_head = block / params.group_blocks;
        const int first_row = static_cast<int>(block % params.group_blocks) * params.block_q;
        rows = min(params.block_q, params.seqlen_q - first_row);
        q += batch_head / params.heads * params.q_batch + batch_head % params.heads * params.q_head +
             first_row * params.q_row + (column < HEAD_DIM ? column : 0);
    }

    float sums[2][kProjections] = {};
    float largest = 0.f;
    const int longest = min(params.block_q, params.seqlen_q);
    for (int start = 0; start < longest; start += kStageRows) {
        const int staged = min(kStageRows, longest - start);
        __syncthreads();
        for (int i = threadIdx.x; i < staged * kProjections; i += kThreads) {
            shared.stage[i / kProjections][i % kProjections] = params.projections[start * kProjections + i];
        }
        __syncthreads();
        const int own = min(staged, rows - start);
#pragma unroll 8
        for (int row = 0; row < own; ++row) {
            const Pair pair = load_pair(q);
            q += params.q_row;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = Traits<T>::to_float(pair.element[i]);
                if constexpr (HALF == 1) largest = fmaxf(largest, fabsf(x));
#pragma unroll
                for (int b = 0; b < kProjections; ++b) {
                    const float r = shared.stage[row][b];
                    sums[i][b] = sizeof(T) == 2 ? fmaf(r, x, sums[i][b]) : __fadd_rn(sums[i][b], __fmul_rn(r, x));
                }
            }
        }
    }

    tell(params, largest);
    if (active && column < HEAD_DIM) {
        shared.keys[unit][column] = sort_key(sums[0], params.code_bits, column);
        shared.keys[unit][column + 1] = sort_key(sums[1], params.code_bits, column + 1);
    }
    __syncthreads();
    if (!active) return;
    // The number of smaller keys is a column's place.
    u8* permutation = params.permutation + block * HEAD_DIM;
    for (int i = thread; i < HEAD_DIM; i += kSpan) {
        const u32 key = shared.keys[unit][i];
        int place = 0;
#pragma unroll 8
        for (int other = 0; other < HEAD_DIM; ++other) place += shared.keys[unit][other] < key;
        permutation[place] = static_cast<u8>(key);
    }
}

// Where chunk `chunk` of a key lies in a row of the tile. The rows that one matrix of store_pairs reads differ in the
// three bits of a key that are taken here.
DEVICE int place_of_chunk(int key, int chunk) { return kPairs ? chunk ^ (key % 2 | key / 8 % 4 * 2) : chunk; }

// Eight columns of 32 keys, by one warp. ldmatrix gives a lane two rows of a matrix that follow each other; matrix i of
// four has keys 2 i and 2 i + 1 of every eight, so that its four words are eight keys of one column.
DEVICE void store_pairs(const TransposeTile& tile, T* out, i64 key_columns, int stored, int first_key, int chunk, int lane) {
    const int own = first_key + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
    Chunk value;
    ldmatrix_x4_trans(value.word, shared_address(tile.data) + own * kTile * 2 + place_of_chunk(own, chunk) * kChunkBytes);
    const int key = first_key + lane % 4 * 8;
    if (key < stored) *reinterpret_cast<Chunk*>(out + (chunk * 8 + lane / 4) * key_columns + key) = value;
}

// The largest of pairs of bfloat16, and of a number before.
DEVICE float largest_of(const Chunk& chunk, float largest) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = __uint_as_float(chunk.word[i] << 16);
        const float high = __uint_as_float(chunk.word[i] & 0xffff0000u);
        largest = fmaxf(largest, fmaxf(fabsf(low), fabsf(high)));
    }
    return largest;
}

// Tile `index` of kTile keys x kTile columns is transposed.
DEVICE void transpose_keys(const PrepareParams& params, TransposeTile& tile, int index) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    constexpr int kChunks = kTile / kElements;
    constexpr int kColumnBlocks = (HEAD_DIM + kTile - 1) / kTile;
    const int key = index % params.key_blocks * kTile;
    index /= params.key_blocks;
    const int column = index % kColumnBlocks * kTile;
    const int batch_head = index / kColumnBlocks;
    const int keys = min(kTile, params.seqlen_k - key);
    const int columns = min(kTile, HEAD_DIM - column);
    const T* k = params.k + batch_head / params.heads_kv * params.k_batch +
                 batch_head % params.heads_kv * params.k_head + key * params.k_row + column;

    float largest = 0.f;
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
        if constexpr (HALF == 1) {
            largest = largest_of(chunk, largest);
            halve(chunk);
        }
        *reinterpret_cast<Chunk*>(&tile.at(row, place_of_chunk(row, i % kChunks) * kElements)) = chunk;
    }
    tell(params, largest);
    __syncthreads();

    T* out = params.transposed + (static_cast<i64>(batch_head) * HEAD_DIM + column) * params.key_columns + key;
    const int stored = min(kTile, params.key_columns - key);
    if constexpr (kPairs) {
        const int warp = threadIdx.x / kWarpSize;
#pragma unroll
        for (int part = warp; part < kChunks * kTile / 32; part += kThreads / kWarpSize) {
            const int chunk = part % kChunks;
            if (chunk * 8 < columns) {
                store_pairs(tile, out, params.key_columns, stored, part / kChunks * 32, chunk, threadIdx.x % kWarpSize);
            }
        }
    } else {
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
}

}  // namespace

// The 4 leaves registers enough that ptxas does not spill for the sake of more thread blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 4) smxx_lsh_prepare(const PrepareParams params) {
    __shared__ __align__(16) unsigned char storage[sizeof(Storage)];
    Storage& shared = *reinterpret_cast<Storage*>(storage);
#if HALF == 2
    if (*params.wide == 0) return;
    for (int tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
        transpose_keys(params, shared.tile, tile);
        __syncthreads();  // before the next one takes its place
    }
#else
    // Ordering takes longest, so its blocks come early, but spaced, so that transposing fills the memory system.
    const u32 block = blockIdx.x;
    const u32 orders = params.order_blocks;
    const u32 spacing = params.spacing;
    if (block < orders * spacing && block % spacing == 0) {
        order_columns(params, shared.order, block / spacing);
    } else {
        transpose_keys(params, shared.tile, block - min(orders, block / spacing + 1));
    }
#endif
}
