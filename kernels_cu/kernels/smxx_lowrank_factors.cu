// The low-rank factors of a call from the sums of smxx_lowrank_sums.cu, as smxx_project.cu takes them: Qhat = Q A and
// Khat = (K - mean) B of RANK columns. The third of three kernels. A thread block has a unit.
//
// With S the sums of queries and T those of keys, the columns of B are to span the vectors of S T with the largest
// eigenvalues, so that A = T B with B^T T B = 1 leaves the least of the scores out. They are found by subspace iteration from
// random vectors W. A = T B and B = S A take turns, and after each of them its columns are made orthonormal, those of B in
// the metric of T and those of A in that of S: in float32 not more than one factor of the scores may pile up before. Only the
// first B = S T W is let go. Orthonormal by the inverse of a Cholesky factor of B^T T B, made by elimination, damped: a column
// of which only rounding is left becomes small, not noise of length 1.
//
// Products are those of three TF32 each. The order of the terms of a sum is free: a lane reads four neighbours of a row, and
// takes them for the terms of two instructions.
//
// Constants, defined by the plan:
//   DTYPE       of Q and K: 0 float16, 1 bfloat16, 2 float32
//   HEAD_DIM    columns of Q and K
//   RANK        columns of Qhat and Khat, a multiple of 16
//   IN_SHARED   1: both of the matrices that are iterated lie in shared memory; 0: in global memory
//   SHARED_BYTES  what the plan reserves
#include "tile/drawn.cuh"
#include "tile/multiply.cuh"
#include "tile/warp.cuh"

typedef ElementOf<DTYPE>::type T;

struct LowRankFactorsParams {
    float* of_keys;        // (units, splits, columns, columns): the sum takes the place of the first
    float* of_queries;     // (units, query_splits, columns, columns), the same
    const float* start;    // (columns, RANK): the random vectors
    const float* vectors;  // (columns, 16): others, for the sketch
    const float* center;   // (units, columns)
    float* scratch;        // (units, 2, columns, kPitch), if shared memory does not hold these matrices
    float* factors;        // (units, 2, HEAD_DIM, RANK): A and B
    float* mean;           // (units, HEAD_DIM)
    // A, B, mean B, the mean, and what the factors keep of the vectors, as smxx_project.cu has them.
    Chunk* q_lanes;
    Chunk* k_lanes;
    float* bias;
    Chunk* mean_lanes;
    Chunk* sketch_lanes;  // null if not wanted
    i32 splits, query_splits;
};

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kColumns = kDrawnColumns<HEAD_DIM>;
constexpr int kSquare = kColumns * kColumns;
// Of matrices of RANK columns: four rows lie eight banks apart, and the columns of a row, or of two, in others.
constexpr int kPitch = RANK + 2;
constexpr int kThin = kColumns * kPitch;
constexpr int kSketch = 16;
constexpr int kGroup = 32;            // columns whose lanes smxx_project.cu has side by side
constexpr int kLast = 4;              // products with T, S, T, S, T
constexpr int kFree = 2;              // of the first of these, which are not made orthonormal
constexpr float kRidge = 1e-7f;       // of the trace of T, on its diagonal: bounds B
constexpr float kLeastTrace = 1e-35f;  // whose inverse is a number
constexpr float kDamped = 2e-6f;      // of a column's square, added to what is left of it: less than that is rounding
constexpr int kStepWarps = 8;         // that eliminate: more would wait for each other longer
constexpr int kTogether = RANK > 96 ? 2 : 4;  // rows that they take off at once
constexpr int kPerLane = (RANK + kWarpSize - 1) / kWarpSize;      // columns of a row, of a lane
constexpr int kPerWarp = RANK / kStepWarps;                       // rows of a warp
constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
constexpr int kElements = 4 / int(sizeof(T));                     // of a word
constexpr int kSegments = (HEAD_DIM * int(sizeof(T)) + 63) / 64;  // of a row, of 16 words
constexpr int kLanes = kParts * kSegments * 2 * kWarpSize;        // chunks of 16 columns
static_assert(RANK % 16 == 0 && RANK <= 128 && RANK < HEAD_DIM, "whole matrix instructions");

