// What grouped attention needs before it starts, in one launch: the column order of every block of queries, and K
// transposed. The first reads memory, the second reads and writes it: a thread block does both in turns, and copies rows
// of Q and a tile of K to shared memory while it computes with those of the turn before.
//
// Order: angular LSH, Gray rank, stable sort. The NumPy twin is reference.order, and both give the same bits: signs of
// float32 sums over the rows in order, product and sum rounded apart. A product of 16-bit numbers with a projection,
// which has ten bits, is exact. A sum of exactly zero, or a NaN, gives bit 0.
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
//         that was told; no order
#include "ptx/atomic.cuh"
#include "tile/fuse.cuh"
#include "tile/shared.cuh"
#include "tile/warp.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct PrepareParams {
    const T* q;
    const float* projections;  // (block_q, kProjections), contiguous: see launch._device_projections
    u8* permutation;           // (batch, heads, group_blocks, HEAD_DIM), contiguous
    const T* k;
    T* transposed;
#if HALF
    i32* wide;  // zero at first: how many threads found a larger number than the limit
#endif
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i32 order_units;   // blocks of queries of all heads and batch entries
    i32 order_blocks;  // thread blocks that order them, the first
    i32 heads, seqlen_q, block_q, group_blocks;
    i32 heads_kv, seqlen_k, key_columns, key_blocks;
    u32 code_bits;  // SIGNED: the bits that a code has
    i32 tiles;      // of K, shared out evenly
    float limit;    // HALF: numbers that are no larger may be float16
};

namespace {

constexpr int kThreads = 128;
constexpr int kProjections = 16;  // what LSH allows; fewer are padded with zero vectors, whose bits are 0
constexpr int kWarpColumns = 64;  // columns of a block of queries that a warp orders
constexpr int kSpan = (HEAD_DIM + kWarpColumns - 1) / kWarpColumns * kWarpSize;  // threads of one block of queries
constexpr int kUnits = kThreads / kSpan;                                         // blocks of queries per thread block
constexpr int kTile = 64;                                                        // keys, and columns, of a transpose
constexpr int kColumnBlocks = (HEAD_DIM + kTile - 1) / kTile;
constexpr bool kPairs = sizeof(T) == 2;
constexpr int kRows = kPairs ? 16 : 4;  // of queries in a turn
constexpr int kBuffers = 2;

// Rows are keys. Of 16-bit types, chunks are permuted within a row so that ldmatrix has no conflicts.
typedef SharedTile<T, kTile, kTile, kPairs ? 0 : kChunkBytes / int(sizeof(T))> TransposeTile;

// The largest numbers that a thread has seen, as a pair of bfloat16 without signs.
DEVICE u32 larger(u32 largest, u32 pair) { return HALF == 1 ? max_bf16x2(largest, pair & 0x7fff7fffu) : largest; }

// Adds one where a thread found a number beyond the limit.
DEVICE void tell(const PrepareParams& params, u32 largest) {
#if HALF == 1
    const float one = fmaxf(__uint_as_float(largest << 16), __uint_as_float(largest & 0xffff0000u));
    if (one > params.limit) atomic_add(params.wide, 1);
#endif
}

// The position of a column's code in the Gray sequence, and the column: all keys differ, so sorting is stable.
DEVICE u32 sort_key(u32 rank, u32 code_bits, int column) {
    if constexpr (SIGNED) rank = min(rank, rank ^ code_bits);
#pragma unroll
    for (int shift = 1; shift < kProjections; shift *= 2) rank ^= rank >> shift;
    return rank << 8 | static_cast<u32>(column);
}

// A warp's place: the block of queries whose columns it orders, and the first of these.
struct Unit {
    static DEVICE int lane() { return thread_index() % kWarpSize; }
    static DEVICE int unit() { return thread_index() / kSpan; }
    static DEVICE int column() { return thread_index() % kSpan / kWarpSize * kWarpColumns; }
    static DEVICE int block() { return block_index() * kUnits + unit(); }
    static DEVICE bool active(const PrepareParams& params) { return unit() < kUnits && block() < params.order_units; }
    static DEVICE int first_row(const PrepareParams& params) { return block() % params.group_blocks * params.block_q; }
    static DEVICE int rows(const PrepareParams& params) { return min(params.block_q, params.seqlen_q - first_row(params)); }
    static DEVICE const T* q(const PrepareParams& params) {
        const int batch_head = block() / params.group_blocks;
        return params.q + batch_head / params.heads * params.q_batch + batch_head % params.heads * params.q_head +
               first_row(params) * params.q_row;
    }
};

constexpr int kParts = Traits<T>::kWide ? 2 : 1;  // 16-bit numbers of a projection

// What a turn needs: rows of queries, those of a warp side by side, and of the projections.
struct Stage {
    T rows[kThreads / kWarpSize][kRows][kWarpColumns];
    Chunk projections[kPairs ? kParts * kWarpSize : kRows * kProjections / 4];

