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
#include "core.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <link.h>
#include <sys/mman.h>

namespace machine {

Place place;
Machine m;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kMaxParameterBytes = 4096;  // what every driver takes

[[noreturn]] void to_scheduler_for_good() {
    m.failed = true;
    if (m.inside) {
        m.inside = false;
        _longjmp(m.scheduler, 1);
    }
    throw Failure();
}

}  // namespace

std::string place_of(unsigned who) {
    char text[112];
    const auto block = static_cast<unsigned long long>(m.block);
    if (who < m.threads) {
        snprintf(text, sizeof text, "thread %u (warp %u, lane %u) of block %llu", who, who / kWarpLanes,
                 who % kWarpLanes, block);
    } else if (who < m.copy_unit(0)) {
        snprintf(text, sizeof text, "a product of warp %u of block %llu", who - m.warp_unit(0), block);
    } else {
        snprintf(text, sizeof text, "a bulk copy of block %llu", block);
    }
    return text;
}

void fail(const void* caller, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(m.report, sizeof m.report, format, arguments);
    va_end(arguments);
    m.report_caller = caller;
    to_scheduler_for_good();
}

// ---- memory ----

static bool in_shared(address_t a, size_t bytes) {
    if (a < m.shared_start || a + bytes > m.shared_start + m.shared_bytes) return false;
    const address_t unused = m.dynamic_start + m.dynamic_bytes;
    return a + bytes <= unused || a >= m.dynamic_start + m.dynamic_limit;
}

void check_shared(unsigned who, u32 clock, const Clock& known, address_t a, size_t bytes, bool write,
                  const void* caller, const char* how) {
    if (!in_shared(a, bytes)) {
        fail(caller, "%s of %zu bytes outside shared memory: offset %lld of %llu, by %s", how, bytes,
             static_cast<long long>(a - m.dynamic_start), static_cast<unsigned long long>(m.dynamic_bytes),
             place_of(who).c_str());
    }
    const size_t first = a - m.shared_start;
    const long long offset = static_cast<long long>(a - m.dynamic_start);
    for (size_t i = first; i < first + bytes; ++i) {
        if (m.in_flight[i]) {
            fail(caller, "%s of shared memory at offset %lld, into which an asynchronous copy of %s has not landed, "
                         "by %s", how, offset, place_of(m.in_flight[i] - 1).c_str(), place_of(who).c_str());
        }
        const Write& last = m.writes[i];
        if (!last.clock) {
            if (!write) {
                fail(caller, "%s of shared memory at offset %lld that nothing wrote, by %s", how, offset,
                     place_of(who).c_str());
            }
        } else if (last.who != who && last.clock > known[last.who]) {
            fail(caller, "%s of shared memory at offset %lld by %s, and a write by %s that no barrier puts before it",
                 how, offset, place_of(who).c_str(), place_of(last.who).c_str());
        }
    }
    if (!write) {
        u32* mine = m.reads_of(who);
        for (size_t i = first; i < first + bytes; ++i) {
            mine[i] = clock;
            // Barriers of the block say nothing about what works beside the threads.
            if (m.read_epochs[i] != kNeverOld) m.read_epochs[i] = who < m.threads ? m.epoch : kNeverOld;
        }
        return;
    }
    bool recent = false;
    for (size_t i = first; i < first + bytes; ++i) recent |= m.read_epochs[i] >= m.epoch;
    for (unsigned other = 0; recent && other < m.readers(); ++other) {
        const u32* theirs = m.reads_of(other);
        u32 latest = 0;
        for (size_t i = first; i < first + bytes; ++i) latest = std::max(latest, theirs[i]);
        if (other != who && latest > known[other]) {
            fail(caller, "%s of shared memory at offset %lld by %s, and a read by %s that no barrier puts before it",
                 how, offset, place_of(who).c_str(), place_of(other).c_str());
        }
    }
    for (size_t i = first; i < first + bytes; ++i) m.writes[i] = {clock, who};
}

