// Tile products on the tensor cores: scores = Q K^T, fused or not, and output += P V.
#pragma once
#include "tile/dtype.cuh"
#include "tile/shared.cuh"

// One matrix instruction's operands, prepared from the bits that lie in shared memory.
// float16 and bfloat16: as they are.
template <class T, bool kSplit>
struct Multiply {
    struct A {
        u32 raw[4];
    };
    struct B {
        u32 raw[2];
    };
    static DEVICE A left(const u32 (&raw)[4]) { return {{raw[0], raw[1], raw[2], raw[3]}}; }
    static DEVICE B right(u32 b0, u32 b1) { return {{b0, b1}}; }
    static DEVICE void run(float (&d)[4], const A& a, const B& b) { Traits<T>::mma(d, a.raw, b.raw[0], b.raw[1]); }
};

// float32 as TF32: operands rounded to 10 mantissa bits.
template <>
struct Multiply<float, false> {
    struct A {
        u32 raw[4];
    };
    struct B {
        u32 raw[2];
    };
    static DEVICE u32 round(u32 bits) { return round_to_tf32(__uint_as_float(bits)); }
    static DEVICE A left(const u32 (&raw)[4]) {
        return {{round(raw[0]), round(raw[1]), round(raw[2]), round(raw[3])}};
    }
    static DEVICE B right(u32 b0, u32 b1) { return {{round(b0), round(b1)}}; }
    static DEVICE void run(float (&d)[4], const A& a, const B& b) { mma_m16n8k8_tf32(d, a.raw, b.raw[0], b.raw[1]); }
};

// float32 by three TF32 products: x = high + low, a b ~ high high + high low + low high; what is dropped is 2**-22.
// The tensor cores truncate when they accumulate, which would bias a long sum, so each step starts from zero and is
// added by an ordinary, rounded addition.
template <>
struct Multiply<float, true> {
    struct A {
        u32 high[4];
        u32 low[4];
    };
    struct B {
        u32 high[2];
        u32 low[2];
    };
    static DEVICE void split(u32 bits, u32& high, u32& low) {
        const float x = __uint_as_float(bits);
        high = round_to_tf32(x);
        low = round_to_tf32(x - __uint_as_float(high));
    }
    static DEVICE A left(const u32 (&raw)[4]) {
        A a;
#pragma unroll
        for (int i = 0; i < 4; ++i) split(raw[i], a.high[i], a.low[i]);
        return a;
    }
    static DEVICE B right(u32 b0, u32 b1) {
        B b;
        split(b0, b.high[0], b.low[0]);
        split(b1, b.high[1], b.low[1]);
        return b;
    }
    static DEVICE void run(float (&d)[4], const A& a, const B& b) {
        float main[4] = {0.f, 0.f, 0.f, 0.f};
        float correction[4] = {0.f, 0.f, 0.f, 0.f};
        mma_m16n8k8_tf32(correction, a.low, b.high[0], b.high[1]);
        mma_m16n8k8_tf32(correction, a.high, b.low[0], b.low[1]);
        mma_m16n8k8_tf32(main, a.high, b.high[0], b.high[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // An infinite operand has a NaN for its low part; main alone is then what IEEE arithmetic says.
            const bool finite = fabsf(correction[i]) < infinity();
            d[i] += main[i] + (finite ? correction[i] : 0.f);
        }
    }
};

// The rows of A: lane's address in a tile of (rows, sum) with the sum along a row. The next 16 rows and the next
// step of the sum are constants away. Works for 16-bit and 32-bit elements alike: a matrix row is one chunk.
template <class T, class Tile>
DEVICE u32 left_address(const Tile& tile, int row, int lane) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    return shared_address(&tile.at(row + lane % 16, lane / 16 * kElements));
}

// B from a tile of (columns of the product, sum): K as it comes.
template <class T, class Tile>
DEVICE u32 right_address(const Tile& tile, int lane) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    return shared_address(&tile.at(lane / 16 * 8 + lane % 8, lane / 8 % 2 * kElements));
}

// B from a tile of 16-bit elements that lies (sum, columns of the product): K transposed, or V.
template <class Tile>
DEVICE u32 transposed_address(const Tile& tile, int lane) {
    return shared_address(&tile.at(lane % 16, lane / 16 * 8));
}

