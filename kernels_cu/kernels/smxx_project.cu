// Queries and keys in fewer columns: Qhat = Q A, Khat = (K - mean) B, with factors of their own for every KV head.
// One thread block makes the columns of BLOCK_M rows of one head; the factors stream through shared memory.
//
// 16-bit factors come in two parts, the rounded number and the rest, so that what rounds the result is its own dtype.
// The mean is taken off after the product, as a row of numbers mean B: no difference is rounded to 16 bits.
//
// Constants, defined by the plan:
//   DTYPE       0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K
//   BLOCK_M     rows per thread block; COLUMNS of the factors per step
//   ALIGNED     1: every row of q and k starts on 16 bytes
//   SPLIT       1: float32 by three TF32 products; 0: one
//   SHARED_BYTES  what the plan reserves
#include "tile/product.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements. Factors are contiguous, (kv_units, kParts, columns, HEAD_DIM): a row is a column of A or B.
// A KV head of a batch entry has the unit batch * unit_batch + head_kv.
struct ProjectParams {
    const T* q;
    const T* k;
    T* qhat;             // (batch, heads, seqlen_q, columns), contiguous
    T* khat;             // (batch, heads_kv, seqlen_k, columns), contiguous
    const T* q_factors;  // A
    const T* k_factors;  // B
    const float* bias;   // (kv_units, columns): mean B
    const float* mean;   // (kv_units, HEAD_DIM)
    const i32* widths;   // (kv_units): columns to make, at most columns; the others are not written
    const T* sketch;     // (kv_units, kParts, kSketch, HEAD_DIM): random vectors less what the factors keep of them
    float* residual;     // (batch, heads, seqlen_q), contiguous: |q sketch|**2, if there are columns; null if not wanted
    float* shift;        // (batch, heads, seqlen_q), contiguous: scale * q mean, 0 without columns; null if not wanted
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i32 q_tiles;             // thread blocks that have queries; the others have keys
    i32 q_blocks, k_blocks;  // of BLOCK_M rows, per head
    i32 heads, heads_per_kv, seqlen_q, seqlen_k;
    i32 columns;
    i32 unit_batch;          // KV heads if every batch entry has factors of its own, 0 if all share them
    float scale;
};

namespace {

constexpr int kDepth = (HEAD_DIM + 15) / 16 * 16;
constexpr int kWarps = BLOCK_M / 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kSteps = kDepth / Traits<T>::kMmaDepth;
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
constexpr bool kSplit = SPLIT;
constexpr int kSketch = 16;  // SKETCH in projection.py
static_assert(BLOCK_M % 16 == 0 && COLUMNS % 16 == 0, "tiles are made of 16-row matrix instructions");

typedef SharedTile<T, BLOCK_M, kDepth> RowTile;
typedef SharedTile<T, COLUMNS, kDepth> FactorTile;
typedef RowCopy<ALIGNED, kThreads, HEAD_DIM, T, RowTile> Rows;
typedef RowCopy<true, kThreads, HEAD_DIM, T, FactorTile> Factors;

struct SharedStorage {
    RowTile rows;
    FactorTile factors[2][kParts];
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

struct alignas(2 * sizeof(T)) Pair {
    T element[2];
};

// Where a thread block stands.
struct Place {
    bool of_queries;
    int batch_head, batch, head, unit, first_row, rows;

    DEVICE explicit Place(const ProjectParams& params) {
        const int block = block_index();
        of_queries = block < params.q_tiles;
        const int tile = of_queries ? block : block - params.q_tiles;
        const int blocks = of_queries ? params.q_blocks : params.k_blocks;
        const int heads_kv = params.heads / params.heads_per_kv;
        const int heads = of_queries ? params.heads : heads_kv;
        batch_head = tile / blocks;
        batch = batch_head / heads;
        head = batch_head % heads;
        unit = batch * params.unit_batch + (of_queries ? head / params.heads_per_kv : head);
        first_row = tile % blocks * BLOCK_M;
        rows = min(BLOCK_M, (of_queries ? params.seqlen_q : params.seqlen_k) - first_row);
    }
};

// The columns of a factor from `first` on, into a stage.
DEVICE void copy_factors(const T* factors, int unit, int columns, FactorTile (&stage)[kParts], int first) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const i64 row = (static_cast<i64>(unit) * kParts + part) * columns + first;
        Factors copy;
        copy.open(factors + row * HEAD_DIM, HEAD_DIM);
        copy.run(stage[part], HEAD_DIM, columns - first);
    }
}

// Rows times the factors of a stage. The smaller part first.
DEVICE void multiply_factors(float (&product)[1][COLUMNS / 8][4], u32 left, const FactorTile (&stage)[kParts], int lane) {
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
        multiply_queries_keys<T, kSplit, kSteps, 0, RowTile::kPitch>(product, left, stage[part], lane);
    }
}

