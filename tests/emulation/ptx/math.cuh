// Emulated twin of kernels_cu/ptx/math.cuh.
#pragma once
#include "ptx/arch.cuh"

DEVICE float exp2_approx(float x) {
    const float smallest = __uint_as_float(0x00800000u);  // ftz: denormal operands and results are zero
    const float y = static_cast<float>(exp2(fabsf(x) < smallest ? 0.0 : static_cast<double>(x)));
    return fabsf(y) < smallest ? 0.f : y;
}

DEVICE float reciprocal_approx(float x) {
    const float smallest = __uint_as_float(0x00800000u);
    const float y = 1.f / (fabsf(x) < smallest ? 0.f * x : x);
    return fabsf(y) < smallest ? 0.f * y : y;
}

DEVICE float f16_to_float(u16 x) { return machine::half_to_float(x); }
DEVICE u16 float_to_f16(float x) { return machine::float_to_half(x); }
DEVICE u16 float_to_bf16(float x) { return machine::float_to_bfloat(x); }
DEVICE u32 floats_to_f16x2(float low, float high) {
    return static_cast<u32>(machine::float_to_half(high)) << 16 | machine::float_to_half(low);
}
DEVICE u32 floats_to_bf16x2(float low, float high) {
    return static_cast<u32>(machine::float_to_bfloat(high)) << 16 | machine::float_to_bfloat(low);
}

// The sum of two numbers of 11 bits, or 8, is rounded once: where float32 rounds it, the smaller is far below half of
// a last bit of the result.
DEVICE u32 add_f16x2(u32 a, u32 b) {
    return floats_to_f16x2(f16_to_float(static_cast<u16>(a)) + f16_to_float(static_cast<u16>(b)),
                           f16_to_float(static_cast<u16>(a >> 16)) + f16_to_float(static_cast<u16>(b >> 16)));
}
DEVICE u32 add_bf16x2(u32 a, u32 b) {
    const double low = static_cast<double>(__uint_as_float(a << 16)) + __uint_as_float(b << 16);
    const double high = static_cast<double>(__uint_as_float(a & 0xffff0000u)) + __uint_as_float(b & 0xffff0000u);
    return floats_to_bf16x2(static_cast<float>(low), static_cast<float>(high));
}

// a * b + c as a float that rounds to 16 bits as the exact result does: the product of two numbers of 11 bits is exact
// in double, and where the float is not, its last bit is set, so that it is no tie.
DEVICE float fused(float a, float b, float c) {
    const double product = static_cast<double>(a) * b;
    const double sum = product + c;
    const double of_c = sum - product;
    const double lost = (product - (sum - of_c)) + (c - of_c);
    const float y = static_cast<float>(sum);
    const double rest = (sum - static_cast<double>(y)) + lost;
    if (!(fabsf(y) < 3e38f) || rest == 0.) return y;
    const u32 bits = __float_as_uint(y);
    const bool nearer = y != 0.f && (rest < 0.) == (y > 0.f);  // to zero, the exact result
    return __uint_as_float((nearer ? bits - 1 : bits) | 1u);
}
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    float y[2];
    for (int i = 0; i < 2; ++i) {
        y[i] = fused(f16_to_float(static_cast<u16>(a >> 16 * i)), f16_to_float(static_cast<u16>(b >> 16 * i)),
                     f16_to_float(static_cast<u16>(c >> 16 * i)));
    }
    return floats_to_f16x2(y[0], y[1]);
}
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    float y[2];
    for (int i = 0; i < 2; ++i) {
        y[i] = fused(__uint_as_float(a >> 16 * i << 16), __uint_as_float(b >> 16 * i << 16),
                     __uint_as_float(c >> 16 * i << 16));
    }
    return floats_to_bf16x2(y[0], y[1]);
}

// Unlike fmaxf of the host, which makes a NaN of a signalling one.
DEVICE float larger_number(float a, float b) { return a != a ? b : b != b ? a : a < b ? b : a; }
DEVICE u32 max_bf16x2(u32 a, u32 b) {
    return floats_to_bf16x2(larger_number(__uint_as_float(a << 16), __uint_as_float(b << 16)),
                            larger_number(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u)));
}
