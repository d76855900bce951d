// Weights of the columns of each group of grouped attention: the best approximation of rank one of what they add to the
// scores. The NumPy twin is reference.balance, and both give the same bits: float32, one order of sums, product and sum
// rounded apart. And what they leave out of the weight of reduced keys, Lacking.
//
// The products of a group's columns, each times how much its column of K varies, are a symmetric matrix (GROUP x GROUP);
// squared again and again, its columns become the eigenvector of its largest eigenvalue. It stays in the registers of
// LANES threads of a warp, each with some of its rows. A unit is a block of queries, which whole warps work on; the
// units of a thread block are of one head.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM, GROUP (columns per group), LANES (divides GROUP).
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

constexpr int kGroups = HEAD_DIM / GROUP;
constexpr int kRows = GROUP / LANES;  // of the matrix of a group, and columns of Q, that a thread has
constexpr int kWarpGroups = kWarpSize / LANES;
constexpr int kUnitWarps = (kGroups + kWarpGroups - 1) / kWarpGroups;
constexpr int kUnits = kUnitWarps < 4 ? 4 / kUnitWarps : 1;
constexpr int kUnitThreads = kUnitWarps * kWarpSize;
constexpr int kThreads = kUnits * kUnitThreads;
// On a multiprocessor: of 64 registers a thread, or 128.
constexpr int kBlocks = (GROUP <= 4 ? 1024 : 512) / kThreads;
constexpr int kSquarings = 10;
constexpr float kLeastSpread = 1.f / 64.f;       // of a column, as a part of the largest in its group
constexpr float kLeastWeight = 1.f / 16384.f;    // smaller ones are 0; the others every dtype has exactly

// Rows of Q are staged in words, while those before are multiplied: so many that a multiprocessor of 100 KB has room for
// four thread blocks.
constexpr int kWordElements = 4 / int(sizeof(T));
constexpr int kWords = HEAD_DIM / kWordElements;  // of a row
constexpr int kRoom = 20 * 1024 / (2 * kUnits * 4 * (kWords + 1));
constexpr int kStageRows = kRoom >= 32 ? 32 : kRoom >= 16 ? 16 : kRoom >= 8 ? 8 : 4;
typedef OddTile<T, 2 * kStageRows, HEAD_DIM> Stages;

struct Storage {
    alignas(4) Stages stages[kUnits];           // two, of Q as it comes
    float energies[HEAD_DIM], means[HEAD_DIM];  // of K's columns as they come
    // In the new order, for what the lse lacks.
    float weights[kUnits][HEAD_DIM], shares[kUnits][HEAD_DIM];
    u8 columns[kUnits][HEAD_DIM];
};

// A thread's part of a group. Threads that are left over do what others do, and write nothing.
struct Own {
    bool writes;
    int first_lane;  // of the group
    int group;       // in the unit
    int first_row;   // of the thread's in the matrix
    int columns[kRows];
    float spread[kRows];
    float value[kRows][GROUP];

    DEVICE Own(int unit_thread) {
        constexpr int kUsed = kWarpGroups * LANES;
        const int lane = unit_thread % kWarpSize;
        const int used = lane < kUsed ? lane : lane % LANES;
        const int found = unit_thread / kWarpSize * kWarpGroups + used / LANES;
        writes = lane < kUsed && found < kGroups;
        group = min(found, kGroups - 1);
        first_lane = used / LANES * LANES;
        first_row = used % LANES * kRows;
    }
    // What the thread that has this row of the matrix has for it.
    DEVICE float of_row(const float (&own)[kRows], int row) const {
        return LANES == 1 ? own[row % kRows] : __shfl_sync(kFullWarp, own[row % kRows], first_lane + row / kRows);
    }
    DEVICE float entry(int a, int b) const {
        const float own = value[a % kRows][b];
        return LANES == 1 ? own : __shfl_sync(kFullWarp, own, first_lane + a / kRows);
    }
    // function(row, b) for the entries that the thread makes: of a whole matrix half, the others have the same bits.
    template <class Function>
    DEVICE void each(Function function) {
#pragma unroll
        for (int b = 0; b < GROUP; ++b) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                if (LANES > 1 || row <= b) function(row, b);
            }
        }
    }
    DEVICE void mirror() {
        if constexpr (LANES == 1) each([&](int row, int b) { value[b][row] = value[row][b]; });
    }

    // How much each column of K varies, as a part of the largest in its group.
    DEVICE void find_spread(const float (&energies)[kRows]) {
        float largest = 0.f;
#pragma unroll
        for (int member = 0; member < GROUP; ++member) {
            const float energy = of_row(energies, member);
            if (energy > largest) largest = energy;
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float relative = __fdiv_rn(energies[row], largest);
            const float usual = relative >= kLeastSpread ? relative : kLeastSpread;  // of what is not a number too
            spread[row] = largest > 0.f && largest < infinity() ? usual : 1.f;
        }
    }
    // Products of a row of Q.
    DEVICE void add(const T* q) {
        float x[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) x[row] = __fmul_rn(Traits<T>::to_float(q[columns[row]]), spread[row]);
        float other[GROUP];
#pragma unroll
        for (int b = 0; b < GROUP; ++b) other[b] = of_row(x, b);
        each([&](int row, int b) { value[row][b] = __fadd_rn(value[row][b], __fmul_rn(x[row], other[b])); });
    }
    DEVICE void square() {
        float trace = 0.f;
#pragma unroll
        for (int member = 0; member < GROUP; ++member) trace = __fadd_rn(trace, entry(member, member));
        each([&](int row, int b) { value[row][b] = __fdiv_rn(value[row][b], trace); });
        mirror();
        float next[kRows][GROUP] = {};
#pragma unroll
        for (int member = 0; member < GROUP; ++member) {
            float other[GROUP];
#pragma unroll
            for (int b = 0; b < GROUP; ++b) other[b] = entry(member, b);
            each([&](int row, int b) { next[row][b] = __fadd_rn(next[row][b], __fmul_rn(value[row][member], other[b])); });
        }
        each([&](int row, int b) { value[row][b] = next[row][b]; });
        mirror();
    }
};

