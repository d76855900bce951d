// Queries and keys in fewer columns: Qhat = Q A, Khat = (K - mean) B, with factors of their own for every KV head.
// The time is that of reading and writing the rows. A thread block copies the factors of COLUMNS columns to shared
// memory once, and makes these columns of several tiles of rows of one head. A warp reads its WARP_ROWS rows from
// global memory straight into the registers that the matrix instructions take them from, and waits for no other warp:
// while some wait for rows, others multiply.
//
// The product is made transposed, factors times rows: so two neighbouring registers with elements of one row are the
// right operand. The order of the terms of a sum is free: a lane reads 16 bytes of a row at once, and takes them for
// the terms of two instructions. Factors come from the host in the order in which lanes read them (projection.py).
//
// 16-bit factors come in two parts, the rounded number and the rest, so that what rounds the result is its own dtype.
// The mean is taken off after the product, as a row of numbers mean B: no difference is rounded to 16 bits. What it
// takes off the scores of a query, and what Qhat misses of it, are made like columns of Qhat, of the same registers.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K
//   COLUMNS     of Qhat and Khat that a thread block makes
//   WARP_ROWS   rows that a warp makes at once
//   ALIGNED     1: every row of q and k starts on 16 bytes
//   SPLIT       1: float32 by three TF32 products; 0: one
//   SHARED_BYTES  what the plan reserves
#include "tile/product.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements. A KV head of a batch entry has the unit batch * unit_batch + head_kv. Factors are
// contiguous, (kv_units, columns / 16, kParts, kSteps, 32): a chunk is what a lane has of a matrix instruction.
struct ProjectParams {
    const T* q;
    const T* k;
    T* qhat;                 // (batch, heads, seqlen_q, columns), contiguous
    T* khat;                 // (batch, heads_kv, seqlen_k, columns), contiguous
    const Chunk* q_factors;  // A; columns rounded up to kGroup
    const Chunk* k_factors;  // B, the same
    const float* bias;       // (kv_units, columns): mean B
    const Chunk* mean;       // (kv_units, kParts, kSteps, 4): lanes 0 to 3, with four parts of the mean in two columns
    const i32* widths;       // (kv_units): columns to make, others are not written. -1: none, and no shift
    const Chunk* sketch;     // (kv_units, kParts, kSteps, 32): random vectors less what the factors keep of them
    // Of the queries, (batch, heads, seqlen_q), contiguous; null if not wanted.
    float* residual;         // |q sketch|**2; not written for a width of -1
    float* shift;            // scale * q mean; 0 for a width of -1
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i32 slices;              // of COLUMNS columns; a thread block has one
    i32 block_rows;          // rows of a thread block, whole tiles
    i32 q_blocks, k_blocks;  // of block_rows rows, per head
    i32 q_units;             // q_blocks of all heads; the thread blocks behind them have keys
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 columns;
    i32 unit_batch;          // KV heads if every batch entry has factors of its own, 0 if all share them
    float scale;
};

namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = kThreads / kWarpSize * WARP_ROWS;
constexpr int kRowTiles = WARP_ROWS / 8;
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kAcross = 4 * kElements;                       // of a row, that four lanes read at once
constexpr int kChunks = (HEAD_DIM + kAcross - 1) / kAcross;  // of a row, that a lane reads
constexpr int kSteps = 2 * kChunks;                          // matrix instructions along a row
constexpr int kGroup = 32;                                   // columns made at once, PROJECT_GROUP in plan.py
static_assert(WARP_ROWS % 8 == 0 && COLUMNS % kGroup == 0, "tiles are made of matrix instructions");

// What the lanes have of 16 columns of the factors.
struct FactorTile {
    Chunk of_lane[kParts][kSteps][kWarpSize];
};

struct SharedStorage {
    FactorTile factors[COLUMNS / 16];
    FactorTile sketch;
    Chunk mean[kParts][kSteps][4];
    alignas(16) float bias[COLUMNS];
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

// What a lane has of its warp's rows: of the rows lane / 4, + 8, ... the chunks lane % 4, + 4, ...
typedef Chunk RowChunks[kRowTiles][kChunks];

// Where a thread block stands.
struct Place {
    bool of_queries;
    int batch_head, batch, head, unit, first_row, first_column, rows;

