// Column order of every block of queries by angular LSH: hash, Gray rank, stable sort. One thread block per block of
// queries; one thread per pair of columns, so that a projection read from shared memory is used twice. The NumPy twin
// is reference.order, and both give the same bits: float32 sums over the rows in order, product and sum rounded apart
// (no fma). A sum of exactly zero, or a NaN, gives bit 0.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM (at most 256), ALIGNED (1: every row of q starts on
// 16 bytes, so that two columns are one load).
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

namespace {
constexpr int kProjections = 16;  // what LSH allows; fewer are padded with zero vectors, whose bits are 0
constexpr int kStageRows = 32;    // rows of the projections in shared memory at a time
constexpr int kPairs = HEAD_DIM / 2;
constexpr int kThreads = (kPairs + kWarpSize - 1) / kWarpSize * kWarpSize;

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
DEVICE u32 sort_key(const float (&sums)[kProjections], int column) {
    u32 rank = 0;
#pragma unroll
    for (int b = 0; b < kProjections; ++b) rank |= sums[b] > 0.f ? 1u << b : 0u;
#pragma unroll
    for (int shift = 1; shift < kProjections; shift *= 2) rank ^= rank >> shift;
    return rank << 8 | static_cast<u32>(column);
}
}  // namespace

struct GroupParams {
    const T* q;
    const float* projections;  // (block_q, kProjections), contiguous: the transpose of the reference's R
    u8* permutation;           // (batch, heads, group_blocks, HEAD_DIM), contiguous
    i64 q_batch, q_head, q_row;
    i32 heads, seqlen_q, block_q, group_blocks;
};

extern "C" __global__ void __launch_bounds__(kThreads) smxx_lsh_group(const GroupParams params) {
    __shared__ __align__(16) float stage[kStageRows][kProjections];
    __shared__ u32 keys[HEAD_DIM];

    const int column = threadIdx.x * 2;
    const int block = blockIdx.x % params.group_blocks;
    const int batch_head = blockIdx.x / params.group_blocks;
    const int first_row = block * params.block_q;
    const int rows = min(params.block_q, params.seqlen_q - first_row);
    // Threads past the last column read column 0 again, so that all may meet at the barriers.
    const T* q = params.q + batch_head / params.heads * params.q_batch + batch_head % params.heads * params.q_head +
                 first_row * params.q_row + (column < HEAD_DIM ? column : 0);

    float sums[2][kProjections] = {};
    for (int start = 0; start < rows; start += kStageRows) {
        const int staged = min(kStageRows, rows - start);
        __syncthreads();
        for (int i = threadIdx.x; i < staged * kProjections; i += kThreads) {
            stage[i / kProjections][i % kProjections] = params.projections[start * kProjections + i];
        }
        __syncthreads();
#pragma unroll 8
        for (int row = 0; row < staged; ++row) {
            const Pair pair = load_pair(q);
            q += params.q_row;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = Traits<T>::to_float(pair.element[i]);
#pragma unroll
                for (int b = 0; b < kProjections; ++b) sums[i][b] = __fadd_rn(sums[i][b], __fmul_rn(stage[row][b], x));
            }
        }
    }

    if (column < HEAD_DIM) {
        keys[column] = sort_key(sums[0], column);
        keys[column + 1] = sort_key(sums[1], column + 1);
    }
    __syncthreads();
    // The number of smaller keys is a column's place.
    u8* permutation = params.permutation + static_cast<i64>(blockIdx.x) * HEAD_DIM;
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
        const u32 key = keys[i];
        int place = 0;
#pragma unroll 8
        for (int other = 0; other < HEAD_DIM; ++other) place += keys[other] < key;
        permutation[place] = static_cast<u8>(key);
    }
}