// Nearest with eight significant bits, ties to even.
DEVICE float round_to_eight_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// Weights and shares of a group, from the eigenvector that its products have become.
DEVICE void find_weights(Storage& shared, const Own& own, int unit, const WeightsParams& params, i64 block) {
    int lead = 0;
    float largest = own.entry(0, 0);
    float lead_spread = own.of_row(own.spread, 0);
#pragma unroll
    for (int member = 1; member < GROUP; ++member) {
        const float square = own.entry(member, member);
        const float spread = own.of_row(own.spread, member);
        if (square > largest) {
            largest = square;
            lead = member;
            lead_spread = spread;
        }
    }
    const int first = own.group * GROUP;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const int member = own.first_row + row;
        float product = own.value[row][0];  // with the largest column
#pragma unroll
        for (int b = 1; b < GROUP; ++b) {
            if (b == lead) product = own.value[row][b];
        }
        // The largest column and the first change places.
        const int place = first + (member == lead ? 0 : member == 0 ? lead : member);
        const float ratio = __fdiv_rn(own.spread[row], lead_spread);
        float weight = round_to_eight_bits(__fdiv_rn(__fdiv_rn(product, largest), ratio));
        // Of zeros and of what is not a number there is no ratio.
        if (!(fabsf(weight) >= kLeastWeight && fabsf(weight) <= 2.f / kLeastSpread)) weight = 0.f;
        if (member == lead) weight = 1.f;
        const float share = __fmul_rn(ratio, __fmul_rn(ratio, weight));
        if (own.writes) {
            shared.columns[unit][place] = params.permutation[block + place] = static_cast<u8>(own.columns[row]);
            shared.weights[unit][place] = params.weights[block + place] = weight;
            shared.shares[unit][place] = params.shares[block + place] = share;
        }
    }
}

// From here on shares are parts of what they sum up to: a group's shares of its columns are its column of Qhat. The same
// bits as in smxx_copied_queries.cu.
DEVICE void divide_shares(Storage& shared, const Own& own, int unit) {
    __syncwarp();  // all of the group are there
    if (!own.writes || own.first_row) return;
    float(&shares)[HEAD_DIM] = shared.shares[unit];
    const int first = own.group * GROUP;
    float square = 0.f;
    for (int i = first; i < first + GROUP; ++i) square = fmaf(shares[i], shared.weights[unit][i], square);
    for (int i = first; i < first + GROUP; ++i) shares[i] /= square;
}

// Rows of Q that are on their way to a unit's stages.
struct Source {
    const T* q;
    i64 q_row;
    int rows;
    int thread;  // of the unit
    bool words;  // whether every row starts on one

    // kCount rows from `start`, or as many as there are, to row `to` of the stages.
    template <int kCount>
    DEVICE void load(Stages& stages, int to, int start) const {
        const int warp = thread / kWarpSize;
        const int lane = thread % kWarpSize;
        const int count = min(kCount, rows - start) - warp;
        const T* row = q + (start + warp) * q_row;
        if (words) {
            const u32 address = shared_address(&stages.at(to + warp, lane * kWordElements));
            row += lane * kWordElements;
#pragma unroll
            for (int n = 0; n < kCount; n += kUnitWarps) {
#pragma unroll
                for (int word = 0; word < kWords; word += kWarpSize) {
                    if (n < count && (kWords % kWarpSize == 0 || word + lane < kWords)) {
                        cp_async_word(address + 4 * (n * (kWords + 1) + word), row + word * kWordElements);
                    }
                }
                row += kUnitWarps * q_row;
            }
        } else {
            for (int n = 0; n < count; n += kUnitWarps) {
#pragma unroll
                for (int column = 0; column < HEAD_DIM; column += kWarpSize) {
                    if (HEAD_DIM % kWarpSize == 0 || column + lane < HEAD_DIM) {
                        stages.at(to + warp + n, column + lane) = row[column + lane];
                    }
                }
                row += kUnitWarps * q_row;
            }
        }
        cp_async_commit();
    }
};