    // Where chunk `chunk` of a row lies: such that ldmatrix has no conflicts.
    static DEVICE int place(int row, int chunk) {
        return (kPairs ? chunk ^ row % 8 : chunk) * kChunkBytes / int(sizeof(T));
    }
};

#if DTYPE != 2

// Sums of rows times projections, by matrix instructions, which add up in an order of their own and cut off what they
// like; and sizes that bound what is lost by it, and by float32 row by row: where a sum is larger, both have its sign.
// Where it is not, which is rare, it is made anew row by row.
// A sum that adds n numbers to a sum S loses n times 2^-24 of |S| and their magnitudes together, or of 2^-23 if it cuts
// off. Over the turns, sizes add up |S| and the magnitudes: rows lose 16 times 2^-24 of them, a matrix instruction 34
// times, and there is one for each part of a projection.
constexpr float kUncertain = (kParts == 2 ? 96.f : 64.f) / (1 << 24);
constexpr int kSlices = HEAD_DIM < kWarpColumns ? (HEAD_DIM + 15) / 16 : kWarpColumns / 16;

struct Order {
    float sums[kSlices][2][4];
    float sizes[kSlices][2][4];

    DEVICE void open() {
#pragma unroll
        for (int i = 0; i < kSlices * 8; ++i) {
            sums[i / 8][i / 4 % 2][i % 4] = 0.f;
            sizes[i / 8][i / 4 % 2][i % 4] = 0.f;
        }
    }

    DEVICE void add(const Stage& stage, u32& largest) {
        Chunk projections[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) projections[part] = stage.projections[part * kWarpSize + Unit::lane()];
        const int row = Unit::lane() % 8 + Unit::lane() / 16 * 8;
        const u32 rows = shared_address(&stage.rows[thread_index() / kWarpSize][row][0]);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            u32 columns[4];
            ldmatrix_x4_trans(columns, rows + Stage::place(row, slice * 2 + Unit::lane() / 8 % 2) * int(sizeof(T)));
            u32 magnitudes[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                magnitudes[i] = columns[i] & 0x7fff7fffu;
                largest = larger(largest, columns[i]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const u32(&words)[4] = projections[part].word;
                    Traits<T>::mma(sums[slice][half], columns, words[half * 2], words[half * 2 + 1]);
                }
                const u32(&words)[4] = projections[0].word;
                Traits<T>::mma(
                    sizes[slice][half], magnitudes, words[half * 2] & 0x7fff7fffu, words[half * 2 + 1] & 0x7fff7fffu
                );
#pragma unroll
                for (int i = 0; i < 4; ++i) sizes[slice][half][i] += fabsf(sums[slice][half][i]);
            }
        }
    }