    DEVICE explicit Place(const ProjectParams& params) {
        const int block = block_index() / params.slices;
        of_queries = block < params.q_units;
        const int tile = of_queries ? block : block - params.q_units;
        const int blocks = of_queries ? params.q_blocks : params.k_blocks;
        const int heads_kv = params.heads / params.heads_per_kv;
        const int heads = of_queries ? params.heads : heads_kv;
        batch_head = tile / blocks;
        batch = batch_head / heads;
        head = batch_head % heads;
        unit = batch * params.unit_batch + (of_queries ? head / params.heads_per_kv : head);
        first_row = tile % blocks * params.block_rows;
        first_column = block_index() % params.slices * COLUMNS;
        rows = min(params.block_rows, (of_queries ? params.seqlen_q : params.seqlen_k) - first_row);
    }
};

// The thread block's copy of so many chunks. The caller commits and waits.
DEVICE void copy_chunks(void* to, const Chunk* from, int count) {
    const u32 address = shared_address(to);
#pragma unroll 4
    for (int i = thread_index(); i < count; i += kThreads) cp_async_chunk(address + i * kChunkBytes, from + i, true);
}

// source: this lane's first chunk; `rows` are left from its row on. What lies outside becomes zero.
DEVICE void read_rows(RowChunks& chunks, const T* source, i64 row_stride, int rows, int column) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
        const T* from = source + tile * 8 * row_stride;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const bool valid = tile * 8 < rows && (HEAD_DIM % kAcross == 0 || column + i * kAcross < HEAD_DIM);
            if constexpr (ALIGNED) {
                const Chunk* chunk = reinterpret_cast<const Chunk*>(from + i * kAcross);
                chunks[tile][i] = valid ? *chunk : Chunk{{0, 0, 0, 0}};
            } else {
                chunks[tile][i] = gather_chunk(from + i * kAcross, valid);
            }
        }
    }
}

// Factors times rows. factors: this lane's first chunk; its next part, step and tile of 16 columns are constants away.
// The smaller part first.
template <bool kSplit, int kPitch, int kTiles>
DEVICE void multiply_rows(float (&product)[kRowTiles][kTiles][4], const RowChunks& rows, const Chunk* factors) {
    typedef Multiply<T, kSplit> Mma;
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            typename Mma::B right[kRowTiles];
#pragma unroll
            for (int tile = 0; tile < kRowTiles; ++tile) {
                const u32(&word)[4] = rows[tile][step / 2].word;
                right[tile] = Mma::right(anew(word[step % 2 * 2]), anew(word[step % 2 * 2 + 1]));
            }
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const Chunk chunk = factors[((i * kParts + part) * kSteps + step) * kPitch];
                const typename Mma::A left = Mma::left(chunk.word);
#pragma unroll
                for (int tile = 0; tile < kRowTiles; ++tile) Mma::run(product[tile][i], left, right[tile]);
            }
        }
    }
}

// Stores four columns of a row.
DEVICE void store_four(float* out, float a, float b, float c, float d) {
    *reinterpret_cast<Chunk*>(out) =
        Chunk{{__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)}};
}
template <class Element>
DEVICE void store_four(Element* out, float a, float b, float c, float d) {
    const u64 high = Traits<Element>::pack(c, d);
    *reinterpret_cast<u64*>(out) = high << 32 | Traits<Element>::pack(a, b);
}

// kGroup columns of the result. Here and below a lane has rows lane % 4 * 2 and + 1 of every 8; `rows` are left from
// the first of them on. out, bias: where its four columns are.
DEVICE void store_columns(T* out, int columns, const float (&product)[kRowTiles][2][4], const float (&bias)[4],
                          int rows) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float(&of)[2][4] = product[tile];
            if (tile * 8 + i >= rows) continue;
            store_four(out + (tile * 8 + i) * columns, of[0][i] - bias[0], of[0][i + 2] - bias[1], of[1][i] - bias[2],
                       of[1][i + 2] - bias[3]);
        }
    }
}

// |q sketch|**2.
DEVICE void store_residual(float* residual, const RowChunks& chunks, const FactorTile& sketch, int rows, int lane) {
    float product[kRowTiles][1][4] = {};
    multiply_rows<SPLIT, kWarpSize>(product, chunks, &sketch.of_lane[0][0][lane]);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float(&of)[4] = product[tile][0];
            float sum = fmaf(of[i], of[i], of[i + 2] * of[i + 2]);
#pragma unroll
            for (int distance = 4; distance < kWarpSize; distance *= 2) {
                sum += __shfl_xor_sync(kFullWarp, sum, distance);
            }
            if (lane < 4 && tile * 8 + i < rows) residual[tile * 8 + i] = sum;
        }
    }
}