// What the lse of a staged row lacks.
DEVICE float find_shift(const Storage& shared, const WeightsParams& params, int unit, int row) {
    const Stages& stages = shared.stages[unit];
    Lacking lacking;
    for (int first = 0; first < HEAD_DIM; first += GROUP) {
        float qhat = 0.f;
        for (int i = first; i < first + GROUP; ++i) {
            qhat = fmaf(shared.shares[unit][i], Traits<T>::to_float(stages.at(row, shared.columns[unit][i])), qhat);
        }
        for (int i = first; i < first + GROUP; ++i) {
            const int column = shared.columns[unit][i];
            const float element = Traits<T>::to_float(stages.at(row, column));
            float copied = shared.weights[unit][i] * qhat;
            if (params.rounded) copied = Traits<T>::to_float(Traits<T>::from_float(copied));
            lacking.add(element, copied, shared.energies[column], shared.means[column]);
        }
    }
    return lacking.shift(params.scale, params.seqlen_k);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) smxx_lsh_weights(const WeightsParams params) {
    __shared__ Storage shared;
    const int unit = threadIdx.x / kUnitThreads;
    const int unit_blocks = (params.group_blocks + kUnits - 1) / kUnits;  // thread blocks of a head
    const i64 batch_head = blockIdx.x / unit_blocks;
    const i64 batch = batch_head / params.heads;
    const i64 head = batch_head % params.heads;
    const i64 head_kv = head / params.heads_per_kv;
    const int first_block = static_cast<int>(blockIdx.x % unit_blocks) * kUnits;
    const bool inside = first_block + unit < params.group_blocks;
    // Where there is no block left, the last one without its rows.
    const int group_block = min(first_block + unit, params.group_blocks - 1);
    const int first_row = group_block * params.block_q;
    const int longest = min(params.block_q, params.seqlen_q - first_block * params.block_q);  // of all units
    const i64 block = (batch_head * params.group_blocks + group_block) * HEAD_DIM;

    Source source;
    source.q = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row;
    source.q_row = params.q_row;
    source.rows = inside ? min(params.block_q, params.seqlen_q - first_row) : 0;
    source.thread = threadIdx.x % kUnitThreads;
    source.words = (reinterpret_cast<u64>(source.q) | static_cast<u64>(params.q_row) * sizeof(T)) % 4 == 0;
    source.load<kStageRows>(shared.stages[unit], 0, 0);

    const T* k = params.k + batch * params.k_batch + head_kv * params.k_head;
    const float* sums =
        params.sums + (batch * (params.heads / params.heads_per_kv) + head_kv) * params.spans * (2 * HEAD_DIM);
    for (int column = threadIdx.x; column < HEAD_DIM; column += kThreads) {
        KeyColumn found[1];
        key_columns<HEAD_DIM>(found, sums + column, params.spans, params.seqlen_k);
        shared.energies[column] = found[0].energy;
        shared.means[column] = params.seqlen_k > 0 ? Traits<T>::to_float(k[column]) + found[0].mean : 0.f;
    }
    Own own(source.thread);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        own.columns[row] = params.permutation[block + own.group * GROUP + own.first_row + row];
    }
    __syncthreads();  // all energies are there
    float energies[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) energies[row] = shared.energies[own.columns[row]];
    own.find_spread(energies);

    own.each([&](int row, int b) { own.value[row][b] = 0.f; });
    int stage = 0;
    for (int start = 0; start < longest; start += kStageRows) {
        cp_async_wait<0>();
        __syncthreads();  // rows are there, and every thread is done with those before
        const T* staged = &shared.stages[unit].at(stage, 0);
        stage = kStageRows - stage;
        source.load<kStageRows>(shared.stages[unit], stage, start + kStageRows);
        const int rows = min(kStageRows, source.rows - start);
#pragma unroll(GROUP <= 4 ? 8 : 2)
        for (int row = 0; row < rows; ++row) own.add(staged + row * Stages::kPitch);
    }
    own.mirror();
#pragma unroll 1
    for (int squaring = 0; squaring < kSquarings; ++squaring) own.square();
    if (!inside) own.writes = false;
    find_weights(shared, own, unit, params, block);

    if (!params.shift) return;
    divide_shares(shared, own, unit);
    for (int start = 0; start < longest; start += Stages::kRows) {
        __syncthreads();  // every thread is done with the rows before
        source.load<Stages::kRows>(shared.stages[unit], 0, start);
        cp_async_wait<0>();
        __syncthreads();  // rows are there, and all weights and shares
        for (int row = source.thread; row < min(Stages::kRows, source.rows - start); row += kUnitThreads) {
            params.shift[batch_head * params.seqlen_q + first_row + start + row] = find_shift(shared, params, unit, row);
        }
    }
}
