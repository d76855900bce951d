// The machine that kernels_cu runs on in tests: a GPU's thread blocks on one host thread, one after another.
//
// The threads of a block are fibers. A kernel is compiled with -fsanitize=thread, but not linked with that sanitizer's
// runtime: the calls that it puts before every memory access end here. So every access of a kernel is checked before it
// happens, against what the launch handed out and against what the other threads of the block did:
//   - outside every array of the launch, outside shared memory, or not aligned to its size
//   - a read of shared memory, or of fresh global memory, that nothing wrote
//   - shared memory that an asynchronous copy is still writing
//   - two accesses, one of them a write, that no barrier orders (vector clocks, as in a race detector)
// The last is found in any order of execution; the order of warps and lanes is permuted by a seed nevertheless, so that
// results can be compared.
#include "machine.hpp"

#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <link.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace machine {

Place place;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kSharedWindow = 1u << 24;  // where shared memory begins: a stray 32-bit number is no address in it
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxParameterBytes = 4096;  // what every driver takes

typedef unsigned u32;
typedef std::uint64_t u64;
typedef std::uintptr_t address_t;

struct Failure {};

// What Python says of a launch. Valid bytes are a map, because an array may have gaps between its rows.
struct Region {
    address_t start;
    u64 bytes;
    const unsigned char* valid;  // per byte; null: all
    unsigned char* written;      // per byte; null: all of it has a value
    const char* name;
};

struct Statistics {
    u64 instructions[8];  // see Counter
};
enum Counter { kMultiply, kLoadMatrix, kLoadMatrixConflicts, kCopyAsync, kBlockBarrier, kShuffle, kRead, kWrite };

enum State { kReady, kAtInstruction, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
    u32 destination;
    const void* source;
    bool valid;
};

struct Fiber {
    jmp_buf context;
    ucontext_t first;
    unsigned char* stack = nullptr;
    bool started = false;

    State state = kDone;
    const char* instruction = nullptr;
    WarpInstruction execute = nullptr;
    Operands operands = {};
    const char* file = nullptr;
    int line = 0;
    const void* caller = nullptr;

    std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
    std::vector<Copy> open;
};

struct Write {
    u32 clock;  // 0: nobody
    u32 thread;
};

struct Global {
    Region region;
    std::unique_ptr<u32[]> writer;  // 1 + thread of the launch, per byte; 0: nobody in this launch
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    jmp_buf scheduler;
    ucontext_t scheduler_first;
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

    // Vector clocks: clocks[t][u] is the last moment of thread u that thread t knows to be over.
    std::vector<u32> clocks;
    std::vector<Write> writes;        // per byte of shared memory
    std::vector<u32> in_flight;       // per byte: 1 + thread whose asynchronous copy has not landed
    u32* reads = nullptr;             // [thread][byte]: clock of its last read
    size_t reads_bytes = 0;
    // A short cut: what was read before the last barrier of the whole block is behind everybody.
    std::vector<u32> read_epochs;  // per byte: epoch of the last read by any thread
    u32 epoch = 1;                 // barriers of the whole block, and blocks, so far

    u32& clock(unsigned of, unsigned at) { return clocks[size_t(of) * threads + at]; }
    u32 next() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        return static_cast<u32>(random >> 16);
    }
};
Machine m;

[[noreturn]] void to_scheduler_for_good() {
    m.failed = true;
    if (m.inside) {
        m.inside = false;
        _longjmp(m.scheduler, 1);
    }
    throw Failure();
}

std::string place_of(unsigned thread) {
    char text[96];
    snprintf(text, sizeof text, "thread %u (warp %u, lane %u) of block %llu", thread, thread / kWarpLanes,
             thread % kWarpLanes, static_cast<unsigned long long>(m.block));
    return text;
}

// Ends the launch. The first line says what; Python adds the source lines that `caller` belongs to.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const void* caller, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(m.report, sizeof m.report, format, arguments);
    va_end(arguments);
    m.report_caller = caller;
    to_scheduler_for_good();
}

// ---- memory ----