struct SharedStorage {
#if IN_SHARED
    alignas(16) float matrix[2][kThin];
#endif
    alignas(16) float square[RANK * kPitch];
    // Of the elimination: rows, one over each pivot, and one over the length of each column before.
    alignas(16) float rows[2][kTogether][RANK];
    float inverse[RANK];
    float length[RANK];
    float mean[kColumns];
    float sums[kWarps];
};
static_assert(sizeof(SharedStorage) == SHARED_BYTES, "the plan and the kernel disagree on shared memory");

struct alignas(16) Four {
    float x[4];
};

DEVICE float block_sum(SharedStorage& shared, float x) {
    x = warp_sum(x);
    if (thread_index() % kWarpSize == 0) shared.sums[thread_index() / kWarpSize] = x;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp];
    __syncthreads();
    return sum;
}

// The sum over splits, in the place of the first, its trace made 1, and a ridge on the diagonal: factors do not depend on
// the scale.
DEVICE void add_up(SharedStorage& shared, float* parts, int splits, float ridge) {
    constexpr int kFours = kSquare / 4;
    constexpr int kReads = (kFours + kThreads - 1) / kThreads, kHeld = kReads < 8 ? kReads : 8;  // in registers
    constexpr bool kAll = kHeld * kThreads >= kFours;                  // of what a thread has
    Four own[kHeld];
    float trace = 0.f;
    const auto diagonal = [](int i, int c) { return (i * 4 + c) / kColumns == (i * 4 + c) % kColumns; };
    const auto place = [](int start, int n) { return start + n * kThreads + thread_index(); };
#pragma unroll 1
    for (int start = 0; start < kFours; start += kHeld * kThreads) {
#pragma unroll
        for (int n = 0; n < kHeld; ++n) own[n] = {{0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
        for (int split = 0; split < splits; ++split) {
            Four more[kHeld] = {};
#pragma unroll
            for (int n = 0; n < kHeld; ++n) {
                const int i = place(start, n);
                if (kFours % (kHeld * kThreads) != 0 && i >= kFours) break;
                more[n] = *reinterpret_cast<const Four*>(parts + static_cast<i64>(split) * kSquare + i * 4);
            }
#pragma unroll
            for (int n = 0; n < kHeld; ++n) {
#pragma unroll
                for (int c = 0; c < 4; ++c) own[n].x[c] += more[n].x[c];
            }
        }
#pragma unroll
        for (int n = 0; n < kHeld; ++n) {
            const int i = place(start, n);
            if (kFours % (kHeld * kThreads) != 0 && i >= kFours) break;
#pragma unroll
            for (int c = 0; c < 4; ++c) trace += diagonal(i, c) ? own[n].x[c] : 0.f;
            if (!kAll) *reinterpret_cast<Four*>(parts + i * 4) = own[n];
        }
    }
    trace = block_sum(shared, trace);
    const float factor = trace > kLeastTrace && trace < infinity() ? 1.f / trace : 0.f;
#pragma unroll 1
    for (int start = 0; start < kFours; start += kHeld * kThreads) {
#pragma unroll
        for (int n = 0; n < kHeld; ++n) {
            const int i = place(start, n);
            if (kFours % (kHeld * kThreads) != 0 && i >= kFours) break;
            if (!kAll) own[n] = *reinterpret_cast<const Four*>(parts + i * 4);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                own[n].x[c] = factor > 0.f ? fmaf(own[n].x[c], factor, diagonal(i, c) ? ridge : 0.f) : 0.f;
            }
            *reinterpret_cast<Four*>(parts + i * 4) = own[n];
        }
    }
    __syncthreads();
}

// How the left operand of a product lies in memory: a symmetric square with rows of kColumns, a matrix of RANK columns
// whose rows are the product's, or one whose columns are.
enum Left { kSymmetric, kByRows, kByColumns };

// What a lane has of two rows, four neighbours of the sum each.
template <Left kLeft>
DEVICE void read_left(float (&x)[2][4], const float* left, int row, int term) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int own = row + half * 8;
        if constexpr (kLeft == kSymmetric) {
            const Four four = *reinterpret_cast<const Four*>(left + own * kColumns + term);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[half][i] = four.x[i];
        } else if constexpr (kLeft == kByRows) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const Two<float> two = *reinterpret_cast<const Two<float>*>(left + own * kPitch + term + i);
                x[half][i] = two.element[0];
                x[half][i + 1] = two.element[1];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[half][i] = left[(term + i) * kPitch + own];
        }
    }
}

