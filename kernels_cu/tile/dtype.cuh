// Element types: how each is stored, converted, paired and multiplied.
#pragma once
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

template <class T>
struct Traits;

template <>
struct Traits<f16> {
    static constexpr int kMmaDepth = 16;  // terms of the sum that one matrix instruction takes
    static constexpr bool kWide = false;  // whether it has the range of float32
    static constexpr int kLarge = 1 << 8;  // sums of weights beyond which a maximum follows
    static DEVICE float to_float(f16 x) { return f16_to_float(x.bits); }
    static DEVICE float low(u32 pair) { return f16_to_float(static_cast<u16>(pair)); }
    static DEVICE float high(u32 pair) { return f16_to_float(static_cast<u16>(pair >> 16)); }
    static DEVICE f16 from_float(float x) { return {float_to_f16(x)}; }
    static DEVICE u32 pack(float low, float high) { return floats_to_f16x2(low, high); }
    static DEVICE u32 add(u32 a, u32 b) { return add_f16x2(a, b); }
    static DEVICE u32 fma(u32 a, u32 b, u32 c) { return fma_f16x2(a, b, c); }
    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_m16n8k16_f16(d, a, b0, b1); }
};

template <>
struct Traits<bf16> {
    static constexpr int kMmaDepth = 16;
    static constexpr bool kWide = true;
    static constexpr int kLarge = 1 << 30;
    static DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
    static DEVICE float low(u32 pair) { return __uint_as_float(pair << 16); }
    static DEVICE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
    static DEVICE bf16 from_float(float x) { return {float_to_bf16(x)}; }
    static DEVICE u32 pack(float low, float high) { return floats_to_bf16x2(low, high); }
    static DEVICE u32 add(u32 a, u32 b) { return add_bf16x2(a, b); }
    static DEVICE u32 fma(u32 a, u32 b, u32 c) { return fma_bf16x2(a, b, c); }
    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_m16n8k16_bf16(d, a, b0, b1); }
};

template <>
struct Traits<float> {
    static constexpr int kMmaDepth = 8;
    static constexpr bool kWide = true;
    static constexpr int kLarge = 1 << 30;
    static DEVICE float to_float(float x) { return x; }
    static DEVICE float from_float(float x) { return x; }
};

// The type that the plan names by number: 0 float16, 1 bfloat16, 2 float32.
template <int kDtype>
struct ElementOf;
template <>
struct ElementOf<0> {
    typedef f16 type;
};
template <>
struct ElementOf<1> {
    typedef bf16 type;
};
template <>
struct ElementOf<2> {
    typedef float type;
};