static bool all_set(const unsigned char* map, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
        if (!map[i]) return false;
    }
    return true;
}

// Whether a thread knows that a write is over, of a thread of its block or of one that finished earlier.
static bool is_over(unsigned thread, u32 writer, u32 when) {
    const u64 block = (writer - 1) / m.threads;
    const u32 who = (writer - 1) % m.threads;
    const Clock& known = m.clocks[thread];
    if (block == m.block) return when <= known[who];
    for (const Learned& learned : m.learned) {
        if (learned.at.clock > known[learned.at.who]) continue;
        for (const Told& told : learned.what) {
            if (told.block == block && when <= told.known[who]) return true;
        }
    }
    return false;
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
            if (!global.when) global.when.reset(new u32[region.bytes]());
            for (size_t i = first; i < first + bytes; ++i) {
                const u32 other = global.writer[i];
                // A block may use global memory like shared memory of its own.
                const bool apart = other && (other - 1) / m.threads != m.block;
                if (other && other != self && (apart || !is_over(thread, other, global.when[i]))) {
                    fail(caller, "%s to %s at byte %zu by %s, which thread %u of block %u wrote too in this launch",
                         how, region.name, i, place_of(thread).c_str(), (other - 1) % m.threads,
                         (other - 1) / m.threads);
                }
                global.writer[i] = self;
                global.when[i] = m.clocks[thread][thread];
            }
            if (region.written) memset(region.written + first, 1, bytes);
            return;
        }
        for (size_t i = first; i < first + bytes; ++i) {
            const u32 other = global.writer ? global.writer[i] : 0;
            if (other && other != static_cast<u32>(m.block * m.threads + thread + 1) &&
                !is_over(thread, other, global.when[i])) {
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
    u64 distance = 0;
    for (const Global& global : m.globals) {
        const Region& region = global.region;
        const u64 gap = a < region.start ? region.start - a : a - (region.start + region.bytes);
        if (!nearest || gap < distance) {
            nearest = &region;
            distance = gap;
        }
    }
    const long long byte = nearest ? static_cast<long long>(a - nearest->start) : 0;
    fail(caller, "%s of %zu bytes outside every array of the launch: byte %lld of %s, which has %llu, by %s", how,
         bytes, byte, nearest ? nearest->name : "nothing",
         static_cast<unsigned long long>(nearest ? nearest->bytes : 0), place_of(thread).c_str());
}

// Atomic operations of several threads do not disturb each other.
void check_atomic(unsigned thread, address_t a, size_t bytes, const void* caller, const char* how) {
    for (Global& global : m.globals) {
        const address_t start = global.region.start;
        if (!global.writer || a < start || a + bytes > start + global.region.bytes) continue;
        std::fill_n(global.writer.get() + (a - start), bytes, 0);
    }
    check_global(thread, a, bytes, false, caller, how);
}

static bool in_constants(address_t a, size_t bytes) {
    for (const auto& [start, end] : m.constants) {
        if (a >= start && a + bytes <= end) return true;
    }
    return false;
}

static void check_access(address_t a, size_t bytes, size_t alignment, bool write, const void* caller) {
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
        const Clock& known = m.clocks[m.running];
        check_shared(m.running, known[m.running], known, a, bytes, write, caller, how);
    } else if (write || !in_constants(a, bytes)) {
        check_global(m.running, a, bytes, write, caller, how);
    }
}

// ---- fibers ----

void yield() {
    Fiber& fiber = running();
    m.inside = false;
    if (!_setjmp(fiber.context)) _longjmp(m.scheduler, 1);
}

void learn(Clock& clock, const Clock& of) {
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], of[i]);
}

void release(Clock& clock) {
    Clock& own = m.clocks[m.running];
    learn(clock, own);
    ++own[m.running];
}