// out = left right, of kRows x RANK, summed over kDepth rows of right. A warp makes 32 x 16 at once, and warps side by side
// all of 32 rows: so out may be left, if that is by rows, since these are read before they are written.
template <Left kLeft, int kRows, int kDepth>
DEVICE void multiply(float* out, const float* left, const float* right) {
    typedef Multiply<float, true> Mma;
    constexpr int kAcross = RANK / 16, kAtOnce = kWarps / kAcross * 32;  // rows
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    const int column = warp % kAcross * 16;
    const float* rights = right + lane % 4 * 4 * kPitch + column + lane / 4;
#pragma unroll 1
    for (int start = 0; start < kRows; start += kAtOnce) {
        const int first_row = start + warp / kAcross * 32;
        const bool works = warp / kAcross * 32 < kAtOnce && first_row < kRows;
        float product[2][2][4] = {};
        if (works) {
            Mma::Sum sums[2][2];
            const bool whole = kRows % 32 == 0 || first_row + 16 < kRows;  // or only 16 rows
#pragma unroll 1
            for (int term = 0; term < kDepth; term += 16) {
                float x[2][2][4], y[2][4];
#pragma unroll
                for (int mt = 0; mt < 2; ++mt) {
                    const int row = first_row + (whole ? mt * 16 : 0) + lane / 4;
                    read_left<kLeft>(x[mt], left, row, term + lane % 4 * 4);
                }
#pragma unroll
                for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) y[nt][i] = rights[(term + i) * kPitch + nt * 8];
                }
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    Mma::B b[2];
#pragma unroll
                    for (int nt = 0; nt < 2; ++nt) {
                        b[nt] = Mma::right<false>(__float_as_uint(y[nt][step * 2]), __float_as_uint(y[nt][step * 2 + 1]));
                    }
#pragma unroll
                    for (int mt = 0; mt < 2; ++mt) {
                        const u32 raw[4] = {__float_as_uint(x[mt][0][step * 2]), __float_as_uint(x[mt][1][step * 2]),
                                            __float_as_uint(x[mt][0][step * 2 + 1]), __float_as_uint(x[mt][1][step * 2 + 1])};
                        const Mma::A a = Mma::left<false>(raw);
#pragma unroll
                        for (int nt = 0; nt < 2; ++nt) Mma::run(product[mt][nt], sums[mt][nt], a, b[nt]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) Mma::add_high(product[i / 2][i % 2], sums[i / 2][i % 2]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) Mma::add_low(product[i / 2][i % 2], sums[i / 2][i % 2]);
        }
        if (kLeft == kByRows) __syncthreads();  // all of these rows are read
        if (works) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int mt = i / 4, nt = i / 2 % 2, half = i % 2;
                const int row = first_row + mt * 16 + half * 8 + lane / 4;
                if (kRows % 32 != 0 && row >= kRows) continue;
                const float(&of)[4] = product[mt][nt];
                Two<float>* to = reinterpret_cast<Two<float>*>(out + row * kPitch + column + nt * 8 + lane % 4 * 2);
                *to = {{of[half * 2], of[half * 2 + 1]}};
            }
        }
    }
    __syncthreads();
}

// The rows of a warp that eliminates.
typedef float OwnRows[kPerWarp][kPerLane];

DEVICE bool inside(int column) { return RANK % kWarpSize == 0 || column < RANK; }

