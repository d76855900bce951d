// What the parts of the emulated machine share: its state, the checks of memory, and how threads wait.
#pragma once
#include "machine.hpp"

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace machine {

typedef unsigned u32;
typedef std::uint64_t u64;
typedef std::uintptr_t address_t;

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBarriers = 64;       // mbarriers of a block
constexpr unsigned kNamedBarriers = 16;
constexpr unsigned kSharedWindow = 1024;    // where shared memory begins, as on Hopper: address 0 is nobody's

struct Failure {};

// What Python says of a launch. Valid bytes are a map, because an array may have gaps between its rows.
struct Region {
    address_t start;
    u64 bytes;
    const unsigned char* valid;  // per byte; null: all
    unsigned char* written;      // per byte; null: all of it has a value
    const char* name;
};
struct Global {
    Region region;
    std::unique_ptr<u32[]> writer;  // 1 + thread of the launch, per byte; 0: nobody in this launch
    std::unique_ptr<u32[]> when;    // at which moment of that thread
};

enum Counter { kMultiply, kLoadMatrix, kLoadMatrixConflicts, kCopyAsync, kBlockBarrier, kShuffle, kRead, kWrite };
struct Statistics {
    u64 instructions[8];  // see Counter
};

enum State { kReady, kAtInstruction, kAtBlockBarrier, kAtWarpBarrier, kAtNamedBarrier, kAtMbarrier, kDone };

struct Copy {
    u32 destination;
    const void* source;
    u32 bytes;
    bool valid;
};

struct Fiber {
    jmp_buf context;
    ucontext_t first;
    unsigned char* stack = nullptr;
    bool started = false;

    State state = kDone;
    const char* instruction = nullptr;  // what it waits for, in words
    WarpInstruction execute = nullptr;
    Operands operands = {};
    const char* file = nullptr;
    int line = 0;
    const void* caller = nullptr;
    u32 barrier = 0;  // number, or address, of what it waits at
    u32 parity = 0;
    u32 votes = 0;  // of the block, taken part in

    std::deque<std::vector<Copy>> groups;  // committed cp.async copies, oldest first
    std::vector<Copy> open;
};

// Who accessed a byte: a thread, or what works beside the threads and has a clock of its own (see Machine::warp_unit,
// copy_unit). A column of the clocks.
struct Write {
    u32 clock;  // 0: nobody
    u32 who;
};

typedef std::vector<u32> Clock;  // per column: the last moment that is known to be over

// What a thread of a block told at a counter in global memory: all that it knew of its block.
struct Told {
    u64 block;
    Clock known;
};
// That a thread of the running block learned at a counter, and when.
struct Learned {
    Write at;
    std::vector<Told> what;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    jmp_buf scheduler;
    unsigned running = 0;
    bool inside = false;  // whether a fiber runs
    bool failed = false;
    char report[4096] = {};
    const void* report_caller = nullptr;

    void (*kernel)(const void*) = nullptr;
    const void* parameters = nullptr;
    unsigned parameter_bytes = 0;
    unsigned threads = 0;
    u64 block = 0;
    u64 random = 1;
    Statistics statistics = {};

    address_t shared_start = 0, shared_bytes = 0;  // everything thread-local of the kernel's library
    address_t dynamic_start = 0, dynamic_bytes = 0, dynamic_limit = 0;
    std::vector<Global> globals;
    std::vector<std::pair<address_t, address_t>> constants;  // the library's own segments

    std::map<address_t, std::vector<Told>> told;  // in this launch, by counter
    std::vector<Learned> learned;                 // by threads of this block

    std::vector<Clock> clocks;     // of each thread
    std::vector<Write> writes;     // per byte of shared memory
    std::vector<u32> in_flight;    // per byte: 1 + who is writing it asynchronously
    u32* reads = nullptr;          // [thread or warp unit][byte]: clock of its last read
    size_t reads_bytes = 0;
    // A short cut: what threads read before the last barrier of the whole block is behind everybody.
    std::vector<u32> read_epochs;  // per byte: epoch of the last read by any thread
    bool votes[3] = {};            // of the whole block, one after another
    u32 epoch = 1;                 // barriers of the whole block, and blocks, so far

    u32 next() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return static_cast<u32>(random >> 16);
    }
    unsigned warps() const { return threads / kWarpLanes; }
    unsigned warp_unit(unsigned warp) const { return threads + warp; }  // the warpgroup products of a warp
    unsigned copy_unit(unsigned barrier) const { return threads + warps() + barrier; }  // copies that arrive at an mbarrier
    unsigned columns() const { return threads + warps() + kMaxBarriers; }
    unsigned readers() const { return threads + warps(); }
    u32* reads_of(unsigned who) { return reads + size_t(who) * shared_bytes; }
};
extern Machine m;

// Ends the launch. The first line says what; Python adds the source lines that `caller` belongs to.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const void* caller, const char* format, ...);
std::string place_of(unsigned who);

constexpr u32 kNeverOld = 0xffffffffu;  // an epoch for reads that barriers of the block say nothing about

// Checks an access to shared memory, and remembers it: by `who`, at that one's moment `clock`, on what `known` knows.
void check_shared(unsigned who, u32 clock, const Clock& known, address_t a, size_t bytes, bool write,
                  const void* caller, const char* how);
void check_global(unsigned thread, address_t a, size_t bytes, bool write, const void* caller, const char* how);
void check_atomic(unsigned thread, address_t a, size_t bytes, const void* caller, const char* how);

// The running thread stops until something makes it ready.
void yield();
void learn(Clock& clock, const Clock& of);
// The running thread lets `clock` know of all it did.
void release(Clock& clock);
// The running thread learns what others told at a counter, and tells what it knows.
void learn_and_tell(address_t counter);

inline address_t shared_pointer(u32 address) { return m.shared_start + (address - kSharedWindow); }
inline Fiber& running() { return *m.fibers[m.running]; }
// The running thread is the first of its warp when an instruction of the warp is executed.
inline unsigned first_of_warp() { return m.running / kWarpLanes * kWarpLanes; }
inline const void* caller_of(unsigned thread) { return m.fibers[thread]->caller; }

// Tensor cores keep products whole and cut the sum off where float32 ends.
float cut(double sum);
inline float bfloat_to_float(u32 bits) { return __builtin_bit_cast(float, bits << 16); }

// Parts of hopper.cpp that the scheduler calls.
void hopper_begin_block();
bool hopper_land_copy();          // lets one bulk copy that is under way land; false: there is none
void hopper_check_end(unsigned thread);  // when a thread returns
void hopper_end_block();

}  // namespace machine