// scale * q mean. All lanes with the same rows make the same.
DEVICE void store_shift(float* shift, const RowChunks& chunks, const Chunk* mean, int rows, float scale, int lane) {
    float product[kRowTiles][1][4] = {};
    multiply_rows<true, 4>(product, chunks, mean + lane % 4);
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = product[tile][0][i] + product[tile][0][i + 2];
            if (lane < 4 && tile * 8 + i < rows) shift[tile * 8 + i] = sum * scale;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2) smxx_project(const ProjectParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const Place place(params);
    const int wanted = params.widths[place.unit];
    const int width = max(0, min(wanted - place.first_column, COLUMNS));
    const bool shifted = place.of_queries && place.first_column == 0 && params.shift;
    const bool sketched = place.of_queries && place.first_column == 0 && params.residual;
    i64 row = static_cast<i64>(place.batch_head) * (place.of_queries ? params.seqlen_q : params.seqlen_k) +
              place.first_row;  // of all heads
    if (wanted < 0) {
        if (shifted) {
#pragma unroll 1
            for (int i = thread_index(); i < place.rows; i += kThreads) params.shift[row + i] = 0.f;
        }
        return;
    }
    if (width == 0 && !shifted && !sketched) return;

    constexpr int kTileChunks = sizeof(FactorTile) / kChunkBytes;
    const int tiles = (params.columns + kGroup - 1) / kGroup * 2;  // of a unit
    const i64 unit = place.unit;
    const i64 first_tile = unit * tiles + place.first_column / 16;
    copy_chunks(shared.factors, (place.of_queries ? params.q_factors : params.k_factors) + first_tile * kTileChunks,
                (width + kGroup - 1) / kGroup * 2 * kTileChunks);
    if (sketched) copy_chunks(&shared.sketch, params.sketch + unit * kTileChunks, kTileChunks);
    if (shifted) copy_chunks(shared.mean, params.mean + unit * (kTileChunks / 8), kTileChunks / 8);
    cp_async_commit();

    const int lane = thread_index() % kWarpSize;
    int rows = place.rows - thread_index() / kWarpSize * WARP_ROWS;  // left from this warp's first row on
    row += place.rows - rows;
    const int column = lane % 4 * kElements;  // of what this lane reads
    const i64 row_stride = place.of_queries ? params.q_row : params.k_row;
    const T* source = (place.of_queries ? params.q + place.batch * params.q_batch + place.head * params.q_head
                                        : params.k + place.batch * params.k_batch + place.head * params.k_head) +
                      (place.first_row + place.rows - rows + lane / 4) * row_stride + column;
    RowChunks chunks;
    read_rows(chunks, source, row_stride, rows - lane / 4, column);

    const float* bias = params.bias + unit * params.columns + place.first_column;
#pragma unroll 1
    for (int i = thread_index(); i < COLUMNS; i += kThreads) {
        shared.bias[i] = place.of_queries || i >= width ? 0.f : bias[i];
    }
    cp_async_wait<0>();
    __syncthreads();  // the factors have landed

    const int out_row = lane % 4 * 2, out_column = lane / 4 * 4;  // of what this lane writes
    for (; rows > 0; rows -= kTileRows) {
        T* out = (place.of_queries ? params.qhat : params.khat) + (row + out_row) * params.columns +
                 place.first_column + out_column;
#pragma unroll 1
        for (int first = 0; first < width; first += kGroup) {
            float product[kRowTiles][2][4] = {};
            multiply_rows<SPLIT, kWarpSize>(product, chunks, &shared.factors[first / 16].of_lane[0][0][lane]);
            if (first + out_column >= width) continue;
            const Chunk four = *reinterpret_cast<const Chunk*>(&shared.bias[first + out_column]);
            const float off[4] = {__uint_as_float(four.word[0]), __uint_as_float(four.word[1]),
                                  __uint_as_float(four.word[2]), __uint_as_float(four.word[3])};
            store_columns(out + first, anew(params.columns), product, off, rows - out_row);
        }
        if (sketched) {
            store_residual(params.residual + row + out_row, chunks, shared.sketch, rows - out_row, lane);
        }
        if (shifted) {
            store_shift(params.shift + row + out_row, chunks, shared.mean[0][0], rows - out_row, params.scale, lane);
        }
        row += kTileRows;
        source += kTileRows * row_stride;
        read_rows(chunks, source, anew(row_stride), rows - kTileRows - lane / 4, column);
    }
}
