// Tile products on the tensor cores: scores = Q K^T, fused or not, and output += P V.
#pragma once
#include "tile/multiply.cuh"
#include "tile/product_float.cuh"

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

// scores += Q K^T for one key tile, over the first steps of the sum; queries is the warp's left_address. kMembers 0: K lies
// (keys, sum). Otherwise it lies transposed, (members x sum, keys), and the members of a group are summed on the way to the
// product: the sums are made by every warp anew, which costs an addition where each of them saves a product.
// Queries are read anew for every tile: kept in registers they were worth 2% at 64 columns, less than a longer tile,
// and beyond that there are no registers.
// kSplit: of float32, see multiply_float_queries_keys.
// beside: what runs between the products of a step of the sum, step by step.
template <class T, int kSplit, int kSteps, int kMembers, int kQueryPitch, int kRowTiles, int kKeyTiles, class Tile,
          class Beside = Nothing>
DEVICE void multiply_queries_keys(float (&scores)[kRowTiles][kKeyTiles][4], u32 queries, const Tile& keys, int lane,
                                  int steps = kSteps, Beside beside = Beside()) {
    if constexpr (sizeof(T) == 4) {
        static_assert(kMembers <= 1, "float32 is fused in shared memory");
        multiply_float_queries_keys<kSplit, kSteps, kMembers != 0, kQueryPitch>(scores, queries, keys, lane, steps);
    } else {
        typedef Multiply<T, false> Mma;
        constexpr int kBytes = int(sizeof(T));
        constexpr int kDepth = Traits<T>::kMmaDepth;
        constexpr int kPairs = kKeyTiles / 2;
        constexpr int kTogether = Beside::kTogether;  // pairs whose operands are read before the first is multiplied
        constexpr bool kTransposed = kMembers != 0;
        const u32 address = kTransposed ? transposed_address(keys, lane) : right_address<T>(keys, lane);
        // Unrolled whole, ptxas reads so many operands ahead that the kernels with Khat in shared memory spill.
#pragma unroll(kMembers == 1 && !Beside::kUnroll ? 1 : kSteps)
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
                    if constexpr (kTransposed) {
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
}

// Weights that are all there before they are multiplied.
struct Ready {
    static constexpr bool kMakes = false;
    DEVICE void run(int, int, int) {}
};

// output += P V for one key tile. The accumulators of P are the left operand as they stand: two neighbouring 8-key tiles
// make one 16-key step.
// kHold keeps ptxas from reading values so far ahead that it spills: no read moves across a warp barrier, one before every
// so many reads; 0 for none.
// beside: what makes the weights of a step between the products of the step before, or Ready.
template <class T, bool kSplit, int kHold, int kRowTiles, int kKeyTiles, int kOutTiles, class Tile, class Beside>
DEVICE void multiply_weights_values(float (&output)[kRowTiles][kOutTiles][4],
                                    const float (&weights)[kRowTiles][kKeyTiles][4], const Tile& values, int lane,
                                    Beside& beside) {
    if constexpr (sizeof(T) == 2) {
        typedef Multiply<T, false> Mma;
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
                if constexpr (kHold > 0) {
                    if (pair % kHold == 0) __syncwarp();
                }
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
        multiply_float_weights_values<kSplit>(output, weights, values, lane);
    }
}

template <class T, bool kSplit, int kHold, int kRowTiles, int kKeyTiles, int kOutTiles, class Tile>
DEVICE void multiply_weights_values(float (&output)[kRowTiles][kOutTiles][4],
                                    const float (&weights)[kRowTiles][kKeyTiles][4], const Tile& values, int lane) {
    Ready ready;
    multiply_weights_values<T, kSplit, kHold>(output, weights, values, lane, ready);
}