    // Whether the sum of a column and a projection, row by row, is positive. A warp makes it together.
    static DEVICE bool anew_positive(const PrepareParams& params, const T* q, int rows, int column, int projection) {
        constexpr int kHeld = 4;  // rows of a lane that are loaded at once
        float sum = 0.f;
        for (int start = 0; start < rows; start += kHeld * kWarpSize) {
            float products[kHeld];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const int row = start + i * kWarpSize + Unit::lane();
                products[i] = 0.f;
                if (row < rows) {
                    const float x = Traits<T>::to_float(q[row * params.q_row + column]);
                    products[i] = __fmul_rn(params.projections[row * kProjections + projection], x);
                }
            }
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
#pragma unroll 8
                for (int lane = 0; lane < kWarpSize; ++lane) sum = __fadd_rn(sum, from_lane(products[i], lane));
            }
        }
        return sum > 0.f;
    }

    // Writes the keys of the warp's columns.
    DEVICE void close(const PrepareParams& params, u32 (&keys)[kUnits][HEAD_DIM]) const {
        if (!Unit::active(params)) return;
        const int rows = Unit::rows(params);
        u32 bits = 0;
        u32 doubtful = 0;
#pragma unroll
        for (int i = 0; i < kSlices * 8; ++i) {
            const float sum = sums[i / 8][i / 4 % 2][i % 4];
            const float size = sizes[i / 8][i / 4 % 2][i % 4];
            // The range of floats ends far below the last of these numbers; zeros are as they are.
            const bool certain = size == 0.f || (size > 1e-30f && fabsf(sum) > kUncertain * size);
            if (sum > 0.f) bits |= 1u << i;
            if (!certain) doubtful |= 1u << i;
        }
        while (const u32 lanes = __ballot_sync(kFullWarp, doubtful != 0)) {
            const int owner = __ffs(lanes) - 1;
            const int i = __ffs(__shfl_sync(kFullWarp, doubtful, owner)) - 1;
            const int column = Unit::column() + i / 8 * 16 + i / 2 % 2 * 8 + owner / 4;
            const int projection = i / 4 % 2 * 8 + owner % 4 * 2 + i % 2;
            const bool positive = anew_positive(params, Unit::q(params), rows, column, projection);
            if (Unit::lane() == owner) {
                bits = (bits & ~(1u << i)) | static_cast<u32>(positive) << i;
                doubtful &= doubtful - 1;
            }
        }
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            u32 codes = 0;  // of two columns, eight apart
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                codes |= (bits >> (slice * 8 + i) & 1) << (i / 2 % 2 * 16 + i / 4 * 8 + i % 2);
            }
            codes <<= Unit::lane() % 4 * 2;
            codes |= __shfl_xor_sync(kFullWarp, codes, 1);
            codes |= __shfl_xor_sync(kFullWarp, codes, 2);
            const int column = Unit::column() + slice * 16 + Unit::lane() % 4 * 8 + Unit::lane() / 4;
            if (Unit::lane() % 4 < 2 && column < HEAD_DIM) {
                keys[Unit::unit()][column] = sort_key(codes >> Unit::lane() % 4 * 16 & 0xffffu, params.code_bits, column);
            }
        }
    }
};

#else

// Sums of rows times projections, product and sum rounded apart. A thread has two columns, so that a projection read from
// shared memory is used twice.
struct Order {
    float sums[2][kProjections];

    static DEVICE int column() { return thread_index() % kSpan * 2; }

    DEVICE void open() {
#pragma unroll
        for (int i = 0; i < kProjections; ++i) sums[0][i] = sums[1][i] = 0.f;
    }

    DEVICE void add(const Stage& stage, u32&) {
        const auto& rows = stage.rows[thread_index() / kWarpSize];
        const float* projections = reinterpret_cast<const float*>(stage.projections);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const Two<float> pair = *reinterpret_cast<const Two<float>*>(&rows[row][Unit::lane() * 2]);
#pragma unroll
            for (int b = 0; b < kProjections; ++b) {
                const float r = projections[row * kProjections + b];
#pragma unroll
                for (int i = 0; i < 2; ++i) sums[i][b] = __fadd_rn(sums[i][b], __fmul_rn(r, pair.element[i]));
            }
        }
    }

    DEVICE void close(const PrepareParams& params, u32 (&keys)[kUnits][HEAD_DIM]) const {
        if (!Unit::active(params) || column() >= HEAD_DIM) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 code = 0;
#pragma unroll
            for (int b = 0; b < kProjections; ++b) code |= sums[i][b] > 0.f ? 1u << b : 0u;
            keys[Unit::unit()][column() + i] = sort_key(code, params.code_bits, column() + i);
        }
    }
};

#endif

struct alignas(16) Storage {
    TransposeTile tiles[kBuffers];
    Stage stages[kBuffers];
    u32 keys[kUnits][HEAD_DIM];
};

