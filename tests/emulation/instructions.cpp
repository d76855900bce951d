// Instructions that a warp executes together, copies by cp.async, and conversions. What they do is what PTX says; the
// checks are those of core.hpp.
#include "core.hpp"

#include <algorithm>
#include <cmath>

namespace machine {

float cut(double sum) {
    const float nearest = static_cast<float>(sum);
    if (!(std::abs(static_cast<double>(nearest)) > std::abs(sum)) || __builtin_isinf(nearest)) return nearest;
    u32 bits;
    memcpy(&bits, &nearest, 4);
    --bits;
    float below;
    memcpy(&below, &bits, 4);
    return below;
}

namespace {

void load_matrices_as(Operands (&lanes)[kWarpLanes], bool transposed, const char* how) {
    const unsigned first = first_of_warp();
    ++m.statistics.instructions[kLoadMatrix];
    unsigned short element[4][8][8];
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned rows_in_bank[8] = {};
        unsigned most = 0;
        for (unsigned row = 0; row < 8; ++row) {
            const unsigned lane = matrix * 8 + row;
            const u32 address = *static_cast<const u32*>(lanes[lane].in);
            if (address % 16) {
                fail(caller_of(first + lane), "%s of a row at an address that is not a multiple of 16, by %s", how,
                     place_of(first + lane).c_str());
            }
            const address_t pointer = shared_pointer(address);
            const Clock& known = m.clocks[first + lane];
            check_shared(first + lane, known[first + lane], known, pointer, 16, false, caller_of(first + lane), how);
            memcpy(element[matrix][row], reinterpret_cast<const void*>(pointer), 16);
            bool again = false;  // of one address there is one read
            for (unsigned other = 0; other < row; ++other) {
                again = again || *static_cast<const u32*>(lanes[matrix * 8 + other].in) == address;
            }
            if (!again) most = std::max(most, ++rows_in_bank[address / 16 % 8]);
        }
        m.statistics.instructions[kLoadMatrixConflicts] += most - 1;
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        u32* out = static_cast<u32*>(lanes[lane].out);
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            const unsigned row = lane / 4, column = lane % 4 * 2;
            const auto& of = element[matrix];
            const u32 low = transposed ? of[column][row] : of[row][column];
            const u32 high = transposed ? of[column + 1][row] : of[row][column + 1];
            out[matrix] = high << 16 | low;
        }
    }
}

template <int kDepth, class Decode>
void multiply(Operands (&lanes)[kWarpLanes], Decode decode) {
    ++m.statistics.instructions[kMultiply];
    float a[16][kDepth], b[8][kDepth];
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        const Product& p = *static_cast<const Product*>(lanes[lane].in);
        const unsigned row = lane / 4, column = lane % 4;
        for (unsigned i = 0; i < 4; ++i) decode(p.a[i], &a[row + i % 2 * 8][0], column, i / 2);
        for (unsigned i = 0; i < 2; ++i) decode(p.b[i], &b[row][0], column, i);
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        const Product& p = *static_cast<const Product*>(lanes[lane].in);
        float* out = static_cast<float*>(lanes[lane].out);
        for (unsigned i = 0; i < 4; ++i) {
            const float* left = a[lane / 4 + i / 2 * 8];
            const float* right = b[lane % 4 * 2 + i % 2];
            double sums[4] = {};  // as wide as the host's vectors; double holds the products of a step whole
            for (int k = 0; k < kDepth; k += 4) {
                for (int j = 0; j < 4; ++j) sums[j] += static_cast<double>(left[k + j]) * right[k + j];
            }
            out[i] = cut(p.c[i] + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
        }
    }
}

}  // namespace

unsigned shared_address(const void* pointer) {
    const address_t a = reinterpret_cast<address_t>(pointer);
    if (a - m.shared_start > m.shared_bytes) {
        fail(__builtin_return_address(0), "the address of something that is not in shared memory, by %s",
             place_of(m.running).c_str());
    }
    return static_cast<unsigned>(a - m.shared_start) + kSharedWindow;
}

void copy_async(unsigned destination, const void* source, unsigned bytes, bool valid) {
    const void* caller = __builtin_return_address(0);
    ++m.statistics.instructions[kCopyAsync];
    const address_t to = shared_pointer(destination);
    const address_t from = reinterpret_cast<address_t>(source);
    if (destination % bytes || (valid && from % bytes)) {
        fail(caller, "cp.async of %u bytes %s an address that is not a multiple of %u, by %s", bytes,
             destination % bytes ? "to" : "from", bytes, place_of(m.running).c_str());
    }
    if (valid) check_global(m.running, from, bytes, false, caller, "cp.async");
    const Clock& known = m.clocks[m.running];
    check_shared(m.running, known[m.running], known, to, bytes, true, caller, "cp.async");
    // Until it lands, what stood there is gone and what will stand there has not come.
    memset(reinterpret_cast<void*>(to), 0xff, bytes);
    for (unsigned i = 0; i < bytes; ++i) m.in_flight[to - m.shared_start + i] = m.running + 1;
    running().open.push_back({destination, source, bytes, valid});
}

