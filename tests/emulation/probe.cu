// One instruction of kernels_cu/ptx at a time, or a few that stand for one, so that tests can compare it with what PTX
// says: one warp, lane l reads kIn words at in + l * kIn and writes kOut words at out + l * kOut; several for places of blocks.
//
// Constants: PROBE, one of the names below by number.
#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/multiply.cuh"

struct ProbeParams {
    const u32* in;
    u32* out;
};

namespace {

constexpr int kMatrixBytes = 4 * 8 * 16;

// A lane's own row of the four matrices, at an address of its own choosing: rows are stored in the order of in[4].
DEVICE u32 store_row(unsigned char* matrices, const u32* in) {
    for (int i = 0; i < 4; ++i) reinterpret_cast<u32*>(matrices + in[4] * 16)[i] = in[i];
    __syncthreads();
    return shared_address(matrices + in[4] * 16);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32) probe(const ProbeParams params) {
    __shared__ __align__(16) unsigned char storage[kMatrixBytes];
    const int lane = thread_index();
#if PROBE == 0 || PROBE == 1  // ldmatrix, ldmatrix.trans: in is a row of 4 words and where it is kept; out 4 words
    const u32* in = params.in + lane * 5;
    const u32 address = store_row(storage, in);
    u32 fragment[4];
    if (PROBE == 0) {
        ldmatrix_x4(fragment, address);
    } else {
        ldmatrix_x4_trans(fragment, address);
    }
    for (int i = 0; i < 4; ++i) params.out[lane * 4 + i] = fragment[i];
#elif PROBE == 2 || PROBE == 3 || PROBE == 4  // mma f16, bf16, tf32: in 4 words of c, 4 of a, 2 of b; out 4 of d
    const u32* in = params.in + lane * 10;
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[i]);
    const u32 a[4] = {in[4], in[5], in[6], in[7]};
    if (PROBE == 2) mma_m16n8k16_f16(d, a, in[8], in[9]);
    if (PROBE == 3) mma_m16n8k16_bf16(d, a, in[8], in[9]);
    if (PROBE == 4) mma_m16n8k8_tf32(d, a, in[8], in[9]);
    for (int i = 0; i < 4; ++i) params.out[lane * 4 + i] = __float_as_uint(d[i]);
#elif PROBE == 5  // conversions of a float and of a pair of floats, sums, products and maxima of pairs: in 5 words, out 13
    const u32* in = params.in + lane * 5;
    u32* out = params.out + lane * 13;
    const float x = __uint_as_float(in[0]);
    const float y = __uint_as_float(in[1]);
    out[0] = __float_as_uint(exp2_approx(x));
    out[1] = __float_as_uint(round_upper_bits<true>(x)) & 0xffffe000u;
    out[2] = __float_as_uint(f16_to_float(static_cast<u16>(in[2])));
    out[3] = float_to_f16(x);
    out[4] = float_to_bf16(x);
    out[5] = floats_to_f16x2(x, y);
    out[6] = floats_to_bf16x2(x, y);
    out[7] = add_f16x2(in[2], in[3]);
    out[8] = add_bf16x2(in[2], in[3]);
    out[9] = fma_f16x2(in[2], in[3], in[4]);
    out[10] = fma_bf16x2(in[2], in[3], in[4]);
    out[11] = max_bf16x2(in[2] & 0x7fff7fffu, in[3] & 0x7fff7fffu);
    out[12] = __float_as_uint(reciprocal_approx(x));
#elif PROBE == 6  // cp.async of lane's chunk, or of zeros where in[32 * 4 + lane] is 0; in 160 words, out 4 words a lane
    cp_async_chunk(shared_address(storage + lane * 16), params.in + lane * 4, params.in[128 + lane] != 0);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) params.out[lane * 4 + i] = reinterpret_cast<u32*>(storage + lane * 16)[i];
#elif PROBE == 7  // places of a lane and of its block: in the blocks along x and y; out, of every lane of every block, 4 words
    const int place[3] = {block_index(), block_index_y(), block_index_z()};
    const int block = (place[2] * int(params.in[1]) + place[1]) * int(params.in[0]) + place[0];
    u32* out = params.out + (block * 32 + lane) * 4;
    out[0] = lane;
    for (int i = 0; i < 3; ++i) out[1 + i] = place[i];
#endif
}