// Copies rows of q, and projections, for turn `turn`. The caller commits and waits.
DEVICE void copy_rows(const PrepareParams& params, Stage& stage, int turn, const T* q, int rows) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    constexpr int kChunks = kWarpColumns / kElements;
    constexpr int kStep = kWarpSize / kChunks;  // rows that a warp copies at once
    constexpr int kOwn = sizeof(stage.projections) / kChunkBytes;
    // Behind the projections are their 16-bit parts.
    const int before = kPairs ? (params.block_q + kRows - 1) / kRows * kRows * kProjections : 0;
    const Chunk* projections = reinterpret_cast<const Chunk*>(params.projections + before) + turn * kOwn;
    if (threadIdx.x < kOwn) {
        const u32 to = shared_address(stage.projections) + threadIdx.x * kChunkBytes;
        cp_async_chunk(to, projections + threadIdx.x, true);
    }
    auto& tile = stage.rows[threadIdx.x / kWarpSize];
    const int chunk = Unit::lane() % kChunks;
    const int first = Unit::lane() / kChunks;
    const int column = Unit::column() + chunk * kElements;
    const T* source = q + (turn * kRows + first) * params.q_row + column;
#pragma unroll
    for (int start = 0; start < kRows; start += kStep) {
        const int row = start + first;
        T* to = &tile[row][Stage::place(row, chunk)];
        const bool valid = column < HEAD_DIM && turn * kRows + row < rows;
        copy_chunk<ALIGNED>(to, shared_address(to), 0, source, valid);
        source += kStep * params.q_row;
    }
}

// Sorts the keys of the thread block's units: the number of smaller keys is a column's place.
DEVICE void sort_columns(const PrepareParams& params, const u32 (&keys)[kUnits][HEAD_DIM]) {
    const int column = thread_index() % kSpan * 2;
    if (!Unit::active(params) || column >= HEAD_DIM) return;
    const auto& all = keys[Unit::unit()];
    const u32 own[2] = {all[column], all[column + 1]};
    int place[2] = {0, 0};
#pragma unroll 8
    for (int other = 0; other < HEAD_DIM; ++other) {
        const u32 key = all[other];
        place[0] += key < own[0];
        place[1] += key < own[1];
    }
    u8* permutation = params.permutation + Unit::block() * HEAD_DIM;
    permutation[place[0]] = static_cast<u8>(column);
    permutation[place[1]] = static_cast<u8>(column + 1);
}

// Where chunk `chunk` of a key lies in a row of the tile. The rows that one matrix of store_pairs reads differ in the
// three bits of a key that are taken here.
DEVICE int place_of_chunk(int key, int chunk) { return kPairs ? chunk ^ (key % 2 | key / 8 % 4 * 2) : chunk; }

// Eight columns of 32 keys, by one warp. ldmatrix gives a lane two rows of a matrix that follow each other; matrix i of
// four has keys 2 i and 2 i + 1 of every eight, so that its four words are eight keys of one column.
DEVICE void store_pairs(
    const TransposeTile& tile, T* out, i64 key_columns, int stored, int first_key, int chunk, u32& largest
) {
    const int lane = threadIdx.x % kWarpSize;
    const int own = first_key + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
    Chunk value;
    ldmatrix_x4_trans(value.word, shared_address(tile.data) + own * kTile * 2 + place_of_chunk(own, chunk) * kChunkBytes);
    if constexpr (HALF == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = larger(largest, value.word[i]);
        halve(value);
    }
    const int key = first_key + lane % 4 * 8;
    if (key < stored) *reinterpret_cast<Chunk*>(out + (chunk * 8 + lane / 4) * key_columns + key) = value;
}

// A walk over tiles of kTile keys x kTile columns, as many apart as there are thread blocks: these write side by side.
struct Tiles {
    int block, part, batch_head;  // of keys, of columns

    static DEVICE Tiles at(const PrepareParams& params, int index) {
        const int part = index / params.key_blocks;
        return {index % params.key_blocks, part % kColumnBlocks, part / kColumnBlocks};
    }
    DEVICE void move(const PrepareParams& params, const Tiles& step) {
        block += step.block;
        part += step.part;
        batch_head += step.batch_head;
        if (block >= params.key_blocks) block -= params.key_blocks, ++part;
        if (part >= kColumnBlocks) part -= kColumnBlocks, ++batch_head;
    }
    DEVICE int key() const { return block * kTile; }
    DEVICE int column() const { return part * kTile; }
    DEVICE int columns() const { return min(kTile, HEAD_DIM - column()); }