// Takes multiples of rows off all others, kTogether rows at once, which the warps that have them wrote for all. The pivots are
// in the lanes' kFrom-th columns. Every warp eliminates these rows among each other by itself.
template <int kFrom>
DEVICE void take_off(SharedStorage& shared, OwnRows& own, int place, int warp, int lane) {
    const int first = kFrom * kWarpSize + place;
    const float(&rows)[kTogether][RANK] = shared.rows[first / kTogether % 2];
    float pivot[kTogether][kTogether], factor[kTogether][kPerLane], left[kTogether];
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
#pragma unroll
        for (int b = 0; b < kTogether; ++b) pivot[a][b] = rows[a][first + b];
#pragma unroll
        for (int c = kFrom; c < kPerLane; ++c) {
            const int column = lane + c * kWarpSize;
            factor[a][c] = inside(column) ? rows[a][column] : 0.f;
        }
    }
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
        left[a] = fmaxf(pivot[a][a], 0.f) + kDamped;
        const float inverse = reciprocal_approx(left[a]);
        if (warp == 0 && lane == a) shared.inverse[first + a] = inverse;
#pragma unroll
        for (int c = kFrom; c < kPerLane; ++c) {
            factor[a][c] = (c > kFrom || lane > place + a) && pivot[a][a] > 0.f ? factor[a][c] * inverse : 0.f;
        }
#pragma unroll
        for (int b = a + 1; b < kTogether; ++b) {
            const float multiple = pivot[a][a] > 0.f ? pivot[b][a] * inverse : 0.f;
#pragma unroll
            for (int c = kFrom; c < kPerLane; ++c) factor[b][c] = fmaf(-factor[a][c], pivot[b][a], factor[b][c]);
#pragma unroll
            for (int other = a + 1; other < kTogether; ++other) {
                pivot[b][other] = fmaf(-pivot[a][other], multiple, pivot[b][other]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kPerWarp; ++m) {
#pragma unroll
        for (int a = 0; a < kTogether; ++a) {
            // Of a row itself, minus its multiples are left: the columns of the inverse.
            const float theirs = from_lane(own[m][kFrom], place + a);
            const float times = warp + m * kStepWarps == first + a ? left[a] + 1.f : theirs;
#pragma unroll
            for (int c = kFrom; c < kPerLane; ++c) own[m][c] = fmaf(-factor[a][c], times, own[m][c]);
        }
    }
    const int next = warp - (first + kTogether) % kStepWarps;  // which of the next rows a warp has
    if (next >= 0 && next < kTogether) {
        // A bit, because ptxas puts the rows into memory if it sees that one is looked up by its number.
        const u32 bit = anew(1u << (first + kTogether) / kStepWarps);
#pragma unroll
        for (int m = 0; m < kPerWarp; ++m) {
#pragma unroll
            for (int c = kFrom; c < kPerLane; ++c) {
                const int column = lane + c * kWarpSize;
                if (bit >> m & 1 && inside(column)) {
                    shared.rows[(first / kTogether + 1) % 2][next][column] = own[m][c];
                }
            }
        }
    }
}

// The same for all rows. Only some of the warps have rows.
template <int kFrom>
DEVICE void eliminate(SharedStorage& shared, OwnRows& own, int warp, int lane) {
#pragma unroll 1
    for (int place = 0; place < min(kWarpSize, RANK - kFrom * kWarpSize); place += kTogether) {
        if (warp < kStepWarps) take_off<kFrom>(shared, own, place, warp, lane);
        __syncthreads();
    }
    if constexpr (kFrom + 1 < kPerLane) eliminate<kFrom + 1>(shared, own, warp, lane);
}

// Turns the square B^T T B into C with (B C)^T T (B C) = 1: C is the inverse of a Cholesky factor.
DEVICE void orthonormalize(SharedStorage& shared) {
    const int lane = thread_index() % kWarpSize;
    const int warp = __shfl_sync(kFullWarp, thread_index() / kWarpSize, 0);  // so that the compiler knows that lanes agree
#pragma unroll 1
    for (int i = thread_index(); i < RANK; i += kThreads) {
        const float x = shared.square[i * kPitch + i];
        shared.length[i] = x > kLeastTrace ? 1.f / sqrtf(x) : 0.f;
    }
    __syncthreads();
    OwnRows own = {};
    if (warp < kStepWarps) {
#pragma unroll
        for (int m = 0; m < kPerWarp; ++m) {
            const int row = warp + m * kStepWarps;
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) {
                const int column = lane + c * kWarpSize;
                const float factor = shared.length[row] * (inside(column) ? shared.length[column] : 0.f);
                own[m][c] = factor > 0.f ? shared.square[row * kPitch + column] * factor : 0.f;
                if (inside(column) && row < kTogether) shared.rows[0][row][column] = own[m][c];
            }
        }
    }
    __syncthreads();
    eliminate<0>(shared, own, warp, lane);
    if (warp < kStepWarps) {
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
            const int column = lane + c * kWarpSize;
            if (!inside(column)) continue;
            const float scale = sqrtf(shared.inverse[column]);
#pragma unroll
            for (int m = 0; m < kPerWarp; ++m) {
                const int row = warp + m * kStepWarps;
                const float unit = row < column ? own[m][c] : row == column ? 1.f : 0.f;
                shared.square[row * kPitch + column] = unit * shared.length[row] * scale;
            }
        }
    }
    __syncthreads();
}

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
template <class Half>
DEVICE u32 bits_of(Half x) {
    return x.bits;
}

