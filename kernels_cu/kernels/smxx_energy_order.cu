// Columns of every block of queries by energy, the largest first, and the mean of Q's columns in the block. The NumPy
// twins are reference.energy_order and the end of reference.key_energies, and both give the same bits: float32, one
// order of sums, product and sum rounded apart. And what the columns that are not kept leave out of the weight of reduced
// keys, Lacking.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM (at most 256).
#include "tile/dtype.cuh"
#include "tile/shared.cuh"
#include "tile/spread.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct EnergyOrderParams {
    const T* q;
    const T* k;
    const float* sums;  // of smxx_key_energy.cu
    u8* permutation;    // (batch, heads, group_blocks, HEAD_DIM), contiguous
    float* means;       // the same shape: of the columns in this order
    float* shift;       // (batch, heads, seqlen_q), contiguous: what the lse lacks; null if not wanted
    i64 q_batch, q_head, q_row, k_batch, k_head;
    i64 units;  // batch * heads * group_blocks
    i32 heads, heads_per_kv, seqlen_q, seqlen_k, block_q, group_blocks, spans;
    i32 keep;  // columns that are multiplied
    i32 rounded;  // whether means are T where they are multiplied
    float scale;
};

namespace {

constexpr int kThreads = 256;
constexpr int kSpan = (HEAD_DIM + kWarpSize - 1) / kWarpSize * kWarpSize;  // threads of one block of queries
constexpr int kUnits = kThreads / kSpan;
constexpr int kRoom = 34 * 1024 / (kUnits * (HEAD_DIM * int(sizeof(T)) + 4));  // rows of each, in shared memory
typedef OddTile<T, kRoom / 8 * 8, HEAD_DIM> Rows;

// What a column adds to what the lse lacks: the energy and the mean of that of K, and what stands for that of Q.
struct Column {
    float energy, key_mean, copied;
    bool kept;
};

}  // namespace

// The 1 stops ptxas from spilling for the sake of one more thread block per multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_energy_order(const EnergyOrderParams params) {
    __shared__ u32 energies[kUnits][HEAD_DIM];
    __shared__ Column columns[kUnits][HEAD_DIM];
    __shared__ Rows staged[kUnits];
    const int unit = threadIdx.x / kSpan;
    const int column = threadIdx.x % kSpan;
    const i64 block = static_cast<i64>(blockIdx.x) * kUnits + unit;
    const bool inside = unit < kUnits && block < params.units;
    const bool active = inside && column < HEAD_DIM;
    const i64 batch_head = block / params.group_blocks;
    const i64 batch = batch_head / params.heads;
    const i64 head = batch_head % params.heads;
    const int first_row = static_cast<int>(block % params.group_blocks) * params.block_q;
    const int rows = min(params.block_q, params.seqlen_q - first_row);
    const T* own = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row + column;
    float mean = 0.f;
    if (active) {
        const i64 head_kv = head / params.heads_per_kv;
        const i64 keys = batch * (params.heads / params.heads_per_kv) + head_kv;
#pragma unroll 32
        for (int row = 0; row < rows; ++row) mean = __fadd_rn(mean, Traits<T>::to_float(own[row * params.q_row]));
        mean = __fdiv_rn(mean, static_cast<float>(rows));
        float square = 0.f;
#pragma unroll 32
        for (int row = 0; row < rows; ++row) {
            const float deviation = __fadd_rn(Traits<T>::to_float(own[row * params.q_row]), -mean);
            square = __fadd_rn(square, __fmul_rn(deviation, deviation));
        }
        const float* sums = params.sums + keys * params.spans * (2 * HEAD_DIM) + column;
        const KeyColumn of_keys = key_column<HEAD_DIM>(sums, params.spans, params.seqlen_k);
        const float energy = __fmul_rn(__fsqrt_rn(square), of_keys.energy);
        // The bits of numbers that are not negative are in the order of the numbers; NaN comes before all.
        energies[unit][column] = energy == energy ? __float_as_uint(energy) : 0x7fffffffu;
        if (params.shift) {
            const T* first = params.k + batch * params.k_batch + head_kv * params.k_head + column;
            columns[unit][column].energy = of_keys.energy;
            columns[unit][column].key_mean = Traits<T>::to_float(*first) + of_keys.mean;
            columns[unit][column].copied = params.rounded ? Traits<T>::to_float(Traits<T>::from_float(mean)) : mean;
        }
    }
    __syncthreads();
    if (active) {
        const u32 own = energies[unit][column];
        int place = 0;
#pragma unroll 8
        for (int other = 0; other < HEAD_DIM; ++other) {
            const u32 energy = energies[unit][other];
            place += energy > own || (energy == own && other < column);
        }
        params.permutation[block * HEAD_DIM + place] = static_cast<u8>(column);
        params.means[block * HEAD_DIM + place] = mean;
        columns[unit][column].kept = place < params.keep;
    }
    if (!params.shift) return;
    for (int start = 0; start < params.block_q; start += Rows::kRows) {
        const int count = min(Rows::kRows, rows - start);
        if (active) {
#pragma unroll 16
            for (int row = 0; row < count; ++row) staged[unit].at(row, column) = own[(start + row) * params.q_row];
        }
        __syncthreads();  // the rows are there, and at first what their columns are
        for (int row = column; inside && row < count; row += kSpan) {
            Lacking lacking;
            for (int i = 0; i < HEAD_DIM; ++i) {
                const Column& other = columns[unit][i];
                const float element = Traits<T>::to_float(staged[unit].at(row, i));
                lacking.add(element, other.kept ? element : other.copied, other.energy, other.key_mean);
            }
            params.shift[batch_head * params.seqlen_q + first_row + start + row] =
                lacking.shift(params.scale, params.seqlen_k);
        }
        __syncthreads();  // every thread is done with the rows
    }
}
