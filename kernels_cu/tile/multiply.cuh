// Operands of matrix instructions, and where they lie in shared memory.
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

// A float whose upper 19 bits, all that the tensor cores read of it, are x rounded to 10 bits of mantissa. Infinity and NaN
// survive an addition; cvt.rna.tf32 takes four instructions because it asks for them. What is added is half of what the
// last of these bits stands for, so that the nearest number is found; or, in one instruction less, 0.35 to 0.69 of it.
template <bool kNearest>
DEVICE float round_upper_bits(float x) {
    if constexpr (kNearest) return fmaf(__uint_as_float(__float_as_uint(x) & 0xff800000u), 1.f / 2048.f, x);
    return fmaf(x, 0.34657359f / 1024.f, x);
}

// float32 as TF32: operands rounded to 10 mantissa bits.
template <>
struct Multiply<float, false> {
    struct A {
        u32 raw[4];
    };
    struct B {
        u32 raw[2];
    };
    struct Sum {};
    static DEVICE u32 round(u32 bits) { return __float_as_uint(round_upper_bits<false>(__uint_as_float(bits))); }
    template <bool = true>
    static DEVICE A left(const u32 (&raw)[4]) {
        return {{round(raw[0]), round(raw[1]), round(raw[2]), round(raw[3])}};
    }
    template <bool = true>
    static DEVICE B right(u32 b0, u32 b1) {
        return {{round(b0), round(b1)}};
    }
    static DEVICE void run(float (&d)[4], const A& a, const B& b) { mma_m16n8k8_tf32(d, a.raw, b.raw[0], b.raw[1]); }
    static DEVICE void run(float (&d)[4], Sum&, const A& a, const B& b) { run(d, a, b); }
    static DEVICE void add_high(float (&)[4], Sum&) {}
    static DEVICE void add_low(float (&)[4], const Sum&) {}
};

// float32 by three TF32 products: x = high + low, a b ~ high high + high low + low high; what is dropped is 2**-22. Of low
// the tensor cores read 11 bits, so that 23 of the 24 bits of x arrive, or with kNearest false 22 of some numbers.
// The tensor cores truncate when they accumulate, which would bias a long sum: of the first they add up a few steps from
// zero on, and these are added by an ordinary, rounded addition. The other two are so small that they may truncate.
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
    // What the tensor cores have added up, and d has not yet.
    struct Sum {
        float high[4] = {0.f, 0.f, 0.f, 0.f};
        float low[4] = {0.f, 0.f, 0.f, 0.f};
    };
    template <bool kNearest>
    static DEVICE void split(u32 bits, u32& high, u32& low) {
        const float x = __uint_as_float(bits);
        high = __float_as_uint(round_upper_bits<kNearest>(x)) & 0xffffe000u;
        low = __float_as_uint(x - __uint_as_float(high));
    }
    template <bool kNearest = true>
    static DEVICE A left(const u32 (&raw)[4]) {
        A a;
#pragma unroll
        for (int i = 0; i < 4; ++i) split<kNearest>(raw[i], a.high[i], a.low[i]);
        return a;
    }
    template <bool kNearest = true>
    static DEVICE B right(u32 b0, u32 b1) {
        B b;
        split<kNearest>(b0, b.high[0], b.low[0]);
        split<kNearest>(b1, b.high[1], b.low[1]);
        return b;
    }
    static DEVICE void run(float (&)[4], Sum& sum, const A& a, const B& b) {
        mma_m16n8k8_tf32(sum.low, a.low, b.high[0], b.high[1]);
        mma_m16n8k8_tf32(sum.low, a.high, b.low[0], b.low[1]);
        mma_m16n8k8_tf32(sum.high, a.high, b.high[0], b.high[1]);
    }
    static DEVICE void run(float (&d)[4], const A& a, const B& b) {
        Sum sum;
        run(d, sum, a, b);
        add_low(sum.high, sum);
        add_high(d, sum);
    }
    static DEVICE void add_high(float (&d)[4], Sum& sum) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            d[i] += sum.high[i];
            sum.high[i] = 0.f;
        }
    }
    // To d with the high parts. An infinite operand has a NaN for its low part; d is infinite then, or NaN, as IEEE
    // arithmetic has it, and stays so with a number in the place of that NaN.
    static DEVICE void add_low(float (&d)[4], const Sum& sum) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[i] += fminf(sum.low[i], 3.402823466e38f);
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