// Numbers of T whose sum x is, one after another; the next is taken off x. Its bits.
DEVICE u32 take_part(float& x) {
    const T part = Traits<T>::from_float(x);
    x -= Traits<T>::to_float(part);
    return bits_of(part);
}

// Columns in the order in which smxx_project.cu reads them, of which kOf are multiplied at once: see in_lanes in
// projection.py. at(element of HEAD_DIM, column) may be asked for what is not there.
template <int kOf, int kCount, class At>
DEVICE void write_lanes(Chunk* out, const At& at) {
    constexpr int kTiles = (kCount + kOf - 1) / kOf * (kOf / 16);
#pragma unroll 1
    for (int i = thread_index(); i < kTiles * kSegments * 2 * kWarpSize; i += kThreads) {
        const int lane = i % kWarpSize, step = i / kWarpSize % 2, segment = i / (2 * kWarpSize) % kSegments;
        const int tile = i / (2 * kWarpSize * kSegments);
        const int column = tile / (kOf / 16) * kOf + lane / 4 * (kOf / 8) + tile % (kOf / 16) * 2;
        const int first = (segment * 16 + lane % 4 * 4 + step * 2) * kElements;
        float x[2][2][kElements];  // of a word, of a row
#pragma unroll
        for (int n = 0; n < 4 * kElements; ++n) {
            const int row = n % 2, word = n / 2 % 2, element = n / 4;
            const int place = first + word * kElements + element;
            x[word][row][element] = place < HEAD_DIM && column + row < kCount ? at(place, column + row) : 0.f;
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            Chunk chunk;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                u32 word = 0;
#pragma unroll
                for (int element = 0; element < kElements; ++element) {
                    word |= take_part(x[n / 2][n % 2][element]) << (element * 16);
                }
                chunk.word[n] = word;
            }
            out[((tile * kParts + part) * kSegments * 2 + segment * 2 + step) * kWarpSize + lane] = chunk;
        }
    }
}

