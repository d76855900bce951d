// Columns of every block of queries by energy, the largest first, and the mean of Q's columns in the block. The NumPy
// twins are reference.energy_order and the end of reference.key_energies, and both give the same bits: float32, one
// order of sums, product and sum rounded apart. And what the columns that are not kept leave out of the weight of reduced
// keys, Lacking.
//
// A thread block has one block of queries, and a thread two columns of it. Rows lie in shared memory, where they are read
// for the means, for the deviations, and for what they lack: of bfloat16 by matrix products, otherwise a row by one thread.
//
// Constants: DTYPE (0 float16, 1 bfloat16, 2 float32), HEAD_DIM (at most 256), ALIGNED (1: every row of q starts on 16
// bytes).
#include "tile/dtype.cuh"
#include "tile/shared.cuh"
#include "tile/spread.cuh"
#include "tile/warp.cuh"

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
    i32 heads, heads_per_kv, seqlen_q, seqlen_k, block_q, group_blocks, spans;
    i32 keep;  // columns that are multiplied
    i32 rounded;  // whether means are T where they are multiplied
    float scale;
};

namespace {

constexpr int kThreads = (HEAD_DIM / 2 + kWarpSize - 1) / kWarpSize * kWarpSize;
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kChunks = HEAD_DIM / kElements;  // of a row
constexpr int kGroup = 8;                      // columns that are compared at once
static_assert(HEAD_DIM % kGroup == 0, "rows are whole chunks, and groups of columns");

// Whether sums for what the lse lacks are matrix products: of a row of Q and its squares with factors of columns.
#define PRODUCTS (DTYPE == 1 && HEAD_DIM % 16 == 0)

// What four columns add to what the lse lacks: what stands for those of Q, and of K mean and energy. Of columns that are
// kept nothing but the energy, twice; of others what stands for them, times their energy.
struct alignas(16) Columns {
    float copied[4], key_mean[4], energy[4], kept_energy[4], copied_energy[4];
};
// kCount neighbours, read at once. Of two 16-bit numbers in a word each is one instruction away.
template <class Element, int kCount>
struct alignas(kCount * sizeof(Element)) Neighbours {
    u32 word[kCount * sizeof(Element) / 4];

    DEVICE float operator[](int i) const {
        if constexpr (sizeof(Element) == 2) {
            return i % 2 ? Traits<Element>::high(word[i / 2]) : Traits<Element>::low(word[i / 2]);
        } else {
            return __uint_as_float(word[i]);
        }
    }
    static DEVICE Neighbours read(const Element* source) { return *reinterpret_cast<const Neighbours*>(source); }
};
typedef Neighbours<T, 2> Pair;
typedef Neighbours<T, kElements> OfChunk;
struct alignas(16) Keys {
    i32 key[kGroup];
};
// A pitch of an odd number of chunks, so that rows of eight threads lie in different banks.
constexpr int kPad = kChunks % 2 ? 0 : kElements;
constexpr int kRoom = 48 * 1024 - HEAD_DIM / 4 * int(sizeof(Columns)) - HEAD_DIM * 4;  // what is left for rows
constexpr int kFitting = kRoom / ((HEAD_DIM + kPad) * int(sizeof(T))) / kWarpSize * kWarpSize;
constexpr int kRows = kFitting < 128 ? kFitting : 128;
typedef SharedTile<T, kRows, HEAD_DIM, kPad> Rows;
// Rows that a thread has at once in the end, for which columns are read once.
constexpr int kAtOnce = kRows < 2 * kThreads ? 1 : kRows < 4 * kThreads ? 2 : 4;

#if PRODUCTS
// Numbers of pairs of columns as sums of three bfloat16, the first bits first: means of K where columns are not kept, and
// by turns the squares of the energies of all columns, and of those that are kept. And the sums of what stands for the
// others, which are the same for all rows, by warp.
constexpr int kParts = 3;
struct Factors {
    u32 pair[3 * kParts][HEAD_DIM / 2 + 4];
    float mean[kThreads / kWarpSize], variance[kThreads / kWarpSize];
};
#else
struct Factors {
    Columns columns[HEAD_DIM / 4];
};
#endif

struct Storage {
    Rows rows;
    Keys keys[HEAD_DIM / kGroup];  // energies, as bits
    Factors factors;
};

// The rows of a block of queries, as many at a time in shared memory as there is room for.
struct AllRows {
    Rows& tile;
    const T* q;
    i64 stride;
    int rows;
    int there = 0;  // the first that is in shared memory