// A fragment of Khat from the transposed K: the sum of kCount fragments that lie kStride bytes apart, pair by pair, so
// that roundings grow with the logarithm of a group.
template <class T, int kCount, int kStride>
DEVICE void load_sum(u32 (&sum)[4], u32 address) {
    if constexpr (kCount == 1) {
        ldmatrix_x4_trans(sum, address);
    } else {
        constexpr int kHalf = kCount / 2;
        u32 other[4];
        load_sum<T, kHalf, kStride>(sum, address);
        load_sum<T, kCount - kHalf, kStride>(other, address + kHalf * kStride);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = Traits<T>::add(sum[i], other[i]);
    }
}

// What runs beside a product if there is nothing to be done.
struct Nothing {
    static constexpr bool kUnroll = false;
    static constexpr int kTogether = 1;
    DEVICE void run(int, int) {}
};

// scores += Q K^T for one key tile, over the first steps of the sum; queries is the warp's left_address. kMembers 0: K lies (keys, sum). Otherwise it
// lies transposed, (members x sum, keys), and the members of a group are summed on the way to the product: the sums are
// made by every warp anew, which costs an addition where each of them saves a product.
// Queries are read anew for every tile: kept in registers they were worth 2% at 64 columns, less than a longer tile,
// and beyond that there are no registers.
// beside: what runs between the products of a step of the sum, step by step.
template <class T, bool kSplit, int kSteps, int kMembers, int kQueryPitch, int kRowTiles, int kKeyTiles, class Tile,
          class Beside = Nothing>
DEVICE void multiply_queries_keys(float (&scores)[kRowTiles][kKeyTiles][4], u32 queries, const Tile& keys, int lane,
                                  int steps = kSteps, Beside beside = Beside()) {
    typedef Multiply<T, kSplit> Mma;
    constexpr int kBytes = int(sizeof(T));
    constexpr int kDepth = Traits<T>::kMmaDepth;
    constexpr int kPairs = kKeyTiles / 2;
    constexpr int kTogether = Beside::kTogether;  // pairs whose operands are read before the first is multiplied
    constexpr bool kTransposed = kMembers != 0;
    // float32 has no transposing ldmatrix: lanes read their elements themselves, of a Khat made before.
    constexpr bool kElementwise = kTransposed && kBytes == 4;
    static_assert(!kElementwise || kMembers == 1, "multiply_queries_keys: float32 is fused in shared memory");
    const u32 address = kTransposed ? transposed_address(keys, lane) : right_address<T>(keys, lane);
    const auto* element = &keys.at(kElementwise ? lane % 4 : 0, kElementwise ? lane / 4 : 0);
    // Unrolled whole, ptxas reads so many operands ahead that float32 (twice the steps, three products in each) and
    // the kernels with Khat in shared memory spill.
#pragma unroll(kBytes == 4 ? 4 : kMembers == 1 && !Beside::kUnroll ? 1 : kSteps)
    for (int step = 0; step < kSteps; ++step) {
        if (step >= steps) break;
        typename Mma::A a[kRowTiles];
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
            u32 raw[4];
            ldmatrix_x4(raw, queries + (mt * 16 * kQueryPitch + step * kDepth) * kBytes);
            a[mt] = Mma::left(raw);
        }
#pragma unroll
        for (int first = 0; first < kPairs; first += kTogether) {
            u32 raw[kTogether][4];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int pair = first + i;
                if (pair >= kPairs) break;
                if constexpr (kElementwise) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int offset = (step * kDepth + j % 2 * 4) * Tile::kPitch + pair * 16 + j / 2 * 8;
                        raw[i][j] = __float_as_uint(element[offset]);
                    }
                } else if constexpr (kTransposed) {
                    load_sum<T, kMembers, Tile::kRows / kMembers * Tile::kPitch * kBytes>(
                        raw[i], address + (step * kDepth * Tile::kPitch + pair * 16) * kBytes);
                } else {
                    ldmatrix_x4(raw[i], address + (pair * 16 * Tile::kPitch + step * kDepth) * kBytes);
                }
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int pair = first + i;
                if (pair >= kPairs) break;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const typename Mma::B b = Mma::right(raw[i][half * 2], raw[i][half * 2 + 1]);
#pragma unroll
                    for (int mt = 0; mt < kRowTiles; ++mt) Mma::run(scores[mt][pair * 2 + half], a[mt], b);
                }
                if (first == 0) beside.run(step, i);
            }
        }
    }
}

