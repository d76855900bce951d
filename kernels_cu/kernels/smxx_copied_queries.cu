// What stands for the queries of a reduced problem in a product with K as it is: sum_t qhat_t khat_t of groups is
// sum_c (qhat_t(c) w_c) k_c, and columns that are not kept have their mean in the block. The twin is what
// reference._scores_of takes for q; what it leaves out of the lse, smxx_energy_order.cu and smxx_lsh_weights.cu say.
//
// A thread block has kRows rows of one block of queries, whose columns have one order. A thread has the same chunk of
// kOwn rows, and keeps in registers what it has to know of its columns.
//
// Constants: DTYPE (0 float16, 1 bfloat16), HEAD_DIM, GROUP (columns per group; with KEEP 1), KEEP (0; or so many columns
// that are kept, the first of the order).
#include "tile/dtype.cuh"
#include "tile/shared.cuh"

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
constexpr int kElements = kChunkBytes / int(sizeof(T));
constexpr int kChunks = HEAD_DIM / kElements;  // of a row
constexpr int kAcross = kThreads / kChunks;    // threads that have the same chunk, of different rows
constexpr int kOwn = 4;
constexpr int kRows = kOwn * kAcross;
static_assert(sizeof(T) == 2, "two elements a word");
static_assert(HEAD_DIM <= kThreads, "a thread finds out what one column is");
static_assert(HEAD_DIM % kElements == 0 && HEAD_DIM % GROUP == 0, "rows are whole chunks, and whole groups");
static_assert(KEEP < HEAD_DIM && (KEEP == 0 || GROUP == 1), "kept columns are groups of one");

// Rows `row` and so on of `count`; zeros where there are none.
DEVICE void read_rows(Chunk (&own)[kOwn], const T* q, i64 stride, int row, int count) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        own[i] = Chunk{{0, 0, 0, 0}};
        if (row + i < count) own[i] = *reinterpret_cast<const Chunk*>(q + (row + i) * stride);
    }
}

DEVICE void write_rows(T* copied, const Chunk (&own)[kOwn], int row, int count) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        if (row + i < count) *reinterpret_cast<Chunk*>(copied + (row + i) * HEAD_DIM) = own[i];
    }
}

#if KEEP
// Of each column: all bits if it is kept, and what it has instead, which is zero then.
struct Storage {
    alignas(16) u16 kept[HEAD_DIM];
    alignas(16) T instead[HEAD_DIM];
};

DEVICE void replace(Chunk (&own)[kOwn], Storage& shared, const u8* permutation, const float* means, int chunk) {
    const int place = threadIdx.x;
    if (place < HEAD_DIM) {
        const int column = permutation[place];
        const float mean = means[place];
        shared.kept[column] = place < KEEP ? 0xffff : 0;
        shared.instead[column] = Traits<T>::from_float(place < KEEP ? 0.f : mean);
    }
    __syncthreads();  // what columns are is there
    const Chunk kept = *reinterpret_cast<const Chunk*>(&shared.kept[chunk * kElements]);
    const Chunk instead = *reinterpret_cast<const Chunk*>(&shared.instead[chunk * kElements]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int word = 0; word < 4; ++word) own[i].word[word] = (own[i].word[word] & kept.word[word]) | instead.word[word];
    }
}
#else
constexpr int kGroups = HEAD_DIM / GROUP;

// Of kOwn rows, one column.
struct alignas(kOwn * sizeof(T)) Elements {
    u32 pair[kOwn / 2];
};

struct Storage {
    // Of each column its group, and its weight.
    alignas(16) u8 group[HEAD_DIM];
    alignas(16) float weight[HEAD_DIM];
    alignas(16) Elements rows[kAcross][HEAD_DIM];  // as they came, in the order of place_of
    Chunk qhat[kAcross][kGroups];  // a float each
};

// Where a column lies in rows: first two columns of each chunk, so that threads write next to one another.
DEVICE int place_of(int column) {
    return column % kElements / 2 * (2 * kChunks) + column / kElements * 2 + column % 2;
}

DEVICE void find_qhat(Storage& shared, const u8* permutation, const float* weights, i64 shares) {
    // A thread has one group, and as many rows as there are for it.
    constexpr int kAtOnce = kThreads / kGroups;
    const int group = threadIdx.x % kGroups;
    int places[GROUP];
    float share[GROUP];
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        places[i] = place_of(permutation[group * GROUP + i]);
        share[i] = weights[shares + group * GROUP + i];
        square = fmaf(share[i], weights[group * GROUP + i], square);
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i) share[i] /= square;
    __syncthreads();  // the rows are there
    if (kThreads % kGroups && threadIdx.x >= kAtOnce * kGroups) return;
