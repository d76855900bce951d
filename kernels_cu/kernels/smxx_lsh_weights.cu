// Weights of the columns of each group of grouped attention: their best approximation of rank one. The NumPy twin is
// reference.balance, and both give the same bits: float32, one order of sums, product and sum rounded apart.
//
// One thread block for a block of queries. The products of a group's columns are a matrix (GROUP x GROUP); squared
// again and again, its columns become the eigenvector of its largest eigenvalue.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM, GROUP (columns per group).
#include "tile/dtype.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct WeightsParams {
    const T* q;
    u8* permutation;  // (batch, heads, group_blocks, HEAD_DIM), contiguous; each group's largest column is moved first
    float* weights;   // the same shape: of the columns in this order
    i64 q_batch, q_head, q_row;
    i32 heads, seqlen_q, block_q, group_blocks;
};

namespace {

constexpr int kThreads = 128;
constexpr int kGroups = HEAD_DIM / GROUP;
constexpr int kProducts = HEAD_DIM * GROUP;  // of all groups
constexpr int kOwn = (kProducts + kThreads - 1) / kThreads;
constexpr int kStageRows = 8;
constexpr int kSquarings = 10;
constexpr float kSteps = 256.f;  // weights are multiples of 1 / 256: every dtype has them exactly

struct Storage {
    float stage[kStageRows][HEAD_DIM];  // rows of Q, columns in the block's order
    float products[kGroups][GROUP][GROUP];
    u8 columns[HEAD_DIM];
};

// The products that a thread has, in registers between the steps.
struct Own {
    float value[kOwn];

    // function(value, group, a, b) for each.
    template <class Function>
    DEVICE void each(Function function) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int index = threadIdx.x + i * kThreads;
            if (kProducts % kThreads == 0 || index < kProducts) {
                function(value[i], index / (GROUP * GROUP), index / GROUP % GROUP, index % GROUP);
            }
        }
    }
};

// Every thread has read what it needs of the old products; these are the new ones.
DEVICE void publish(Storage& shared, Own& own) {
    __syncthreads();
    own.each([&](float& value, int group, int a, int b) { shared.products[group][a][b] = value; });
    __syncthreads();
}

// Nearest, ties to even, for numbers up to 2**22.
DEVICE float round_to_integer(float x) { return __fadd_rn(__fadd_rn(x, 12582912.f), -12582912.f); }

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) smxx_lsh_weights(const WeightsParams params) {
    __shared__ Storage shared;
    const i64 batch_head = blockIdx.x / params.group_blocks;
    const int first_row = static_cast<int>(blockIdx.x % params.group_blocks) * params.block_q;
    const int rows = min(params.block_q, params.seqlen_q - first_row);
    const T* q = params.q + batch_head / params.heads * params.q_batch + batch_head % params.heads * params.q_head +
                 first_row * params.q_row;
    u8* permutation = params.permutation + static_cast<i64>(blockIdx.x) * HEAD_DIM;
    float* weights = params.weights + static_cast<i64>(blockIdx.x) * HEAD_DIM;

    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) shared.columns[i] = permutation[i];
    Own own = {};
    for (int start = 0; start < rows; start += kStageRows) {
        const int staged = min(kStageRows, rows - start);
        __syncthreads();  // the columns are there, and every thread is done with the rows before
        for (int i = threadIdx.x; i < staged * HEAD_DIM; i += kThreads) {
            const T* row = q + (start + i / HEAD_DIM) * params.q_row;
            shared.stage[i / HEAD_DIM][i % HEAD_DIM] = Traits<T>::to_float(row[shared.columns[i % HEAD_DIM]]);
        }
        __syncthreads();
        own.each([&](float& value, int group, int a, int b) {
            for (int row = 0; row < staged; ++row) {
                const float* columns = shared.stage[row] + group * GROUP;
                value = __fadd_rn(value, __fmul_rn(columns[a], columns[b]));
            }
        });
    }
    publish(shared, own);

    for (int squaring = 0; squaring < kSquarings; ++squaring) {
        own.each([&](float& value, int group, int a, int b) {
            float trace = 0.f;
            for (int member = 0; member < GROUP; ++member) {
                trace = __fadd_rn(trace, shared.products[group][member][member]);
            }
            value = __fdiv_rn(value, trace);
        });
        publish(shared, own);
        own.each([&](float& value, int group, int a, int b) {
            value = 0.f;
            for (int member = 0; member < GROUP; ++member) {
                value = __fadd_rn(value, __fmul_rn(shared.products[group][a][member], shared.products[group][member][b]));
            }
        });
        publish(shared, own);
    }

    for (int group = threadIdx.x; group < kGroups; group += kThreads) {
        int lead = 0;
        float largest = shared.products[group][0][0];
        for (int member = 1; member < GROUP; ++member) {
            const float square = shared.products[group][member][member];
            if (square > largest) {
                largest = square;
                lead = member;
            }
        }
        for (int member = 0; member < GROUP; ++member) {
            // The largest column and the first change places.
            const int place = member == lead ? 0 : member == 0 ? lead : member;
            const float ratio = __fdiv_rn(shared.products[group][lead][member], largest);
            const float weight = round_to_integer(__fmul_rn(ratio, kSteps)) * (1.f / kSteps);
            // Of zeros and of what is not a number there is no ratio.
            weights[group * GROUP + place] = member == lead ? 1.f : fabsf(weight) <= 1.f ? weight : 0.f;
            permutation[group * GROUP + place] = shared.columns[group * GROUP + member];
        }
    }
}