// Weights that are all there before they are multiplied.
struct Ready {
    static constexpr bool kMakes = false;
    DEVICE void run(int, int, int) {}
};

// output += P V for one key tile. The accumulators of P are the left operand as they stand: for 16-bit types two
// neighbouring 8-key tiles make one 16-key step; for float32 the keys of a step are renumbered (0 2 4 6 1 3 5 7), in P
// and in V alike, which a sum does not notice and which saves the shuffles.
// kHold keeps ptxas from reading values so far ahead that it spills: no read moves across a warp barrier.
// beside: what makes the weights of a step between the products of the step before, or Ready.
template <class T, bool kSplit, bool kHold, int kRowTiles, int kKeyTiles, int kOutTiles, class Tile, class Beside>
DEVICE void multiply_weights_values(float (&output)[kRowTiles][kOutTiles][4],
                                    const float (&weights)[kRowTiles][kKeyTiles][4], const Tile& values, int lane,
                                    Beside& beside) {
    typedef Multiply<T, kSplit> Mma;
    if constexpr (sizeof(T) == 2) {
        const u32 address = transposed_address(values, lane);
        constexpr int kSteps = kKeyTiles / 2;
        constexpr int kWords = kRowTiles * 4;  // of the left operands of a step
        u32 packed[2][kRowTiles][4];
        const auto make = [&](int step, int word) {
            const int mt = word / 4, nt = step * 2 + word / 2 % 2, half = word % 2;
            beside.run(mt, nt, half);
            packed[step % 2][mt][word % 4] = Traits<T>::pack(weights[mt][nt][half * 2], weights[mt][nt][half * 2 + 1]);
        };
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if (!Beside::kMakes || step == 0) {
#pragma unroll
                for (int word = 0; word < kWords; ++word) make(step, word);
            }
            typename Mma::A a[kRowTiles];
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) a[mt] = Mma::left(packed[step % 2][mt]);
#pragma unroll
            for (int pair = 0; pair < kOutTiles / 2; ++pair) {
                if (kHold && pair % 2 == 0) __syncwarp();
                u32 raw[4];
                ldmatrix_x4_trans(raw, address + (step * 16 * Tile::kPitch + pair * 16) * int(sizeof(T)));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int place = pair * 2 + half;
                    const typename Mma::B b = Mma::right(raw[half * 2], raw[half * 2 + 1]);
#pragma unroll
                    for (int mt = 0; mt < kRowTiles; ++mt) Mma::run(output[mt][place], a[mt], b);
#pragma unroll
                    for (int word = 0; word < kWords; ++word) {
                        const bool now = Beside::kMakes && step + 1 < kSteps && word * kOutTiles / kWords == place;
                        if (now) make(step + 1, word);
                    }
                }
            }
        }
    } else {
        // All steps of a tile are summed before they are added to the output: short sums of short sums round less.
        const T* element = &values.at(lane % 4 * 2, lane / 4);
        typename Mma::A a[kKeyTiles][kRowTiles];
#pragma unroll
        for (int step = 0; step < kKeyTiles; ++step) {
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
                const float(&p)[4] = weights[mt][step];
                const u32 raw[4] = {__float_as_uint(p[0]), __float_as_uint(p[2]), __float_as_uint(p[1]),
                                    __float_as_uint(p[3])};
                a[step][mt] = Mma::left(raw);
            }
        }
#pragma unroll
        for (int nt = 0; nt < kOutTiles; ++nt) {
            float tile[kRowTiles][4] = {};
#pragma unroll
            for (int step = 0; step < kKeyTiles; ++step) {
                const T* value = element + step * 8 * Tile::kPitch + nt * 8;
                const typename Mma::B b = Mma::right(__float_as_uint(value[0]), __float_as_uint(value[Tile::kPitch]));
#pragma unroll
                for (int mt = 0; mt < kRowTiles; ++mt) Mma::run(tile[mt], a[step][mt], b);
            }
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output[mt][nt][i] += tile[mt][i];
            }
        }
    }
}

template <class T, bool kSplit, bool kHold, int kRowTiles, int kKeyTiles, int kOutTiles, class Tile>
DEVICE void multiply_weights_values(float (&output)[kRowTiles][kOutTiles][4],
                                    const float (&weights)[kRowTiles][kKeyTiles][4], const Tile& values, int lane) {
    Ready ready;
    multiply_weights_values<T, kSplit, kHold>(output, weights, values, lane, ready);
}