bool in_shared(address_t a, size_t bytes) {
    if (a < m.shared_start || a + bytes > m.shared_start + m.shared_bytes) return false;
    const address_t unused = m.dynamic_start + m.dynamic_bytes;
    return a + bytes <= unused || a >= m.dynamic_start + m.dynamic_limit;
}

void check_shared(unsigned thread, address_t a, size_t bytes, bool write, const void* caller, const char* how) {
    if (!in_shared(a, bytes)) {
        fail(caller, "%s of %zu bytes outside shared memory: offset %lld of %llu, by %s", how, bytes,
             static_cast<long long>(a - m.dynamic_start), static_cast<unsigned long long>(m.dynamic_bytes),
             place_of(thread).c_str());
    }
    const size_t first = a - m.shared_start;
    const long long offset = static_cast<long long>(a - m.dynamic_start);
    const u32* known = &m.clocks[size_t(thread) * m.threads];
    for (size_t i = first; i < first + bytes; ++i) {
        if (m.in_flight[i]) {
            fail(caller, "%s of shared memory at offset %lld, into which the asynchronous copy of %s has not landed, "
                         "by %s", how, offset, place_of(m.in_flight[i] - 1).c_str(), place_of(thread).c_str());
        }
        const Write& last = m.writes[i];
        if (!last.clock) {
            if (!write) {
                fail(caller, "%s of shared memory at offset %lld that nothing wrote, by %s", how, offset,
                     place_of(thread).c_str());
            }
        } else if (last.thread != thread && last.clock > known[last.thread]) {
            fail(caller, "%s of shared memory at offset %lld by %s, and a write by %s that no barrier puts before it",
                 how, offset, place_of(thread).c_str(), place_of(last.thread).c_str());
        }
    }
    if (!write) {
        u32* mine = m.reads + size_t(thread) * m.shared_bytes;
        for (size_t i = first; i < first + bytes; ++i) {
            mine[i] = known[thread];
            m.read_epochs[i] = m.epoch;
        }
        return;
    }
    bool recent = false;
    for (size_t i = first; i < first + bytes; ++i) recent |= m.read_epochs[i] == m.epoch;
    for (unsigned other = 0; recent && other < m.threads; ++other) {
        const u32* theirs = m.reads + size_t(other) * m.shared_bytes;
        u32 latest = 0;
        for (size_t i = first; i < first + bytes; ++i) latest = theirs[i] > latest ? theirs[i] : latest;
        if (other != thread && latest > known[other]) {
            fail(caller, "%s of shared memory at offset %lld by %s, and a read by %s that no barrier puts before it",
                 how, offset, place_of(thread).c_str(), place_of(other).c_str());
        }
    }
    for (size_t i = first; i < first + bytes; ++i) m.writes[i] = {known[thread], thread};
}

bool all_set(const unsigned char* map, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
        if (!map[i]) return false;
    }
    return true;
}

void check_global(unsigned thread, address_t a, size_t bytes, bool write, const void* caller, const char* how) {
    Global* near = nullptr;
    for (Global& global : m.globals) {
        const Region& region = global.region;
        if (a < region.start || a + bytes > region.start + region.bytes) {
            if (a + bytes > region.start && a < region.start + region.bytes) near = &global;
            continue;
        }
        const size_t first = a - region.start;
        near = &global;
        if (region.valid && !all_set(region.valid + first, bytes)) continue;
        if (write) {
            const u32 self = static_cast<u32>(m.block * m.threads + thread + 1);
            if (!global.writer) global.writer.reset(new u32[region.bytes]());
            for (size_t i = first; i < first + bytes; ++i) {
                const u32 other = global.writer[i];
                if (other && other != self) {
                    fail(caller, "%s to %s at byte %zu by %s, which thread %u of block %u wrote too in this launch",
                         how, region.name, i, place_of(thread).c_str(), (other - 1) % m.threads,
                         (other - 1) / m.threads);
                }
                global.writer[i] = self;
            }
            if (region.written) memset(region.written + first, 1, bytes);
            return;
        }
        for (size_t i = first; i < first + bytes; ++i) {
            const u32 other = global.writer ? global.writer[i] : 0;
            if (other && other != static_cast<u32>(m.block * m.threads + thread + 1)) {
                fail(caller, "%s of %s at byte %zu by %s, which thread %u of block %u writes in this launch", how,
                     region.name, i, place_of(thread).c_str(), (other - 1) % m.threads, (other - 1) / m.threads);
            }
        }
        if (region.written && !all_set(region.written + first, bytes)) {
            fail(caller, "%s of %s at byte %zu, which nothing wrote, by %s", how, region.name, first,
                 place_of(thread).c_str());
        }
        return;
    }
    if (near) {
        fail(caller, "%s of %zu bytes outside %s: byte %lld of %llu, or between its rows, by %s", how, bytes,
             near->region.name, static_cast<long long>(a - near->region.start),
             static_cast<unsigned long long>(near->region.bytes), place_of(thread).c_str());
    }
    // The nearest array says most about an address that lies in none.
    const Region* nearest = nullptr;
    long long distance = 0;
    for (const Global& global : m.globals) {
        const long long d = static_cast<long long>(a - global.region.start);
        if (!nearest || (d < 0 ? -d : d) < (distance < 0 ? -distance : distance)) {
            nearest = &global.region;
            distance = d;
        }
    }
    fail(caller, "%s of %zu bytes outside every array of the launch: byte %lld of %s, which has %llu, by %s", how,
         bytes, distance, nearest ? nearest->name : "nothing",
         static_cast<unsigned long long>(nearest ? nearest->bytes : 0), place_of(thread).c_str());
}

