// Weights of the columns of each group of grouped attention: the best approximation of rank one of what they add to the
// scores. The NumPy twin is reference.balance, and both give the same bits: float32, one order of sums, product and sum
// rounded apart. And what they leave out of the weight of reduced keys, Lacking.
//
// One thread block for a block of queries. The products of a group's columns, each times how much its column of K varies,
// are a matrix (GROUP x GROUP); squared again and again, its columns become the eigenvector of its largest eigenvalue.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM, GROUP (columns per group).
#include "tile/dtype.cuh"
#include "tile/shared.cuh"
#include "tile/spread.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct WeightsParams {
    const T* q;
    const T* k;
    const float* sums;  // of smxx_key_energy.cu
    u8* permutation;    // (batch, heads, group_blocks, HEAD_DIM), contiguous; each group's largest column is moved first
    float* weights;     // the same shape: of the columns in this order, for K
    float* shares;      // for Q
    float* shift;       // (batch, heads, seqlen_q), contiguous; null if not wanted
    i64 q_batch, q_head, q_row, k_batch, k_head;
    i32 heads, heads_per_kv, seqlen_q, seqlen_k, block_q, group_blocks, spans;
    i32 rounded;  // whether what stands for a column is T
    float scale;
};

namespace {

constexpr int kThreads = 128;
constexpr int kGroups = HEAD_DIM / GROUP;
constexpr int kProducts = HEAD_DIM * GROUP;  // of all groups
constexpr int kOwn = (kProducts + kThreads - 1) / kThreads;
constexpr int kSquarings = 10;
constexpr float kLeastSpread = 1.f / 64.f;       // of a column, as a part of the largest in its group
constexpr float kLeastWeight = 1.f / 16384.f;    // smaller ones are 0; the others every dtype has exactly

// Rows that are staged: as many as threads, or as there is room for in 48 KB.
constexpr int kRoom = (48 * 1024 - 512 - 4 * kProducts - 24 * HEAD_DIM) / (HEAD_DIM * int(sizeof(T)) + 4);
constexpr int kStageRows = kRoom >= kThreads ? kThreads : kRoom >= 64 ? 64 : kRoom >= 32 ? 32 : kRoom >= 16 ? 16 : 8;
static_assert(kRoom >= 8, "products leave room for some rows");
typedef OddTile<T, kStageRows, HEAD_DIM> Rows;
constexpr int kLoads = 16;  // in flight

struct Storage {
    Rows rows;  // of Q, as they come
    float products[kGroups][GROUP][GROUP];
    // Of the columns in the order in which they came; at last in the new one.
    u8 columns[HEAD_DIM];
    float energies[HEAD_DIM], spread[HEAD_DIM], means[HEAD_DIM];
    float weights[HEAD_DIM], shares[HEAD_DIM];
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

// Nearest with eight significant bits, ties to even.
DEVICE float round_to_eight_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// How much each column of K varies, as a part of the largest in its group.
DEVICE void find_spread(Storage& shared) {
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
        float largest = 0.f;
        for (int member = 0; member < GROUP; ++member) {
            const float energy = shared.energies[i / GROUP * GROUP + member];
            if (energy > largest) largest = energy;
        }
        const float relative = __fdiv_rn(shared.energies[i], largest);
        const float spread = relative >= kLeastSpread ? relative : kLeastSpread;  // of what is not a number too
        shared.spread[i] = largest > 0.f && largest < infinity() ? spread : 1.f;
    }
}

template <class Any>
DEVICE void swap(Any& one, Any& other) {
    const Any kept = one;
    one = other;
    other = kept;
}

// Weights and shares of a group, from the eigenvector that its products have become.
DEVICE void find_weights(Storage& shared, int group, u8* permutation, float* weights, float* shares) {
    int lead = 0;
    float largest = shared.products[group][0][0];
    for (int member = 1; member < GROUP; ++member) {
        const float square = shared.products[group][member][member];
        if (square > largest) {
            largest = square;
            lead = member;
        }
    }
    const int first = group * GROUP;
    for (int member = 0; member < GROUP; ++member) {
        // The largest column and the first change places.
        const int place = first + (member == lead ? 0 : member == 0 ? lead : member);
        const float ratio = __fdiv_rn(shared.spread[first + member], shared.spread[first + lead]);
        float weight = __fdiv_rn(__fdiv_rn(shared.products[group][lead][member], largest), ratio);
        weight = round_to_eight_bits(weight);
        // Of zeros and of what is not a number there is no ratio.
        if (!(fabsf(weight) >= kLeastWeight && fabsf(weight) <= 2.f / kLeastSpread)) weight = 0.f;
        if (member == lead) weight = 1.f;
        const float share = __fmul_rn(ratio, __fmul_rn(ratio, weight));
        shared.weights[first + member] = weights[place] = weight;
        shared.shares[first + member] = shares[place] = share;
        permutation[place] = shared.columns[first + member];
    }
    swap(shared.columns[first], shared.columns[first + lead]);
    swap(shared.energies[first], shared.energies[first + lead]);
    swap(shared.means[first], shared.means[first + lead]);
    swap(shared.weights[first], shared.weights[first + lead]);
    swap(shared.shares[first], shared.shares[first + lead]);
    // From here on as parts of what they sum up to: a group's shares of its columns are its column of Qhat. The same bits as
    // in smxx_copied_queries.cu.
    float square = 0.f;
    for (int i = first; i < first + GROUP; ++i) square = fmaf(shared.shares[i], shared.weights[i], square);
    for (int i = first; i < first + GROUP; ++i) shared.shares[i] /= square;
}

// Rows of Q to the stage.
DEVICE void load_rows(Rows& staged, const T* q, i64 q_row, int rows) {
    __syncthreads();  // every thread is done with the rows before
    for (int start = threadIdx.x; start < rows * HEAD_DIM; start += kLoads * kThreads) {
        T element[kLoads];
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int i = start + n * kThreads;
            if (i < rows * HEAD_DIM) element[n] = q[i / HEAD_DIM * q_row + i % HEAD_DIM];
        }
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int i = start + n * kThreads;
            if (i < rows * HEAD_DIM) staged.at(i / HEAD_DIM, i % HEAD_DIM) = element[n];
        }
    }
    __syncthreads();
}

