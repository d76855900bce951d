// Columns of every block of queries by energy, the largest first, and the mean of Q's columns in the block. The NumPy
// twins are reference.energy_order and the end of reference.key_energies, and both give the same bits: float32, one
// order of sums, product and sum rounded apart.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM (at most 256).
#include "tile/dtype.cuh"
#include "tile/spread.cuh"

typedef ElementOf<DTYPE>::type T;

// Strides are in elements.
struct EnergyOrderParams {
    const T* q;
    const float* sums;  // of smxx_key_energy.cu
    u8* permutation;    // (batch, heads, group_blocks, HEAD_DIM), contiguous
    float* means;       // the same shape: of the columns in this order
    i64 q_batch, q_head, q_row;
    i64 units;  // batch * heads * group_blocks
    i32 heads, heads_per_kv, seqlen_q, seqlen_k, block_q, group_blocks, spans;
};

namespace {

constexpr int kThreads = 256;
constexpr int kSpan = (HEAD_DIM + kWarpSize - 1) / kWarpSize * kWarpSize;  // threads of one block of queries
constexpr int kUnits = kThreads / kSpan;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) smxx_energy_order(const EnergyOrderParams params) {
    __shared__ u32 energies[kUnits][HEAD_DIM];
    const int unit = threadIdx.x / kSpan;
    const int column = threadIdx.x % kSpan;
    const i64 block = static_cast<i64>(blockIdx.x) * kUnits + unit;
    const bool active = unit < kUnits && block < params.units && column < HEAD_DIM;
    float mean = 0.f;
    if (active) {
        const i64 batch_head = block / params.group_blocks;
        const i64 batch = batch_head / params.heads;
        const i64 head = batch_head % params.heads;
        const int first_row = static_cast<int>(block % params.group_blocks) * params.block_q;
        const int rows = min(params.block_q, params.seqlen_q - first_row);
        const T* q = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row + column;
        const i64 head_kv = batch * (params.heads / params.heads_per_kv) + head / params.heads_per_kv;
        const float* sums = params.sums + head_kv * params.spans * (2 * HEAD_DIM) + column;
#pragma unroll 8
        for (int row = 0; row < rows; ++row) mean = __fadd_rn(mean, Traits<T>::to_float(q[row * params.q_row]));
        mean = __fdiv_rn(mean, static_cast<float>(rows));
        float square = 0.f;
#pragma unroll 8
        for (int row = 0; row < rows; ++row) {
            const float deviation = __fadd_rn(Traits<T>::to_float(q[row * params.q_row]), -mean);
            square = __fadd_rn(square, __fmul_rn(deviation, deviation));
        }
        const float energy = __fmul_rn(__fsqrt_rn(square), key_column<HEAD_DIM>(sums, params.spans, params.seqlen_k).energy);
        // The bits of numbers that are not negative are in the order of the numbers; NaN comes before all.
        energies[unit][column] = energy == energy ? __float_as_uint(energy) : 0x7fffffffu;
    }
    __syncthreads();
    if (!active) return;
    const u32 own = energies[unit][column];
    int place = 0;
#pragma unroll 8
    for (int other = 0; other < HEAD_DIM; ++other) {
        const u32 energy = energies[unit][other];
        place += energy > own || (energy == own && other < column);
    }
    params.permutation[block * HEAD_DIM + place] = static_cast<u8>(column);
    params.means[block * HEAD_DIM + place] = mean;
}