bool in_constants(address_t a, size_t bytes) {
    for (const auto& [start, end] : m.constants) {
        if (a >= start && a + bytes <= end) return true;
    }
    return false;
}

void check_access(address_t a, size_t bytes, size_t alignment, bool write, const void* caller) {
    if (!m.inside) return;
    const address_t stack = reinterpret_cast<address_t>(m.fibers[m.running]->stack);
    if (a - stack < kStackBytes || (!write && a - reinterpret_cast<address_t>(&place) < sizeof place)) return;
    ++m.statistics.instructions[write ? kWrite : kRead];
    const char* how = write ? "write" : "read";
    if (a % alignment) {
        fail(caller, "%s of %zu bytes at an address that is not a multiple of %zu, by %s", how, bytes, alignment,
             place_of(m.running).c_str());
    }
    if (a - m.shared_start < m.shared_bytes) {
        check_shared(m.running, a, bytes, write, caller, how);
    } else if (write || !in_constants(a, bytes)) {
        check_global(m.running, a, bytes, write, caller, how);
    }
}

// ---- fibers ----

void yield() {
    Fiber& fiber = *m.fibers[m.running];
    m.inside = false;
    if (!_setjmp(fiber.context)) _longjmp(m.scheduler, 1);
}

void fiber_main() {
    for (;;) {
        alignas(128) unsigned char parameters[kMaxParameterBytes];
        memcpy(parameters, m.parameters, m.parameter_bytes);
        m.kernel(parameters);
        Fiber& fiber = *m.fibers[m.running];
        for (const auto& group : fiber.groups) {
            if (!group.empty()) fail(fiber.caller, "%s ended before its copies landed", place_of(m.running).c_str());
        }
        if (!fiber.open.empty()) fail(fiber.caller, "%s never committed a copy", place_of(m.running).c_str());
        fiber.state = kDone;
        yield();
    }
}

void resume(unsigned thread) {
    Fiber& fiber = *m.fibers[thread];
    m.running = thread;
    place.thread = {thread, 0, 0};
    if (_setjmp(m.scheduler)) return;  // back from the fiber
    m.inside = true;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.first);
}

void make_fiber(Fiber& fiber) {
    if (!fiber.stack) {
        void* memory = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail(nullptr, "the machine has no memory for the stacks of its threads");
        mprotect(memory, 4096, PROT_NONE);  // an overflow ends the process rather than another thread's data
        fiber.stack = static_cast<unsigned char*>(memory) + 4096;
    }
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack;
    fiber.first.uc_stack.ss_size = kStackBytes;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, fiber_main, 0);
    fiber.started = false;
    fiber.state = kDone;
}