void learn_and_tell(address_t counter) {
    std::vector<Told>& told = m.told[counter];
    Clock& own = m.clocks[m.running];
    m.learned.push_back({{own[m.running], m.running}, told});
    told.push_back({m.block, own});
    ++own[m.running];
}

namespace {

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
        hopper_check_end(m.running);
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
    Clock known(m.columns(), 0);
    for (unsigned t = first; t < first + count; ++t) learn(known, m.clocks[t]);
    for (unsigned t = first; t < first + count; ++t) {
        m.clocks[t] = known;
        ++m.clocks[t][t];
    }
}

std::string waiting_for(const Fiber& fiber) {
    switch (fiber.state) {
        case kAtInstruction: return fiber.instruction;
        case kAtBlockBarrier: return "__syncthreads";
        case kAtWarpBarrier: return "__syncwarp";
        case kAtNamedBarrier: return "barrier " + std::to_string(fiber.barrier);
        case kAtMbarrier:
            return "parity " + std::to_string(fiber.parity) + " of the mbarrier at offset " +
                   std::to_string(static_cast<long long>(shared_pointer(fiber.barrier) - m.dynamic_start));
        case kDone: return "nothing: it has returned";
        default: return "nothing";
    }
}

// Whether a lane waits for all the others of its warp.
bool meets(const Fiber& fiber) { return fiber.state == kAtInstruction || fiber.state == kAtWarpBarrier; }

// Lets every lane of a warp run to its next meeting point, and executes what all of them have come for.
void step(unsigned warp) {
    const unsigned first = warp * kWarpLanes;
    const unsigned start = m.next() % kWarpLanes;
    const unsigned stride = m.next() | 1;
    for (unsigned i = 0; i < kWarpLanes; ++i) {
        const unsigned thread = first + (start + i * stride) % kWarpLanes;
        if (m.fibers[thread]->state == kReady) resume(thread);
        if (m.failed) throw Failure();
    }
    const Fiber* lead = nullptr;
    unsigned met = 0;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        const Fiber& fiber = *m.fibers[first + lane];
        if (meets(fiber)) {
            ++met;
            if (!lead) lead = &fiber;
        }
    }
    if (!lead) return;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        const Fiber& other = *m.fibers[first + lane];
        const bool same = other.state == lead->state &&
                          (lead->state != kAtInstruction || !strcmp(other.instruction, lead->instruction));
        // A lane at a barrier among warps may come later; one that waits for something else, or has returned, cannot.
        const bool comes = other.state == kReady || other.state == kAtMbarrier || other.state == kAtNamedBarrier;
        if (!same && !comes) {
            m.running = first + lane;
            fail(other.state == kDone ? lead->caller : other.caller,
                 "warp %u of block %llu has diverged: one lane waits for %s, lane %u for %s", warp,
                 static_cast<unsigned long long>(m.block), waiting_for(*lead).c_str(), lane,
                 waiting_for(other).c_str());
        }
    }
    if (met < kWarpLanes) return;
    if (lead->state == kAtInstruction) {
        Operands lanes[kWarpLanes];
        for (unsigned lane = 0; lane < kWarpLanes; ++lane) lanes[lane] = m.fibers[first + lane]->operands;
        m.running = first;
        lead->execute(lanes);
    } else {
        join(first, kWarpLanes);
    }
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) m.fibers[first + lane]->state = kReady;
}