// What the lse of a staged row lacks.
DEVICE float find_shift(const Storage& shared, const WeightsParams& params, int row) {
    Lacking lacking;
    for (int first = 0; first < HEAD_DIM; first += GROUP) {
        float qhat = 0.f;
        for (int i = first; i < first + GROUP; ++i) {
            qhat = fmaf(shared.shares[i], Traits<T>::to_float(shared.rows.at(row, shared.columns[i])), qhat);
        }
        for (int i = first; i < first + GROUP; ++i) {
            const float element = Traits<T>::to_float(shared.rows.at(row, shared.columns[i]));
            float copied = shared.weights[i] * qhat;
            if (params.rounded) copied = Traits<T>::to_float(Traits<T>::from_float(copied));
            lacking.add(element, copied, shared.energies[i], shared.means[i]);
        }
    }
    return lacking.shift(params.scale, params.seqlen_k);
}

}  // namespace

// The 1 stops ptxas from spilling for the sake of one more thread block per multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_lsh_weights(const WeightsParams params) {
    __shared__ Storage shared;
    const i64 batch_head = blockIdx.x / params.group_blocks;
    const i64 batch = batch_head / params.heads;
    const i64 head = batch_head % params.heads;
    const i64 head_kv = head / params.heads_per_kv;
    const int first_row = static_cast<int>(blockIdx.x % params.group_blocks) * params.block_q;
    const int rows = min(params.block_q, params.seqlen_q - first_row);
    const T* q = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row;
    const T* k = params.k + batch * params.k_batch + head_kv * params.k_head;
    const float* sums =
        params.sums + (batch * (params.heads / params.heads_per_kv) + head_kv) * params.spans * (2 * HEAD_DIM);
    const i64 block = static_cast<i64>(blockIdx.x) * HEAD_DIM;

    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
        const int column = params.permutation[block + i];
        const KeyColumn found = key_column<HEAD_DIM>(sums + column, params.spans, params.seqlen_k);
        shared.columns[i] = static_cast<u8>(column);
        shared.energies[i] = found.energy;
        shared.means[i] = params.seqlen_k > 0 ? Traits<T>::to_float(k[column]) + found.mean : 0.f;
    }
    __syncthreads();
    find_spread(shared);
    Own own = {};
    for (int start = 0; start < rows; start += Rows::kRows) {
        const int staged = min(Rows::kRows, rows - start);
        load_rows(shared.rows, q + start * params.q_row, params.q_row, staged);
        own.each([&](float& value, int group, int a, int b) {
            // Found anew for every stage: large groups have no registers to keep them.
            a = anew(group * GROUP + a);
            b = anew(group * GROUP + b);
            const int columns[2] = {shared.columns[a], shared.columns[b]};
            const float spread[2] = {shared.spread[a], shared.spread[b]};
#pragma unroll(kOwn > 16 ? 1 : 8)
            for (int row = 0; row < staged; ++row) {
                const float first = __fmul_rn(Traits<T>::to_float(shared.rows.at(row, columns[0])), spread[0]);
                const float second = __fmul_rn(Traits<T>::to_float(shared.rows.at(row, columns[1])), spread[1]);
                value = __fadd_rn(value, __fmul_rn(first, second));
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
        find_weights(shared, group, params.permutation + block, params.weights + block, params.shares + block);
    }
    if (!params.shift) return;
    __syncthreads();  // all weights and shares are there
    for (int start = 0; start < rows; start += Rows::kRows) {
        const int staged = min(Rows::kRows, rows - start);
        if (rows > Rows::kRows) load_rows(shared.rows, q + start * params.q_row, params.q_row, staged);
        const int row = threadIdx.x;
        if (row >= staged) continue;
        params.shift[batch_head * params.seqlen_q + first_row + start + row] = find_shift(shared, params, row);
    }
}