    // Begins to copy the rows from `first` on. A thread keeps its chunk, so that there is little to compute.
    DEVICE void copy(int first) const {
        constexpr int kAcross = kThreads / kChunks;
        const int chunk = threadIdx.x % kChunks * kElements;
        const int across = threadIdx.x / kChunks;
        const int count = kThreads % kChunks && across >= kAcross ? 0 : min(kRows, rows - first);
        const T* source = q + (first + across) * stride + chunk;
        T* to = &tile.at(across, chunk);
#pragma unroll 8
        for (int row = across; row < count; row += kAcross) {
            copy_chunk<ALIGNED>(to, shared_address(to), 0, source, true);
            source += kAcross * stride;
            to += kAcross * Rows::kPitch;
        }
        cp_async_commit();
    }
    // use(first, count) for all rows, the first of which are there.
    template <class Use>
    DEVICE void each(Use use) {
        for (int first = 0; first < rows; first += kRows) {
            if (first != there) {
                __syncthreads();  // every thread is done with the rows before
                copy(first);
                cp_async_wait<0>();
                __syncthreads();  // the next rows are there
                there = first;
            }
            use(first, min(kRows, rows - first));
        }
    }
};

// The places of a thread's two columns, from that of the first on: how many have more energy, or as much and come before.
// A difference is negative if the other is larger: two instructions, and a comparison took three.
DEVICE void find_places(u32 (&places)[2], const Storage& shared, const i32 (&own)[2], int column) {
#pragma unroll 4
    for (int group = 0; group < HEAD_DIM / kGroup; ++group) {
        const Keys others = shared.keys[group];
        const i32 before = group < column / kGroup;
        const i32 bounds[2] = {own[0] - before, own[1] - before};
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) places[i] += static_cast<u32>(bounds[i] - others.key[j]) >> 31;
        }
    }
    const Keys others = shared.keys[column / kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) places[i] += others.key[j] == own[i] && j < column % kGroup + i;
    }
}

#if PRODUCTS
// Two numbers to kParts rows of factors.
DEVICE void write_parts(Factors& factors, int first, int step, int pair, float (&numbers)[2]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const u32 word = Traits<T>::pack(numbers[0], numbers[1]);
        factors.pair[first + part * step][pair] = word;
        numbers[0] -= Traits<T>::low(word);
        numbers[1] -= Traits<T>::high(word);
    }
}

// What a thread has found out of its two columns; threads without columns add nothing.
DEVICE void write_columns(Storage& shared, int column, bool active, const bool (&kept)[2], const float (&copied)[2],
                          const float (&energy)[2], const float (&key_mean)[2]) {
    float mean = 0.f;
    float variance = 0.f;
    if (active) {
        float means[2], all[2], of_kept[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            means[i] = kept[i] ? 0.f : key_mean[i];
            all[i] = energy[i] * energy[i];
            of_kept[i] = kept[i] ? all[i] : 0.f;
            const float product = kept[i] ? 0.f : copied[i] * energy[i];
            mean = fmaf(copied[i], means[i], mean);
            variance = fmaf(product, product, variance);
        }
        write_parts(shared.factors, 0, 1, column / 2, means);
        write_parts(shared.factors, kParts, 2, column / 2, all);
        write_parts(shared.factors, kParts + 1, 2, column / 2, of_kept);
    }
    mean = warp_sum(mean);
    variance = warp_sum(variance);
    if (threadIdx.x % kWarpSize == 0) {
        shared.factors.mean[threadIdx.x / kWarpSize] = mean;
        shared.factors.variance[threadIdx.x / kWarpSize] = variance;
    }
}