// Nobody can go on. If that is because all wait at the barrier of the block, they go on; true if all have returned.
bool meet_at_barrier() {
    const Fiber* lead = nullptr;
    const Fiber* done = nullptr;
    for (unsigned t = 0; t < m.threads; ++t) {
        const Fiber& fiber = *m.fibers[t];
        if (fiber.state == kDone) {
            done = &fiber;
        } else if (fiber.state != kAtBlockBarrier) {
            fail(fiber.caller, "no thread of block %llu can go on: thread %u waits for %s",
                 static_cast<unsigned long long>(m.block), t, waiting_for(fiber).c_str());
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
    if (!lead) return true;
    ++m.statistics.instructions[kBlockBarrier];
    for (unsigned t = 0; t < m.threads; ++t) m.fibers[t]->state = kReady;
    return false;
}

bool is_ready(unsigned warp) {
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        if (m.fibers[warp * kWarpLanes + lane]->state == kReady) return true;
    }
    return false;
}

void run_block() {
    // A new block finds shared memory that nothing wrote; 0xff in every byte is NaN in every float.
    memset(reinterpret_cast<void*>(m.shared_start), 0xff, m.shared_bytes);
    std::fill(m.writes.begin(), m.writes.end(), Write{0, 0});
    std::fill(m.in_flight.begin(), m.in_flight.end(), 0);
    std::fill(m.read_epochs.begin(), m.read_epochs.end(), 0);
    std::fill(std::begin(m.votes), std::end(m.votes), false);
    m.learned.clear();
    hopper_begin_block();
    for (unsigned t = 0; t < m.threads; ++t) {
        Fiber& fiber = *m.fibers[t];
        fiber.state = kReady;
        fiber.votes = 0;
        fiber.groups.clear();
        fiber.open.clear();
    }
    std::vector<unsigned> ready;
    for (;;) {
        ready.clear();
        for (unsigned w = 0; w < m.warps(); ++w) {
            if (is_ready(w)) ready.push_back(w);
        }
        if (ready.empty()) {
            if (hopper_land_copy()) continue;
            if (meet_at_barrier()) break;
            continue;
        }
        if (m.next() % 8 == 0) hopper_land_copy();
        const unsigned warp = ready[m.next() % ready.size()];
        do {
            step(warp);
        } while (is_ready(warp) && m.next() % 8);
    }
    hopper_end_block();
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

// A vote is read before any thread can be two votes further.
int block_vote(bool mine, const char* file, int line) {
    Fiber& fiber = *m.fibers[m.running];
    const u32 vote = fiber.votes++ % 3;
    m.votes[vote] |= mine;
    block_barrier(file, line);
    const bool any = m.votes[vote];
    m.votes[(vote + 2) % 3] = false;
    return any;
}

void warp_barrier() {
    Fiber& fiber = *m.fibers[m.running];
    fiber.caller = __builtin_return_address(0);
    fiber.state = kAtWarpBarrier;
    yield();
}

}  // namespace machine

using namespace machine;

// ---- what Python calls ----

struct Launch {
    void (*kernel)(const void*);
    const void* parameters;
    unsigned char* dynamic_shared;
    u32 blocks[3];
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
        m.told.clear();
        for (u32 i = 0; i < launch->region_count; ++i) m.globals.push_back({launch->regions[i], nullptr});
        while (m.fibers.size() < m.threads) {
            m.fibers.push_back(std::make_unique<Fiber>());
            make_fiber(*m.fibers.back());
        }
        m.clocks.assign(m.threads, Clock(m.columns(), 0));
        for (unsigned t = 0; t < m.threads; ++t) m.clocks[t][t] = 1;
        m.writes.resize(m.shared_bytes);
        m.in_flight.resize(m.shared_bytes);
        m.read_epochs.assign(m.shared_bytes, 0);
        m.epoch = 1;
        m.reads_bytes = size_t(m.readers()) * m.shared_bytes * sizeof(u32);
        void* reads = mmap(nullptr, m.reads_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reads == MAP_FAILED) fail(nullptr, "the machine has no memory for what its threads read");
        m.reads = static_cast<u32*>(reads);
        place.block_size = {m.threads, 1, 1};
        const u32(&blocks)[3] = launch->blocks;
        place.grid_size = {blocks[0], blocks[1], blocks[2]};
        const u64 all = u64(blocks[0]) * blocks[1] * blocks[2];
        for (m.block = 0; m.block < all; ++m.block) {
            const u64 rest = m.block / blocks[0];
            place.block = {u32(m.block % blocks[0]), u32(rest % blocks[1]), u32(rest / blocks[1])};
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