// All of the threads know from now on what each of them did.
void join(unsigned first, unsigned count) {
    std::vector<u32> known(m.threads, 0);
    for (unsigned t = first; t < first + count; ++t) {
        for (unsigned u = 0; u < m.threads; ++u) known[u] = std::max(known[u], m.clock(t, u));
    }
    for (unsigned t = first; t < first + count; ++t) {
        memcpy(&m.clock(t, 0), known.data(), known.size() * sizeof(u32));
        ++m.clock(t, t);
    }
}

const char* waiting_for(const Fiber& fiber) {
    switch (fiber.state) {
        case kAtInstruction: return fiber.instruction;
        case kAtBlockBarrier: return "__syncthreads";
        case kAtWarpBarrier: return "__syncwarp";
        case kDone: return "nothing: it has returned";
        default: return "nothing";
    }
}

// Lets every lane of a warp run to its next meeting point, and executes what they meet for.
void step(unsigned warp) {
    const unsigned first = warp * kWarpLanes;
    const unsigned start = m.next() % kWarpLanes;
    const unsigned stride = m.next() | 1;
    for (unsigned i = 0; i < kWarpLanes; ++i) {
        const unsigned thread = first + (start + i * stride) % kWarpLanes;
        if (m.fibers[thread]->state == kReady) resume(thread);
        if (m.failed) throw Failure();
    }
    const Fiber& lead = *m.fibers[first];
    for (unsigned lane = 1; lane < kWarpLanes; ++lane) {
        const Fiber& other = *m.fibers[first + lane];
        const bool same = other.state == lead.state &&
                          (lead.state != kAtInstruction || !strcmp(other.instruction, lead.instruction));
        if (!same) {
            m.running = first + lane;
            fail(other.state == kDone ? lead.caller : other.caller,
                 "warp %u of block %llu has diverged: lane 0 waits for %s, lane %u for %s", warp,
                 static_cast<unsigned long long>(m.block), waiting_for(lead), lane, waiting_for(other));
        }
    }
    if (lead.state == kAtInstruction) {
        Operands lanes[kWarpLanes];
        for (unsigned lane = 0; lane < kWarpLanes; ++lane) lanes[lane] = m.fibers[first + lane]->operands;
        m.running = first;
        lead.execute(lanes);
    } else if (lead.state == kAtWarpBarrier) {
        join(first, kWarpLanes);
    } else {
        return;  // at the barrier of the block, or done
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) m.fibers[first + lane]->state = kReady;
}

void meet_at_barrier() {
    const Fiber* lead = nullptr;
    const Fiber* done = nullptr;
    for (unsigned t = 0; t < m.threads; ++t) {
        const Fiber& fiber = *m.fibers[t];
        if (fiber.state == kDone) {
            done = &fiber;
        } else if (!lead) {
            lead = &fiber;
        } else if (strcmp(fiber.file, lead->file) || fiber.line != lead->line) {
            fail(fiber.caller, "threads of block %llu wait at different barriers: line %d and line %d",
                 static_cast<unsigned long long>(m.block), lead->line, fiber.line);
        }
    }
    if (lead && done) {
        fail(lead->caller, "some threads of block %llu wait at a barrier, and others have returned",
             static_cast<unsigned long long>(m.block));
    }
    join(0, m.threads);
    ++m.epoch;
    if (lead) {
        ++m.statistics.instructions[kBlockBarrier];
        for (unsigned t = 0; t < m.threads; ++t) m.fibers[t]->state = kReady;
    }
}

void run_block() {
    // A new block finds shared memory that nothing wrote; 0xff in every byte is NaN in every float.
    memset(reinterpret_cast<void*>(m.shared_start), 0xff, m.shared_bytes);
    std::fill(m.writes.begin(), m.writes.end(), Write{0, 0});
    std::fill(m.in_flight.begin(), m.in_flight.end(), 0);
    for (unsigned t = 0; t < m.threads; ++t) {
        Fiber& fiber = *m.fibers[t];
        fiber.state = kReady;
        fiber.groups.clear();
        fiber.open.clear();
    }
    const unsigned warps = m.threads / kWarpLanes;
    std::vector<unsigned> ready;
    for (;;) {
        ready.clear();
        for (unsigned w = 0; w < warps; ++w) {
            if (m.fibers[w * kWarpLanes]->state == kReady) ready.push_back(w);
        }
        if (ready.empty()) {
            meet_at_barrier();
            if (m.fibers[0]->state == kDone) return;
            continue;
        }
        const unsigned warp = ready[m.next() % ready.size()];
        do {
            step(warp);
        } while (m.fibers[warp * kWarpLanes]->state == kReady && m.next() % 8);
    }
}

