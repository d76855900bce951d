// What stands for the queries of a reduced problem in a product with K as it is: sum_t qhat_t khat_t of groups is
// sum_c (qhat_t(c) w_c) k_c, and columns that are not kept have their mean in the block. The twin is what
// reference._scores_of takes for q; what it leaves out of the lse, smxx_energy_order.cu and smxx_lsh_weights.cu say.
//
// A thread block has kRows rows of one block of queries, whose columns have one order.
//
// Constants: DTYPE (0 float16, 1 bfloat16), HEAD_DIM, GROUP (columns per group; with KEEP 1), KEEP (0; or so many columns
// that are kept, the first of the order).
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements; rows of q start on 16 bytes.
struct CopiedParams {
    const T* q;
    const u8* permutation;  // (batch, heads, group_blocks, HEAD_DIM), contiguous
    const float* numbers;   // the same shape, in this order: means; or weights for K, and behind all of them shares for Q
    T* copied;              // (batch, heads, seqlen_q, HEAD_DIM), contiguous
    i64 q_batch, q_head, q_row;
    i64 shares;  // from weights to shares
    i32 heads, seqlen_q, block_q, group_blocks, parts;
};

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kChunks = HEAD_DIM / kElements;  // of a row
constexpr int kGroups = HEAD_DIM / GROUP;
static_assert(HEAD_DIM % kElements == 0 && HEAD_DIM % GROUP == 0, "rows are whole chunks, and whole groups");
static_assert(KEEP < HEAD_DIM && (KEEP == 0 || GROUP == 1), "kept columns are groups of one");

union Elements {
    Chunk chunk;
    T element[kElements];
};

struct Storage {
    // Of each column: its group, or whether it is kept; and its weight, or what it has instead.
    u8 group[HEAD_DIM];
    float number[HEAD_DIM];
#if !KEEP
    alignas(16) T rows[kRows][HEAD_DIM];  // as they came
    float qhat[kRows][kGroups];
#endif
};

#if !KEEP
DEVICE void find_qhat(Storage& shared, const CopiedParams& params, const T* q, const u8* permutation, const float* weights,
                      int count) {
    for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int column = i % kChunks * kElements;
        *reinterpret_cast<Chunk*>(&shared.rows[row][column]) = *reinterpret_cast<const Chunk*>(q + row * params.q_row + column);
    }
    __syncthreads();
    // A thread has one group, and as many rows as there are for it.
    constexpr int kAtOnce = kThreads / kGroups;
    const int group = threadIdx.x % kGroups;
    if (kThreads % kGroups && threadIdx.x >= kAtOnce * kGroups) return;
    int columns[GROUP];
    float share[GROUP];
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        columns[i] = permutation[group * GROUP + i];
        share[i] = weights[params.shares + group * GROUP + i];
        square = fmaf(share[i], weights[group * GROUP + i], square);
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i) share[i] /= square;
#pragma unroll 4
    for (int row = threadIdx.x / kGroups; row < count; row += kAtOnce) {
        float qhat = 0.f;
#pragma unroll
        for (int i = 0; i < GROUP; ++i) qhat = fmaf(share[i], Traits<T>::to_float(shared.rows[row][columns[i]]), qhat);
        shared.qhat[row][group] = qhat;
    }
}
#endif

}  // namespace

// The 1 stops ptxas from spilling for the sake of one more thread block per multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_copied_queries(const CopiedParams params) {
    __shared__ Storage shared;
    const int thread = threadIdx.x;
    const i64 unit = static_cast<i64>(blockIdx.x) / params.parts;
    const i64 batch_head = unit / params.group_blocks;
    const int part_row = static_cast<int>(blockIdx.x % params.parts) * kRows;  // within the block of queries
    const int first_row = static_cast<int>(unit % params.group_blocks) * params.block_q + part_row;
    const int count = min(kRows, min(params.block_q - part_row, params.seqlen_q - first_row));
    const T* q = params.q + batch_head / params.heads * params.q_batch + batch_head % params.heads * params.q_head +
                 first_row * params.q_row;
    T* copied = params.copied + (batch_head * params.seqlen_q + first_row) * HEAD_DIM;
    const u8* permutation = params.permutation + unit * HEAD_DIM;
    const float* numbers = params.numbers + unit * HEAD_DIM;
    for (int place = thread; place < HEAD_DIM; place += kThreads) {
        const int column = permutation[place];
        shared.group[column] = static_cast<u8>(KEEP ? place < KEEP : place / GROUP);
        shared.number[column] = numbers[place];
    }
#if !KEEP
    find_qhat(shared, params, q, permutation, numbers, count);
#endif
    __syncthreads();
    for (int i = thread; i < count * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int column = i % kChunks * kElements;
        Elements own;
#if KEEP
        own.chunk = *reinterpret_cast<const Chunk*>(q + row * params.q_row + column);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            if (!shared.group[column + j]) own.element[j] = Traits<T>::from_float(shared.number[column + j]);
        }
#else
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            const float qhat = shared.qhat[row][shared.group[column + j]];
            own.element[j] = Traits<T>::from_float(qhat * shared.number[column + j]);
        }
#endif
        *reinterpret_cast<Chunk*>(copied + row * HEAD_DIM + column) = own.chunk;
    }
}