// What the lse of `count` rows lacks. A warp has two tiles of 16 rows at once, whose sums its lanes have in the end.
// The square of a bfloat16 is exactly the sum of two.
DEVICE void find_shift(float* shift, const Storage& shared, const EnergyOrderParams& params, int count) {
    constexpr u32 kMinus = 0x80008000u;
    const Factors& factors = shared.factors;
    const int lane = threadIdx.x % kWarpSize;
    const int column = lane / 4;  // of the factors
    float copied_mean = 0.f;
    float copied_variance = 0.f;
#pragma unroll
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
        copied_mean += factors.mean[warp];
        copied_variance += factors.variance[warp];
    }
    for (int first = threadIdx.x / kWarpSize * 32; first < count; first += kThreads) {
        u32 rows[2];
        float means[2][4] = {};
        float squares[2][2][4] = {};  // of the two parts of squares
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const int row = min(first + tile * 16 + lane % 16, count - 1);
            rows[tile] = shared_address(&shared.rows.at(row, lane / 16 * 8));
        }
#pragma unroll 4
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            u32 of_mean[2] = {}, of_square[2] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int pair = step * 8 + i * 4 + lane % 4;
                if (column < kParts) of_mean[i] = factors.pair[column][pair];
                if (column < 2 * kParts) of_square[i] = factors.pair[kParts + column][pair];
            }
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                u32 q[4], high[4], low[4];
                ldmatrix_x4(q, rows[tile] + step * 32);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    high[i] = Traits<T>::fma(q[i], q[i], kMinus);  // of zeros: the product
                    low[i] = Traits<T>::fma(q[i], q[i], high[i] ^ kMinus);
                }
                Traits<T>::mma(means[tile], q, of_mean[0], of_mean[1]);
                Traits<T>::mma(squares[tile][0], high, of_square[0], of_square[1]);
                Traits<T>::mma(squares[tile][1], low, of_square[0], of_square[1]);
            }
        }
        // A lane has the parts of two columns, of rows eight apart, and takes one of the four rows of its quarter.
        Lacking lacking;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sums[3] = {means[tile][2 * half] + means[tile][2 * half + 1],
                                 squares[tile][0][2 * half] + squares[tile][1][2 * half],
                                 squares[tile][0][2 * half + 1] + squares[tile][1][2 * half + 1]};
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 1);
                    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 2);
                }
                if (lane % 4 == 2 * tile + half) {
                    lacking.mean = sums[0] - copied_mean;
                    lacking.variance = sums[1];
                    lacking.copied_variance = sums[2] + copied_variance;
                }
            }
        }
        const int row = first + lane % 4 * 8 + lane / 4;
        if (row < count) shift[row] = lacking.shift(params.scale, params.seqlen_k);
    }
}
#else
// What a thread has found out of its two columns.
DEVICE void write_columns(Storage& shared, int column, bool active, const bool (&kept)[2], const float (&copied)[2],
                          const float (&energy)[2], const float (&key_mean)[2]) {
    if (!active) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        Columns& columns = shared.factors.columns[column / 4];
        const int j = column % 4 + i;
        columns.copied[j] = kept[i] ? 0.f : copied[i];
        columns.key_mean[j] = kept[i] ? 0.f : key_mean[i];
        columns.energy[j] = energy[i];
        columns.kept_energy[j] = kept[i] ? energy[i] : 0.f;
        columns.copied_energy[j] = kept[i] ? 0.f : copied[i] * energy[i];
    }
}