// Two columns whose parts all together are the mean, as lanes 0 to 3 have them.
DEVICE void write_mean(Chunk* out, const float* mean) {
#pragma unroll 1
    for (int i = thread_index(); i < kSegments * 8; i += kThreads) {
        const int t = i % 4, step = i / 4 % 2, segment = i / 8;
        const int first = (segment * 16 + t * 4 + step * 2) * kElements;
        float x[2][kElements];
#pragma unroll
        for (int n = 0; n < 2 * kElements; ++n) {
            const int place = first + n;
            x[n / kElements][n % kElements] = place < HEAD_DIM ? mean[place] : 0.f;
        }
        u32 words[2 * kParts][2];
#pragma unroll
        for (int n = 0; n < 2 * kParts; ++n) {
#pragma unroll
            for (int word = 0; word < 2; ++word) {
                words[n][word] = 0;
#pragma unroll
                for (int element = 0; element < kElements; ++element) {
                    words[n][word] |= take_part(x[word][element]) << (element * 16);
                }
            }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            out[(part * kSegments * 2 + segment * 2 + step) * 4 + t] = Chunk{
                {words[part][0], words[kParts + part][0], words[part][1], words[kParts + part][1]}};
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) smxx_lowrank_factors(const LowRankFactorsParams params) {
    extern __shared__ __align__(16) unsigned char storage[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(storage);
    const int unit = block_index();
    float* of_keys = params.of_keys + static_cast<i64>(unit) * params.splits * kSquare;
    float* of_queries = params.of_queries + static_cast<i64>(unit) * params.query_splits * kSquare;
#if IN_SHARED
    float *first = shared.matrix[0], *second = shared.matrix[1];
#else
    float *first = params.scratch + static_cast<i64>(unit) * (2 * kThin), *second = first + kThin;
#endif
    // Code that runs once comes from memory: so there are loops where there could be calls.
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {
        add_up(shared, n ? of_queries : of_keys, n ? params.query_splits : params.splits, n ? 0.f : kRidge);
    }
#pragma unroll 1
    for (int i = thread_index(); i < kColumns; i += kThreads) shared.mean[i] = params.center[unit * kColumns + i];
#pragma unroll 1
    for (int i = thread_index(); i < kColumns * RANK; i += kThreads) {
        first[i / RANK * kPitch + i % RANK] = params.start[i];
    }
    __syncthreads();

#pragma unroll 1
    for (int step = 0;; ++step) {
        multiply<kSymmetric, kColumns, kColumns>(second, step % 2 ? of_queries : of_keys, first);
        if (step < kFree) {
            float* const other = first;
            first = second, second = other;
            continue;
        }
        multiply<kByColumns, RANK, kColumns>(shared.square, first, second);
        orthonormalize(shared);
#pragma unroll 1
        for (int n = 0; n <= (step == kLast); ++n) {
            float* const own = n ? first : second;
            multiply<kByRows, kColumns, RANK>(own, own, shared.square);
        }
        if (step == kLast) break;
        float* const other = first;
        first = second, second = other;
    }
    const float *a = second, *b = first;

    float* out = params.factors + static_cast<i64>(unit) * (2 * HEAD_DIM * RANK);
#pragma unroll 1
    for (int i = thread_index(); i < HEAD_DIM * RANK; i += kThreads) {
        const int place = i / RANK * kPitch + i % RANK;
        out[i] = a[place];
        out[HEAD_DIM * RANK + i] = b[place];
    }
#pragma unroll 1
    for (int i = thread_index(); i < HEAD_DIM; i += kThreads) params.mean[unit * HEAD_DIM + i] = shared.mean[i];
    constexpr int kTiles = (RANK + kGroup - 1) / kGroup * (kGroup / 16);
    const i64 chunks = static_cast<i64>(unit) * (kTiles * kLanes);
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {
        const float* from = n ? b : a;
        write_lanes<kGroup, RANK>((n ? params.k_lanes : params.q_lanes) + chunks,
                                  [&](int i, int column) { return from[i * kPitch + column]; });
    }
    write_mean(params.mean_lanes + static_cast<i64>(unit) * (kLanes / 8), shared.mean);
#pragma unroll 1
    for (int column = thread_index() / kWarpSize; column < RANK; column += kWarps) {
        float sum = 0.f;
#pragma unroll 1
        for (int i = thread_index() % kWarpSize; i < kColumns; i += kWarpSize) {
            sum = fmaf(shared.mean[i], b[i * kPitch + column], sum);
        }
        sum = warp_sum(sum);
        if (thread_index() % kWarpSize == 0) params.bias[unit * RANK + column] = sum;
    }
    if (!params.sketch_lanes) return;
    // B^T vectors, in the place of the square, and what A makes of them, in that of B.
#pragma unroll 1
    for (int i = thread_index(); i < RANK * kSketch; i += kThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int n = 0; n < kColumns; ++n) {
            sum = fmaf(b[n * kPitch + i / kSketch], params.vectors[n * kSketch + i % kSketch], sum);
        }
        shared.square[i] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread_index(); i < kColumns * kSketch; i += kThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int n = 0; n < RANK; ++n) {
            sum = fmaf(a[i / kSketch * kPitch + n], shared.square[n * kSketch + i % kSketch], sum);
        }
        first[i] = params.vectors[i] - sum;
    }
    __syncthreads();
    write_lanes<kSketch, kSketch>(params.sketch_lanes + static_cast<i64>(unit) * kLanes,
                                  [&](int i, int column) { return b[i * kSketch + column]; });
}