// |q sketch|**2 for the rows of this warp. The sketch has landed in a stage.
DEVICE void store_residual(const ProjectParams& params, const Place& place, u32 left, const FactorTile (&stage)[kParts],
                           int warp, int lane) {
    float product[1][COLUMNS / 8][4] = {};
    multiply_factors(product, left, stage, lane);
    float* residual = params.residual + static_cast<i64>(place.batch_head) * params.seqlen_q + place.first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
#pragma unroll
        for (int nt = 0; nt < COLUMNS / 8; ++nt) {
#pragma unroll
            for (int i = 0; i < 2; ++i) sum = fmaf(product[0][nt][half * 2 + i], product[0][nt][half * 2 + i], sum);
        }
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const int row = warp * 16 + lane / 4 + half * 8;
        if (lane % 4 == 0 && row < place.rows) residual[row] = sum;
    }
}

// scale * q mean for the rows of this warp; a row at a time, its columns shared out between lanes.
DEVICE void store_shift(const ProjectParams& params, const Place& place, const RowTile& tile, int width, int warp,
                        int lane) {
    const float* mean = params.mean + static_cast<i64>(place.unit) * HEAD_DIM;
    float* shift = params.shift + static_cast<i64>(place.batch_head) * params.seqlen_q + place.first_row;
    for (int row = warp * 16; row < min(warp * 16 + 16, place.rows); ++row) {
        float sum = 0.f;
        if (width) {
            for (int column = lane; column < HEAD_DIM; column += kWarpSize) {
                sum = fmaf(Traits<T>::to_float(tile.at(row, column)), mean[column], sum);
            }
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
        }
        if (lane == 0) shift[row] = sum * params.scale;
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_project(const ProjectParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const int lane = thread_index() % kWarpSize;
    const int warp = thread_index() / kWarpSize;
    const Place place(params);
    const int width = params.widths[place.unit];
    const bool shifted = place.of_queries && params.shift;
    if (width == 0) {
        if (shifted) store_shift(params, place, shared.rows, width, warp, lane);
        return;
    }

    Rows rows;
    const i64 row_stride = place.of_queries ? params.q_row : params.k_row;
    rows.open((place.of_queries ? params.q + place.batch * params.q_batch + place.head * params.q_head
                                : params.k + place.batch * params.k_batch + place.head * params.k_head) +
                  place.first_row * row_stride,
              row_stride);
    rows.run(shared.rows, row_stride, place.rows);
    const T* factors = place.of_queries ? params.q_factors : params.k_factors;
    copy_factors(factors, place.unit, params.columns, shared.factors[0], 0);
    cp_async_commit();

    const u32 left = left_address<T>(shared.rows, warp * 16, lane);
    T* out = (place.of_queries ? params.qhat + (static_cast<i64>(place.batch_head) * params.seqlen_q) * params.columns
                               : params.khat + (static_cast<i64>(place.batch_head) * params.seqlen_k) * params.columns) +
             static_cast<i64>(place.first_row) * params.columns;
    const float* bias = params.bias + static_cast<i64>(place.unit) * params.columns;
    for (int first = 0, step = 0; first < width; first += COLUMNS, ++step) {
        cp_async_wait<0>();
        __syncthreads();  // the factors have landed, and every warp is done with those of the last step
        FactorTile(&next)[kParts] = shared.factors[(step + 1) % 2];
        if (first + COLUMNS < width) {
            copy_factors(factors, place.unit, params.columns, next, first + COLUMNS);
        } else if (place.of_queries && params.residual) {
            copy_factors(params.sketch, place.unit, kSketch, next, 0);
        }
        cp_async_commit();
        float product[1][COLUMNS / 8][4] = {};
        multiply_factors(product, left, shared.factors[step % 2], lane);
#pragma unroll
        for (int nt = 0; nt < COLUMNS / 8; ++nt) {
            const int column = first + nt * 8 + lane % 4 * 2;
            if (column >= width) continue;
            float off[2] = {};
            if (!place.of_queries) {
                off[0] = bias[column];
                off[1] = bias[column + 1];
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp * 16 + lane / 4 + half * 8;
                if (row >= place.rows) continue;
                const float(&pair)[4] = product[0][nt];
                *reinterpret_cast<Pair*>(out + static_cast<i64>(row) * params.columns + column) = {
                    {Traits<T>::from_float(pair[half * 2] - off[0]), Traits<T>::from_float(pair[half * 2 + 1] - off[1])}};
            }
        }
    }
    cp_async_wait<0>();
    if (shifted) store_shift(params, place, shared.rows, width, warp, lane);
    if (place.of_queries && params.residual) {
        __syncthreads();  // the sketch has landed
        store_residual(params, place, left, shared.factors[(width + COLUMNS - 1) / COLUMNS % 2], warp, lane);
    }
}