void copy_commit() {
    Fiber& fiber = running();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void copy_wait(int pending) {
    Fiber& fiber = running();
    while (fiber.groups.size() > static_cast<size_t>(pending)) {
        for (const Copy& copy : fiber.groups.front()) {
            const size_t first = shared_pointer(copy.destination) - m.shared_start;
            void* to = reinterpret_cast<void*>(m.shared_start + first);
            if (copy.valid) {
                memcpy(to, copy.source, copy.bytes);
            } else {
                memset(to, 0, copy.bytes);
            }
            for (size_t i = first; i < first + copy.bytes; ++i) {
                m.in_flight[i] = 0;
                m.writes[i] = {m.clocks[m.running][m.running], m.running};
            }
        }
        fiber.groups.pop_front();
    }
}

namespace {

template <class From>
void shuffle(Operands (&lanes)[kWarpLanes], From from) {
    ++m.statistics.instructions[kShuffle];
    const auto in = [&](unsigned lane) { return static_cast<const u32*>(lanes[lane % kWarpLanes].in); };
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        *static_cast<u32*>(lanes[lane].out) = in(from(lane, in(lane)[1]))[0];
    }
}

}  // namespace

void shuffle_xor(Operands (&lanes)[kWarpLanes]) {
    shuffle(lanes, [](unsigned lane, u32 mask) { return lane ^ mask; });
}
void shuffle_index(Operands (&lanes)[kWarpLanes]) {
    shuffle(lanes, [](unsigned, u32 index) { return index; });
}

void vote_any(Operands (&lanes)[kWarpLanes]) {
    int any = 0;
    for (const Operands& lane : lanes) any |= *static_cast<const int*>(lane.in) != 0;
    for (const Operands& lane : lanes) *static_cast<int*>(lane.out) = any;
}

void vote_ballot(Operands (&lanes)[kWarpLanes]) {
    u32 votes = 0;
    for (unsigned i = 0; i < kWarpLanes; ++i) votes |= (*static_cast<const int*>(lanes[i].in) != 0 ? 1u : 0u) << i;
    for (const Operands& lane : lanes) *static_cast<u32*>(lane.out) = votes;
}

void load_matrices(Operands (&lanes)[kWarpLanes]) { load_matrices_as(lanes, false, "ldmatrix"); }
void load_matrices_transposed(Operands (&lanes)[kWarpLanes]) { load_matrices_as(lanes, true, "ldmatrix.trans"); }

// 16-bit operands hold two neighbouring terms of the sum, the second half of the depth in the later registers.
void multiply_f16(Operands (&lanes)[kWarpLanes]) {
    multiply<16>(lanes, [](u32 bits, float* row, unsigned column, unsigned half) {
        row[half * 8 + column * 2] = half_to_float(static_cast<unsigned short>(bits));
        row[half * 8 + column * 2 + 1] = half_to_float(static_cast<unsigned short>(bits >> 16));
    });
}
void multiply_bf16(Operands (&lanes)[kWarpLanes]) {
    multiply<16>(lanes, [](u32 bits, float* row, unsigned column, unsigned half) {
        row[half * 8 + column * 2] = bfloat_to_float(bits & 0xffff);
        row[half * 8 + column * 2 + 1] = bfloat_to_float(bits >> 16);
    });
}
void multiply_tf32(Operands (&lanes)[kWarpLanes]) {
    multiply<8>(lanes, [](u32 bits, float* row, unsigned column, unsigned half) {
        bits &= 0xffffe000u;  // all that the tensor cores read
        float x;
        memcpy(&x, &bits, 4);
        row[half * 4 + column] = x;
    });
}

float half_to_float(unsigned short bits) {
    const u32 sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    float x;
    if (exponent == 0) {
        x = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -x : x;
    }
    const u32 out = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&x, &out, 4);
    return x;
}

unsigned short float_to_half(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7fff;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (bits < 0x38800000u) {                        // below the smallest normal number: a multiple of 2**-24
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return sign | static_cast<unsigned short>(__builtin_rintf(magnitude * 0x1p24f));
    }
    const u32 rounded = bits + 0xfffu + (bits >> 13 & 1);
    return sign | static_cast<unsigned short>((rounded - 0x38000000u) >> 13);
}

unsigned short float_to_bfloat(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace machine