    // Copies this tile of K. The caller commits and waits.
    DEVICE void copy(const PrepareParams& params, TransposeTile& tile) const {
        constexpr int kElements = kChunkBytes / int(sizeof(T));
        constexpr int kChunks = kTile / kElements;
        const int keys = min(kTile, params.seqlen_k - key());
        const int offset = static_cast<int>(threadIdx.x) % kChunks * kElements;
        const T* source = params.k + batch_head / params.heads_kv * params.k_batch +
                          batch_head % params.heads_kv * params.k_head +
                          (key() + threadIdx.x / kChunks) * params.k_row + column() + offset;
#pragma unroll
        for (int start = 0; start < kTile; start += kThreads / kChunks) {
            const int row = start + threadIdx.x / kChunks;
            T* to = &tile.at(row, place_of_chunk(row, offset / kElements) * kElements);
            copy_chunk<ALIGNED>(to, shared_address(to), 0, source, row < keys && offset < columns());
            source += kThreads / kChunks * params.k_row;
        }
    }

    // Writes this tile, which lies in shared memory, as columns of keys.
    DEVICE void store(const PrepareParams& params, const TransposeTile& tile, u32& largest) const {
        constexpr int kElements = kChunkBytes / int(sizeof(T));
        constexpr int kChunks = kTile / kElements;
        T* out = params.transposed + (static_cast<i64>(batch_head) * HEAD_DIM + column()) * params.key_columns + key();
        const int stored = min(kTile, params.key_columns - key());
        if constexpr (kPairs) {
            const int warp = threadIdx.x / kWarpSize;
#pragma unroll
            for (int part = warp; part < kChunks * kTile / 32; part += kThreads / kWarpSize) {
                const int chunk = part % kChunks;
                if (chunk * 8 < columns()) {
                    store_pairs(tile, out, params.key_columns, stored, part / kChunks * 32, chunk, largest);
                }
            }
        } else {
            for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
                const int row = i / kChunks;
                const int offset = i % kChunks * kElements;
                if (row >= columns() || offset >= stored) continue;
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
};

}  // namespace

// The 4 leaves registers enough that ptxas does not spill for the sake of more thread blocks.
extern "C" __global__ void __launch_bounds__(kThreads, 4) smxx_lsh_prepare(const PrepareParams params) {
    __shared__ Storage shared;
#if HALF == 2
    if (*params.wide == 0) return;
    constexpr bool orders = false;
#else
    const bool orders = static_cast<int>(blockIdx.x) < params.order_blocks;
#endif
    const int step = gridDim.x;
    const int index = blockIdx.x;
    const int tiles = index < params.tiles ? (params.tiles - index - 1) / step + 1 : 0;
    const int longest = orders ? min(params.block_q, params.seqlen_q) : 0;
    const int turns = max(tiles, (longest + kRows - 1) / kRows);
    const bool active = orders && Unit::active(params);
    const int rows = active ? Unit::rows(params) : 0;
    const T* q = active ? Unit::q(params) : params.q;

    u32 largest = 0;
    Tiles tile = {};
    Tiles stride = {};
    if (tiles > 0) {
        tile = Tiles::at(params, index);
        stride = Tiles::at(params, step);
    }
    Order order;
    order.open();
    auto copy = [&](int turn) {
        if (turn < tiles) tile.copy(params, shared.tiles[turn % kBuffers]);
        if (turn * kRows < longest) copy_rows(params, shared.stages[turn % kBuffers], turn, q, rows);
        cp_async_commit();
    };
    copy(0);
    for (int turn = 0; turn < turns; ++turn) {
        const Tiles here = tile;
        tile.move(params, stride);
        cp_async_wait<0>();
        __syncthreads();
        if (turn + 1 < turns) copy(turn + 1);
        if (turn < tiles) here.store(params, shared.tiles[turn % kBuffers], largest);
        if (turn * kRows < rows) order.add(shared.stages[turn % kBuffers], largest);
    }
    tell(params, largest);
    if (!orders) return;
    order.close(params, shared.keys);
    __syncthreads();
    sort_columns(params, shared.keys);
}