#pragma unroll 4
    for (int across = threadIdx.x / kGroups; across < kAcross; across += kAtOnce) {
        float qhat[kOwn] = {};
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const Elements own = shared.rows[across][places[i]];
#pragma unroll
            for (int j = 0; j < kOwn; j += 2) {
                qhat[j] = fmaf(share[i], Traits<T>::low(own.pair[j / 2]), qhat[j]);
                qhat[j + 1] = fmaf(share[i], Traits<T>::high(own.pair[j / 2]), qhat[j + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < kOwn; ++j) shared.qhat[across][group].word[j] = __float_as_uint(qhat[j]);
    }
}

// Columns of a word of rows i and i + 1, as a word of a column each.
DEVICE u32 low_halves(u32 first, u32 second) { return (first & 0xffff) | second << 16; }
DEVICE u32 high_halves(u32 first, u32 second) { return first >> 16 | (second & 0xffff0000u); }

DEVICE void replace(Chunk (&own)[kOwn], Storage& shared, const u8* permutation, const float* weights, i64 shares, int chunk,
                    int across) {
    const int place = threadIdx.x;
    if (place < HEAD_DIM) {
        const int column = permutation[place];
        shared.group[column] = static_cast<u8>(place / GROUP);
        shared.weight[column] = weights[place];
    }
    if (across < kAcross) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            Elements* to = &shared.rows[across][place_of(chunk * kElements + 2 * word)];
            Chunk columns;
#pragma unroll
            for (int i = 0; i < kOwn; i += 2) {
                columns.word[i / 2] = low_halves(own[i].word[word], own[i + 1].word[word]);
                columns.word[2 + i / 2] = high_halves(own[i].word[word], own[i + 1].word[word]);
            }
            *reinterpret_cast<Chunk*>(to) = columns;
        }
    }
    find_qhat(shared, permutation, weights, shares);
    __syncthreads();  // the queries of groups are there
    if (across >= kAcross) return;
    Chunk weights_of[2] = {*reinterpret_cast<const Chunk*>(&shared.weight[chunk * kElements]),
                           *reinterpret_cast<const Chunk*>(&shared.weight[chunk * kElements + 4])};
    Two<u32> groups = *reinterpret_cast<const Two<u32>*>(&shared.group[chunk * kElements]);
    // NVRTC would otherwise read some of them twice, and not the same ones in every run.
#pragma unroll
    for (int i = 0; i < kElements; ++i) weights_of[i / 4].word[i % 4] = anew(weights_of[i / 4].word[i % 4]);
#pragma unroll
    for (int i = 0; i < 2; ++i) groups.element[i] = anew(groups.element[i]);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        const u32 pair = groups.element[word / 2] >> word % 2 * 16;
        const Chunk low = shared.qhat[across][pair & 0xff];
        const Chunk high = shared.qhat[across][pair >> 8 & 0xff];
        const float of_low = __uint_as_float(weights_of[word / 2].word[word % 2 * 2]);
        const float of_high = __uint_as_float(weights_of[word / 2].word[word % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            own[i].word[word] =
                Traits<T>::pack(__uint_as_float(low.word[i]) * of_low, __uint_as_float(high.word[i]) * of_high);
        }
    }
}
#endif

}  // namespace

// The 1 stops ptxas from spilling for the sake of one more thread block per multiprocessor.
extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_copied_queries(const CopiedParams params) {
    __shared__ Storage shared;
    // Of 32 bits: a division of 64 takes longer than all the rest.
    const u32 unit = blockIdx.x / static_cast<u32>(params.parts);
    const u32 batch_head = unit / static_cast<u32>(params.group_blocks);
    const int part_row = static_cast<int>(blockIdx.x - unit * params.parts) * kRows;  // within the block of queries
    const int first_row = static_cast<int>(unit - batch_head * params.group_blocks) * params.block_q + part_row;
    const u32 batch = batch_head / static_cast<u32>(params.heads);
    const u32 head = batch_head - batch * params.heads;
    const int count = min(kRows, min(params.block_q - part_row, params.seqlen_q - first_row));
    const int chunk = threadIdx.x % kChunks;
    const int across = threadIdx.x / kChunks;
    const int row = kOwn * across;  // threads without one begin where there are none
    const T* q = params.q + batch * params.q_batch + head * params.q_head + first_row * params.q_row + chunk * kElements;
    T* copied = params.copied + (static_cast<i64>(batch_head) * params.seqlen_q + first_row) * HEAD_DIM + chunk * kElements;
    const u8* permutation = params.permutation + static_cast<i64>(unit) * HEAD_DIM;
    const float* numbers = params.numbers + static_cast<i64>(unit) * HEAD_DIM;
    Chunk own[kOwn];
    read_rows(own, q, params.q_row, row, count);  // they arrive while it is found out what columns are
#if KEEP
    replace(own, shared, permutation, numbers, chunk);
#else
    replace(own, shared, permutation, numbers, params.shares, chunk, across);
#endif
    write_rows(copied, own, row, count);
}
