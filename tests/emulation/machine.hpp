// What a kernel sees of the emulated machine: CUDA's qualifiers and built-ins for a C++ compiler, and the calls into
// machine.cpp behind them. Included before every kernel; small, because every kernel variant is parsed with it.
#pragma once

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// At block scope this implies static, and 'extern' may stand before it: the two ways to declare shared memory. The
// machine runs one thread block at a time on one thread of the host, so thread-local memory is the block's memory.
#define __shared__ thread_local

namespace machine {

struct Index {
    unsigned x, y, z;
};
// Of the running thread; the scheduler sets them when it switches.
struct Place {
    Index thread, block, block_size, grid_size;
};
extern Place place;

// One lane's part in an instruction that a whole warp executes together.
struct Operands {
    const void* in;
    void* out;
};
constexpr int kWarpLanes = 32;
typedef void (*WarpInstruction)(Operands (&lanes)[kWarpLanes]);

// Waits until all lanes of the warp have come with the same instruction, which is then executed once for all.
void together(const char* name, WarpInstruction execute, const void* in, void* out);
// Waits for all threads of the block; they must come from one line of one file.
void block_barrier(const char* file, int line);
int block_vote(bool mine, const char* file, int line);
void warp_barrier();

unsigned shared_address(const void* pointer);
void copy_async(unsigned destination, const void* source, unsigned bytes, bool valid);
void copy_commit();
void copy_wait(int pending);

// WarpInstructions. Operands as the twins in ptx/ fill them.
void shuffle_xor(Operands (&lanes)[kWarpLanes]);    // in {value, mask}, out value
void shuffle_index(Operands (&lanes)[kWarpLanes]);  // in {value, lane}, out value
void vote_any(Operands (&lanes)[kWarpLanes]);       // in, out int
void vote_ballot(Operands (&lanes)[kWarpLanes]);    // in int, out unsigned
void load_matrices(Operands (&lanes)[kWarpLanes]);  // in address, out u32[4]
void load_matrices_transposed(Operands (&lanes)[kWarpLanes]);
struct Product {
    float c[4];
    unsigned a[4];
    unsigned b[2];
};
void multiply_f16(Operands (&lanes)[kWarpLanes]);  // in Product, out float[4]
void multiply_bf16(Operands (&lanes)[kWarpLanes]);
void multiply_tf32(Operands (&lanes)[kWarpLanes]);

// Hopper: barriers in shared memory and by number, bulk copies, products of a warpgroup. See hopper.cpp.
void mbarrier_init(unsigned barrier, unsigned arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(unsigned barrier);
void mbarrier_expect(unsigned barrier, unsigned bytes);
bool mbarrier_wait(unsigned barrier, unsigned parity);
void named_barrier(int barrier, int threads, bool wait);
void async_proxy_fence();
void copy_box(unsigned destination, const void* map, unsigned barrier, const int* x, int rank);
int atomic_add(int* counter, int value);
int atomic_add_in_order(int* counter, int value);
struct WarpgroupProduct {
    float* d;  // tiles x 4
    int tiles;
    const unsigned* a_registers;  // null: a lies in shared memory
    unsigned long long a, b;      // descriptors
    bool down;                    // the sum's axis of b, instead of along the rows of memory
    bool accumulate;
    bool bfloat;
};
void warpgroup_multiply(Operands (&lanes)[kWarpLanes]);  // in WarpgroupProduct
void warpgroup_fence(Operands (&lanes)[kWarpLanes]);
void warpgroup_commit(Operands (&lanes)[kWarpLanes]);
void warpgroup_wait(Operands (&lanes)[kWarpLanes]);  // in int pending

float half_to_float(unsigned short bits);
unsigned short float_to_half(float x);
unsigned short float_to_bfloat(float x);

}  // namespace machine

#define threadIdx (::machine::place.thread)
#define blockIdx (::machine::place.block)
#define blockDim (::machine::place.block_size)
#define gridDim (::machine::place.grid_size)
#define __syncthreads() ::machine::block_barrier(__FILE__, __LINE__)
#define __syncthreads_or(x) ::machine::block_vote(x, __FILE__, __LINE__)
#define __syncwarp() ::machine::warp_barrier()

extern "C" {
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fabsf(float) noexcept;
float logf(float) noexcept;
float expf(float) noexcept;
float sqrtf(float) noexcept;
float tanhf(float) noexcept;
float sqrtf(float) noexcept;
double exp2(double) noexcept;
}

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
// Kernels are compiled with -ffp-contract=off: these are what they say.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }

// Shuffles take any type of four bytes.
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    const unsigned in[2] = {__builtin_bit_cast(unsigned, value), static_cast<unsigned>(mask)};
    unsigned out;
    ::machine::together("__shfl_xor_sync", ::machine::shuffle_xor, in, &out);
    return __builtin_bit_cast(T, out);
}
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
    const unsigned in[2] = {__builtin_bit_cast(unsigned, value), static_cast<unsigned>(lane)};
    unsigned out;
    ::machine::together("__shfl_sync", ::machine::shuffle_index, in, &out);
    return __builtin_bit_cast(T, out);
}
inline int __any_sync(unsigned, int predicate) {
    int out;
    ::machine::together("__any_sync", ::machine::vote_any, &predicate, &out);
    return out;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned out;
    ::machine::together("__ballot_sync", ::machine::vote_ballot, &predicate, &out);
    return out;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// Stands at the end of a kernel's translation unit: how machine.cpp calls the kernel and finds its shared memory.
namespace machine {
template <class Params>
struct Entry {
    static constexpr unsigned kBytes = sizeof(Params);
    static_assert(alignof(Params) <= 128, "the machine aligns parameters to 128 bytes");
    static void run(void (*kernel)(Params), const void* bytes) {
        kernel(*static_cast<const Params*>(bytes));
    }
};
template <class Params>
Entry<Params> entry_of(void (*)(Params));
}  // namespace machine

#define MACHINE_KERNEL(kernel, dynamic_shared, dynamic_limit)                                  \
    extern "C" {                                                                               \
    typedef decltype(::machine::entry_of(kernel)) MachineEntry;                                \
    unsigned machine_parameter_bytes() { return MachineEntry::kBytes; }                        \
    void machine_run(const void* parameters) { MachineEntry::run(kernel, parameters); }        \
    unsigned char* machine_dynamic_shared() { return dynamic_shared; }                         \
    unsigned machine_dynamic_limit() { return dynamic_limit; }                                 \
    }