// What the lse of `count` rows lacks.
DEVICE void find_shift(float* shift, const Storage& shared, const EnergyOrderParams& params, int count) {
    for (int first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
        const T* rows[kAtOnce];
        Lacking lacking[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) rows[i] = &shared.rows.at(min(first + i * kThreads, count - 1), 0);
#pragma unroll 2
        for (int start = 0; start < HEAD_DIM; start += kElements) {
            OfChunk own[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) own[i] = OfChunk::read(rows[i] + start);
#pragma unroll
            for (int part = 0; part < kElements; part += 4) {
                const Columns columns = shared.factors.columns[(start + part) / 4];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float q = own[i][part + j];
                        const float copied = fmaf(q, columns.kept_energy[j], columns.copied_energy[j]);
                        lacking[i].add_products(q - columns.copied[j], columns.key_mean[j], q * columns.energy[j], copied);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int row = first + i * kThreads;
            if (row < count) shift[row] = lacking[i].shift(params.scale, params.seqlen_k);
        }
    }
}
#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) smxx_energy_order(const EnergyOrderParams params) {
    __shared__ Storage shared;
    // Of 32 bits: a division of 64 takes as long as many rows.
    const u32 batch_head = blockIdx.x / static_cast<u32>(params.group_blocks);
    const u32 batch = batch_head / static_cast<u32>(params.heads);
    const u32 head = batch_head - batch * params.heads;
    const int first_row = static_cast<int>(blockIdx.x - batch_head * params.group_blocks) * params.block_q;
    const int rows = min(params.block_q, params.seqlen_q - first_row);
    const T* q = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row;
    AllRows all = {shared.rows, q, params.q_row, rows};
    all.copy(0);

    const int column = threadIdx.x * 2;
    const bool active = column < HEAD_DIM;
    KeyColumn of_keys[2] = {};
    float first_key[2] = {};
    if (active) {  // while rows arrive
        const u32 head_kv = head / static_cast<u32>(params.heads_per_kv);
        const i64 batch_head_kv = batch_head / static_cast<u32>(params.heads_per_kv);
        const float* sums = params.sums + batch_head_kv * params.spans * (2 * HEAD_DIM) + column;
        key_columns<HEAD_DIM>(of_keys, sums, params.spans, params.seqlen_k);
        const T* k = params.k + batch * params.k_batch + head_kv * params.k_head + column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (params.shift) first_key[i] = Traits<T>::to_float(k[i]);
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // the first rows are there

    // Threads without columns sum what they do not use.
    const T* own = &shared.rows.at(0, active ? column : 0);
    float means[2] = {};
    all.each([&](int, int count) {
#pragma unroll 32
        for (int row = 0; row < count; ++row) {
            const Pair pair = Pair::read(own + row * Rows::kPitch);
#pragma unroll
            for (int i = 0; i < 2; ++i) means[i] = __fadd_rn(means[i], pair[i]);
        }
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) means[i] = __fdiv_rn(means[i], static_cast<float>(rows));
    float squares[2] = {};
    all.each([&](int, int count) {
#pragma unroll 32
        for (int row = 0; row < count; ++row) {
            const Pair pair = Pair::read(own + row * Rows::kPitch);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float deviation = __fadd_rn(pair[i], -means[i]);
                squares[i] = __fadd_rn(squares[i], __fmul_rn(deviation, deviation));
            }
        }
    });

    i32 keys[2];
    if (active) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float energy = __fmul_rn(__fsqrt_rn(squares[i]), of_keys[i].energy);
            // The bits of numbers that are not negative are in the order of the numbers; NaN comes before all.
            keys[i] = energy == energy ? __float_as_int(energy) : 0x7fffffff;
            shared.keys[column / kGroup].key[column % kGroup + i] = keys[i];
        }
    }
    __syncthreads();  // all energies are there
    bool kept[2] = {};
    if (active) {
        const i64 to = static_cast<i64>(blockIdx.x) * HEAD_DIM;
        u32 places[2] = {};
        find_places(places, shared, keys, column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            params.permutation[to + places[i]] = static_cast<u8>(column + i);
            params.means[to + places[i]] = means[i];
            kept[i] = static_cast<i32>(places[i]) < params.keep;
        }
    }
    if (!params.shift) return;
    float copied[2], energy[2], key_mean[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        copied[i] = params.rounded ? Traits<T>::to_float(Traits<T>::from_float(means[i])) : means[i];
        energy[i] = of_keys[i].energy;
        key_mean[i] = first_key[i] + of_keys[i].mean;
    }
    write_columns(shared, column, active, kept, copied, energy, key_mean);
    __syncthreads();  // what columns are is there
    float* shift = params.shift + static_cast<i64>(batch_head) * params.seqlen_q + first_row;
    all.each([&](int first, int count) { find_shift(shift + first, shared, params, count); });
}