// The kernel's library keeps shared memory thread-local, and its constants in its own segments.
struct Library {
    const void* inside;
    bool found;
};
int find_library(dl_phdr_info* info, size_t, void* data) {
    Library& library = *static_cast<Library*>(data);
    const address_t wanted = reinterpret_cast<address_t>(library.inside);
    bool here = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        const address_t start = info->dlpi_addr + segment.p_vaddr;
        here |= segment.p_type == PT_LOAD && wanted >= start && wanted < start + segment.p_memsz;
    }
    if (!here) return 0;
    library.found = true;
    m.constants.clear();
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        const address_t start = info->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD) m.constants.push_back({start, start + segment.p_memsz});
        if (segment.p_type == PT_TLS) {
            m.shared_start = reinterpret_cast<address_t>(info->dlpi_tls_data);
            m.shared_bytes = segment.p_memsz;
        }
    }
    return 1;
}

// ---- instructions ----

void* shared_pointer(u32 address) { return reinterpret_cast<void*>(m.shared_start + (address - kSharedWindow)); }

const Fiber& lane_of_warp(unsigned lane) { return *m.fibers[m.running / kWarpLanes * kWarpLanes + lane]; }

void load_matrices_as(Operands (&lanes)[kWarpLanes], bool transposed, const char* how) {
    const unsigned first = m.running / kWarpLanes * kWarpLanes;
    ++m.statistics.instructions[kLoadMatrix];
    unsigned short element[4][8][8];
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned rows_in_bank[8] = {};
        unsigned most = 0;
        for (unsigned row = 0; row < 8; ++row) {
            const unsigned lane = matrix * 8 + row;
            const u32 address = *static_cast<const u32*>(lanes[lane].in);
            if (address % 16) {
                fail(lane_of_warp(lane).caller, "%s of a row at an address that is not a multiple of 16, by %s", how,
                     place_of(first + lane).c_str());
            }
            const address_t pointer = reinterpret_cast<address_t>(shared_pointer(address));
            check_shared(first + lane, pointer, 16, false, lane_of_warp(lane).caller, how);
            memcpy(element[matrix][row], reinterpret_cast<const void*>(pointer), 16);
            most = std::max(most, ++rows_in_bank[address / 16 % 8]);
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

// Tensor cores keep products whole and cut the sum off where float32 ends.
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

float bfloat_to_float(u32 bits) {
    bits <<= 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

void together(const char* name, WarpInstruction execute, const void* in, void* out) {
    Fiber& fiber = *m.fibers[m.running];
    fiber.instruction = name;
    fiber.execute = execute;
    fiber.operands = {in, out};
    fiber.caller = __builtin_return_address(0);
    fiber.state = kAtInstruction;
    yield();
}

void block_barrier(const char* file, int line) {
    Fiber& fiber = *m.fibers[m.running];
    fiber.file = file;
    fiber.line = line;
    fiber.caller = __builtin_return_address(0);
    fiber.state = kAtBlockBarrier;
    yield();
}

void warp_barrier() {
    Fiber& fiber = *m.fibers[m.running];
    fiber.caller = __builtin_return_address(0);
    fiber.state = kAtWarpBarrier;
    yield();
}

unsigned shared_address(const void* pointer) {
    const address_t a = reinterpret_cast<address_t>(pointer);
    if (a - m.shared_start > m.shared_bytes) {
        fail(__builtin_return_address(0), "the address of something that is not in shared memory, by %s",
             place_of(m.running).c_str());
    }
    return static_cast<unsigned>(a - m.shared_start) + kSharedWindow;
}

void copy_async(unsigned destination, const void* source, bool valid) {
    const void* caller = __builtin_return_address(0);
    ++m.statistics.instructions[kCopyAsync];
    const address_t to = reinterpret_cast<address_t>(shared_pointer(destination));
    const address_t from = reinterpret_cast<address_t>(source);
    if (destination % 16 || (valid && from % 16)) {
        fail(caller, "cp.async of 16 bytes %s an address that is not a multiple of 16, by %s",
             destination % 16 ? "to" : "from", place_of(m.running).c_str());
    }
    if (valid) check_global(m.running, from, 16, false, caller, "cp.async");
    check_shared(m.running, to, 16, true, caller, "cp.async");
    // Until it lands, what stood there is gone and what will stand there has not come.
    memset(reinterpret_cast<void*>(to), 0xff, 16);
    for (int i = 0; i < 16; ++i) m.in_flight[to - m.shared_start + i] = m.running + 1;
    m.fibers[m.running]->open.push_back({destination, source, valid});
}

void copy_commit() {
    Fiber& fiber = *m.fibers[m.running];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void copy_wait(int pending) {
    Fiber& fiber = *m.fibers[m.running];
    while (fiber.groups.size() > static_cast<size_t>(pending)) {
        for (const Copy& copy : fiber.groups.front()) {
            unsigned char* to = static_cast<unsigned char*>(shared_pointer(copy.destination));
            const size_t first = reinterpret_cast<address_t>(to) - m.shared_start;
            if (copy.valid) {
                memcpy(to, copy.source, 16);
            } else {
                memset(to, 0, 16);
            }
            for (size_t i = first; i < first + 16; ++i) {
                m.in_flight[i] = 0;
                m.writes[i] = {m.clock(m.running, m.running), m.running};
            }
        }
        fiber.groups.pop_front();
    }
}

void shuffle_xor(Operands (&lanes)[kWarpLanes]) {
    ++m.statistics.instructions[kShuffle];
    struct In {
        float value;
        int mask;
    };
    const auto in = [&](unsigned lane) { return static_cast<const In*>(lanes[lane].in); };
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        *static_cast<float*>(lanes[lane].out) = in(lane ^ static_cast<unsigned>(in(lane)->mask))->value;
    }
}

void vote_any(Operands (&lanes)[kWarpLanes]) {
    int any = 0;
    for (const Operands& lane : lanes) any |= *static_cast<const int*>(lane.in) != 0;
    for (const Operands& lane : lanes) *static_cast<int*>(lane.out) = any;
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

using namespace machine;

// ---- what Python calls ----

struct Launch {
    void (*kernel)(const void*);
    const void* parameters;
    unsigned char* dynamic_shared;
    u64 blocks;
    u64 seed;
    const Region* regions;
    u32 region_count;
    u32 threads;
    u32 dynamic_bytes;
    u32 dynamic_limit;
    u32 parameter_bytes;
};

// 0: all went well; 1: report says what did not.
extern "C" int machine_launch(const Launch* launch) {
    m.failed = m.inside = false;
    m.report[0] = 0;
    m.report_caller = nullptr;
    m.statistics = {};
    m.kernel = launch->kernel;
    m.parameters = launch->parameters;
    m.random = launch->seed * 0x9e3779b97f4a7c15ull + 1;
    m.block = 0;
    int result = 1;
    try {
        m.threads = launch->threads;
        if (m.threads == 0 || m.threads > kMaxThreads || m.threads % kWarpLanes) {
            fail(nullptr, "a launch of %u threads: the machine runs whole warps, at most %u threads", m.threads,
                 kMaxThreads);
        }
        m.parameter_bytes = launch->parameter_bytes;
        if (m.parameter_bytes > kMaxParameterBytes) {
            fail(nullptr, "%u bytes of parameters, at most %u are passed", m.parameter_bytes, kMaxParameterBytes);
        }
        Library library = {reinterpret_cast<const void*>(launch->kernel), false};
        dl_iterate_phdr(find_library, &library);
        if (!library.found || !m.shared_start) fail(nullptr, "the kernel's library cannot be found in memory");
        m.dynamic_start = reinterpret_cast<address_t>(launch->dynamic_shared);
        m.dynamic_bytes = launch->dynamic_bytes;
        m.dynamic_limit = launch->dynamic_limit;
        if (m.dynamic_bytes > m.dynamic_limit) {
            fail(nullptr, "a launch with %u bytes of shared memory: the machine has %u", launch->dynamic_bytes,
                 launch->dynamic_limit);
        }
        m.globals.clear();
        for (u32 i = 0; i < launch->region_count; ++i) m.globals.push_back({launch->regions[i], nullptr});
        while (m.fibers.size() < m.threads) {
            m.fibers.push_back(std::make_unique<Fiber>());
            make_fiber(*m.fibers.back());
        }
        m.clocks.assign(size_t(m.threads) * m.threads, 0);
        for (unsigned t = 0; t < m.threads; ++t) m.clock(t, t) = 1;
        m.writes.resize(m.shared_bytes);
        m.in_flight.resize(m.shared_bytes);
        m.read_epochs.assign(m.shared_bytes, 0);
        m.epoch = 1;
        m.reads_bytes = size_t(m.threads) * m.shared_bytes * sizeof(u32);
        void* reads = mmap(nullptr, m.reads_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reads == MAP_FAILED) fail(nullptr, "the machine has no memory for what its threads read");
        m.reads = static_cast<u32*>(reads);
        place.block_size = {m.threads, 1, 1};
        place.grid_size = {static_cast<unsigned>(launch->blocks), 1, 1};
        for (m.block = 0; m.block < launch->blocks; ++m.block) {
            place.block = {static_cast<unsigned>(m.block), 0, 0};
            run_block();
        }
        result = 0;
    } catch (const Failure&) {
        // The fibers stand somewhere inside the kernel, with nothing to clean up: begin them anew.
        for (auto& fiber : m.fibers) make_fiber(*fiber);
    }
    m.inside = false;
    if (m.reads) munmap(m.reads, m.reads_bytes);
    m.reads = nullptr;
    return result;
}

extern "C" const char* machine_report() { return m.report; }
extern "C" const void* machine_report_caller() { return m.report_caller; }
extern "C" const u64* machine_statistics() { return m.statistics.instructions; }

// ---- what the compiler calls before a kernel touches memory ----

#define CALLER __builtin_return_address(0)
#define ACCESS(bytes)                                                                                              \
    extern "C" void __tsan_read##bytes(void* p) { check_access(address_t(p), bytes, bytes, false, CALLER); }       \
    extern "C" void __tsan_write##bytes(void* p) { check_access(address_t(p), bytes, bytes, true, CALLER); }       \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { check_access(address_t(p), bytes, 1, false, CALLER); } \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { check_access(address_t(p), bytes, 1, true, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { check_access(address_t(p), bytes, 1, false, CALLER); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { check_access(address_t(p), bytes, 1, true, CALLER); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

// ---- what the compiler calls where C++ leaves the behaviour undefined (-fsanitize=undefined) ----

struct SourceLocation {
    const char* file;
    u32 line, column;
};
struct TypeMismatch {
    SourceLocation where;
    const void* type;
    unsigned char log_alignment, kind;
};
[[noreturn]] static void undefined(const char* what, const void* data, const void* caller) {
    const auto& where = *static_cast<const SourceLocation*>(data);
    fail(caller, "%s at %s:%u, by %s", what, where.file, where.line, place_of(m.running).c_str());
}
extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, address_t pointer) {
    if (pointer % (1ull << data->log_alignment) == 0) undefined("an access through a null pointer", data, CALLER);
    char text[96];
    snprintf(text, sizeof text, "an access at an address that is not a multiple of %llu",
             1ull << data->log_alignment);
    undefined(text, data, CALLER);
}
#define UNDEFINED(name, what) \
    extern "C" void __ubsan_handle_##name(void* data, ...) { undefined(what, data, CALLER); }
UNDEFINED(out_of_bounds, "an index outside its array")
UNDEFINED(shift_out_of_bounds, "a shift by more bits than there are")
UNDEFINED(add_overflow, "a sum that overflows")
UNDEFINED(sub_overflow, "a difference that overflows")
UNDEFINED(mul_overflow, "a product that overflows")
UNDEFINED(negate_overflow, "a negation that overflows")
UNDEFINED(divrem_overflow, "a division by zero, or one that overflows")
