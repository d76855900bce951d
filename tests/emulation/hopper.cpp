// What Hopper adds to the machine: barriers in shared memory (mbarrier) and among some warps (bar), bulk copies of tiles
// (TMA), and products of a warpgroup (wgmma). All of it works beside the threads, which is where its faults lie:
//   - a bulk copy lands at some moment after it was started, when the scheduler lets it; whoever reads the tile must know
//     of that through the barrier at which its bytes arrive
//   - a product reads shared memory, and registers, from its start until a wait for its group; it is computed at that
//     wait, its accumulators are NaN until then, and what changes an operand in between is reported
//   - generic writes to shared memory reach products only through a fence of the writer (fence.proxy.async)
#include "core.hpp"

#include <algorithm>
#include <cstdlib>

namespace machine {

namespace {

struct Mbarrier {
    unsigned number;
    unsigned arrivals;   // of a phase
    unsigned pending;    // arrivals that are still to come in this phase
    long long bytes;     // that are still to come; negative if they came before they were announced
    unsigned phase;      // complete ones
    unsigned initialiser;
    bool fenced;
    Clock clock;         // what was done before the arrivals so far
    Clock complete;      // the same when the last phase was complete: what those who wait for it learn
};

struct NamedBarrier {
    int threads = 0;
    std::vector<unsigned> came;     // in this phase
    std::vector<unsigned> waiting;  // of those
};

constexpr int kMaxRank = 5;
struct Box {
    address_t array;
    unsigned element_bytes, swizzle;
    int rank;
    u64 lengths[kMaxRank], strides[kMaxRank];  // strides in bytes, the first is the element's
    unsigned box[kMaxRank];
};

struct BulkCopy {
    Box box;
    long long x[kMaxRank];
    u32 destination, bytes;
    u32 barrier;
};

struct Accumulator {
    std::vector<float*> registers;  // of each lane, tiles x 4
    int tiles;
    std::vector<float> value;       // [lane][tile * 4 + i]
    int uses;                       // products in flight
};

struct Pending {
    WarpgroupProduct product;
    std::vector<const unsigned*> a_registers;  // of each lane
    std::vector<unsigned> a_values;            // what they held
    std::shared_ptr<Accumulator> to;
};

struct Warpgroups {  // of one warp: its part in products
    bool fenced = false;
    std::vector<Pending> open;
    std::deque<std::vector<Pending>> groups;
    std::map<float*, std::shared_ptr<Accumulator>> in_flight;  // by the registers of lane 0
};

struct State {
    std::map<u32, Mbarrier> mbarriers;
    NamedBarrier named[kNamedBarriers];
    std::vector<BulkCopy> copies;
    std::vector<Warpgroups> warps;
    std::vector<std::vector<u32>> fences;  // per thread: its clock at each fence.proxy.async
    // These go on from block to block, as the clocks of threads do.
    std::vector<u32> warp_clocks;  // of the products of each warp
    u32 copy_clocks[kMaxBarriers]; // of the copies that arrive at each mbarrier
};
State state;

constexpr u64 kMapMagic = 0x70616d726f736e74;  // begins a tensor map of fake_cupy.py
constexpr float kInFlight = __builtin_nanf("0x25a5a5");

u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }

long long offset_of(u32 address) { return static_cast<long long>(shared_pointer(address) - m.dynamic_start); }

Mbarrier& mbarrier_at(u32 address, const void* caller) {
    const auto found = state.mbarriers.find(address);
    if (found == state.mbarriers.end()) {
        fail(caller, "the mbarrier at offset %lld is used, and was never initialised, by %s", offset_of(address),
             place_of(m.running).c_str());
    }
    // Its initialisation must be known here, as that of any other memory.
    const Clock& known = m.clocks[m.running];
    check_shared(m.running, known[m.running], known, shared_pointer(address), 8, false, caller, "use of an mbarrier");
    return found->second;
}

// What happens at a barrier when an arrival or bytes have come.
void advance(u32 address, Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.complete = barrier.clock;
    barrier.pending = barrier.arrivals;
    for (unsigned t = 0; t < m.threads; ++t) {
        Fiber& fiber = *m.fibers[t];
        if (fiber.state == kAtMbarrier && fiber.barrier == address) fiber.state = kReady;
    }
}

void arrive(u32 address, Mbarrier& barrier, const void* caller) {
    if (!barrier.pending) {
        fail(caller, "one arrival too many at the mbarrier at offset %lld, which takes %u in a phase, by %s",
             offset_of(address), barrier.arrivals, place_of(m.running).c_str());
    }
    release(barrier.clock);
    --barrier.pending;
    advance(address, barrier);
}

// Bits of the swizzle: a 16-byte chunk's number within its row is combined with the row's number.
u32 swizzled(u32 address, unsigned swizzle) {  // 1: rows of 32 bytes, 2: 64, 3: 128
    const u32 mask = (1u << swizzle) - 1;
    return address ^ (address >> 7 & mask) << 4;
}

Box decode_map(const void* map, const void* caller) {
    u64 word[16];
    memcpy(word, map, sizeof word);
    if (word[0] != kMapMagic) fail(caller, "a copy by something that is no tensor map, by %s", place_of(m.running).c_str());
    Box box = {};
    box.array = word[1];
    box.element_bytes = word[2] & 0xff;
    box.rank = word[2] >> 8 & 0xff;
    box.swizzle = word[2] >> 16 & 0xff;
    box.strides[0] = box.element_bytes;
    for (int i = 0; i < box.rank; ++i) {
        box.lengths[i] = word[3 + i];
        if (i) box.strides[i] = word[7 + i];
        box.box[i] = word[12] >> 12 * i & 0xfff;
    }
    return box;
}

// Calls row(global address or 0, bytes inside the array, place in the box) for every row of a box.
template <class Row>
void each_row(const BulkCopy& copy, Row row) {
    const Box& box = copy.box;
    unsigned rows = 1;
    for (int i = 1; i < box.rank; ++i) rows *= box.box[i];
    for (unsigned r = 0; r < rows; ++r) {
        unsigned rest = r;
        bool inside = true;
        address_t from = box.array;
        for (int i = 1; i < box.rank; ++i) {
            const long long at = copy.x[i] + rest % box.box[i];
            rest /= box.box[i];
            inside &= at >= 0 && static_cast<u64>(at) < box.lengths[i];
            from += static_cast<u64>(at) * box.strides[i];
        }
        const long long first = std::max(0ll, copy.x[0]);
        const long long last = std::min(static_cast<long long>(box.lengths[0]), copy.x[0] + box.box[0]);
        const bool some = inside && first < last;
        row(some ? from + first * box.element_bytes : 0,
            some ? static_cast<size_t>(last - first) * box.element_bytes : 0,
            static_cast<size_t>(r) * box.box[0] * box.element_bytes + (some ? (first - copy.x[0]) * box.element_bytes : 0));
    }
}

void land(const BulkCopy& copy) {
    Mbarrier& barrier = state.mbarriers.at(copy.barrier);
    const unsigned who = m.copy_unit(barrier.number);
    std::vector<unsigned char> data(copy.bytes, 0);
    each_row(copy, [&](address_t from, size_t bytes, size_t at) {
        if (bytes) memcpy(&data[at], reinterpret_cast<const void*>(from), bytes);
    });
    const u32 clock = barrier.clock[who] = ++state.copy_clocks[barrier.number];
    for (u32 chunk = 0; chunk < copy.bytes; chunk += 16) {
        const size_t first = shared_pointer(swizzled(copy.destination + chunk, copy.box.swizzle)) - m.shared_start;
        memcpy(reinterpret_cast<void*>(m.shared_start + first), &data[chunk], 16);
        for (size_t i = first; i < first + 16; ++i) {
            m.in_flight[i] = 0;
            m.writes[i] = {clock, who};
        }
    }
    barrier.bytes -= copy.bytes;
    advance(copy.barrier, barrier);
}

// Where an element of an operand lies. Along columns: rows of the matrix are rows of memory, the sum runs along them.
struct Operand {
    u32 start, leading, stride;
    unsigned swizzle, width;
};
Operand decode_operand(u64 descriptor, const void* caller) {
    const unsigned layout = descriptor >> 62;
    if (layout == 0 || (descriptor >> 49 & 7)) {
        fail(caller, "a descriptor without a swizzle, or with a base offset: not emulated");
    }
    const unsigned swizzle = 4 - layout;  // 1 is 128 bytes, 2 is 64, 3 is 32
    return {static_cast<u32>(descriptor & 0x3fff) << 4, static_cast<u32>(descriptor >> 16 & 0x3fff) << 4,
            static_cast<u32>(descriptor >> 32 & 0x3fff) << 4, swizzle, 16u << swizzle};
}
u32 row_of(const Operand& o, unsigned row) { return o.start + row / 8 * o.stride + row % 8 * o.width; }

struct Reader {
    unsigned warp, thread;
    u32 clock;
    const void* caller;

    // 16 bytes, as a product reads them: what it knows of memory is what the warp that started it knows.
    const unsigned short* chunk(u32 address) const {
        const address_t a = shared_pointer(address);
        const Clock& known = m.clocks[thread];
        check_shared(m.warp_unit(warp), clock, known, a, 16, false, caller, "wgmma");
        for (size_t i = a - m.shared_start, end = i + 16; i < end; i += 2) {
            const Write& write = m.writes[i];
            if (write.who >= m.threads) continue;
            const std::vector<u32>& fences = state.fences[write.who];
            const auto after = std::upper_bound(fences.begin(), fences.end(), write.clock - 1);
            if (after == fences.end() || (write.who != thread && *after > known[write.who])) {
                fail(caller, "wgmma of shared memory at offset %lld, which %s wrote without a fence.proxy.async after",
                     static_cast<long long>(a - m.dynamic_start), place_of(write.who).c_str());
            }
        }
        return reinterpret_cast<const unsigned short*>(a);
    }
};

float element(unsigned short bits, bool bfloat) { return bfloat ? bfloat_to_float(bits) : half_to_float(bits); }

// b as [n][k]. It may lie with n along the rows of memory, and k down.
void read_b(const Reader& reader, const WarpgroupProduct& p, float (*b)[16], int columns) {
    const Operand o = decode_operand(p.b, reader.caller);
    if (!p.down) {
        for (int n = 0; n < columns; ++n) {
            for (int half = 0; half < 2; ++half) {
                const unsigned short* chunk = reader.chunk(swizzled(row_of(o, n) + half * 16, o.swizzle));
                for (int i = 0; i < 8; ++i) b[n][half * 8 + i] = element(chunk[i], p.bfloat);
            }
        }
        return;
    }
    const int panel = static_cast<int>(o.width / 2);
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; n += 8) {
            const u32 address = row_of(o, k) + n / panel * o.leading + n % panel * 2;
            const unsigned short* chunk = reader.chunk(swizzled(address, o.swizzle));
            for (int i = 0; i < 8; ++i) b[n + i][k] = element(chunk[i], p.bfloat);
        }
    }
}

// The sixteen rows of a that belong to this warp of the four.
void read_a(const Reader& reader, const Pending& pending, float (*a)[16]) {
    const WarpgroupProduct& p = pending.product;
    if (!p.a_registers) {
        const Operand o = decode_operand(p.a, reader.caller);
        for (int r = 0; r < 16; ++r) {
            for (int half = 0; half < 2; ++half) {
                const u32 address = row_of(o, reader.warp % 4 * 16 + r) + half * 16;
                const unsigned short* chunk = reader.chunk(swizzled(address, o.swizzle));
                for (int i = 0; i < 8; ++i) a[r][half * 8 + i] = element(chunk[i], p.bfloat);
            }
        }
        return;
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const unsigned word = pending.a_values[lane * 4 + i];
            float* row = a[lane / 4 + i % 2 * 8] + i / 2 * 8 + lane % 4 * 2;
            row[0] = element(static_cast<unsigned short>(word), p.bfloat);
            row[1] = element(static_cast<unsigned short>(word >> 16), p.bfloat);
        }
    }
}

void compute(const Reader& reader, const Pending& pending) {
    const WarpgroupProduct& p = pending.product;
    const int columns = p.tiles * 8;
    static float a[16][16], b[256][16];
    read_a(reader, pending, a);
    read_b(reader, p, b, columns);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        float* value = &pending.to->value[size_t(lane) * p.tiles * 4];
        for (int tile = 0; tile < p.tiles; ++tile) {
            for (int i = 0; i < 4; ++i) {
                const float* left = a[lane / 4 + i / 2 * 8];
                const float* right = b[tile * 8 + lane % 4 * 2 + i % 2];
                double sums[4] = {};
                for (int k = 0; k < 16; k += 4) {
                    for (int j = 0; j < 4; ++j) sums[j] += static_cast<double>(left[k + j]) * right[k + j];
                }
                float& d = value[tile * 4 + i];
                d = cut((p.accumulate ? d : 0.0) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
            }
        }
    }
}

void complete(unsigned warp, Pending& pending) {
    Warpgroups& of = state.warps[warp];
    const unsigned first = warp * kWarpLanes;
    const void* caller = caller_of(first);
    for (size_t lane = 0; lane < pending.a_registers.size(); ++lane) {
        if (memcmp(pending.a_registers[lane], &pending.a_values[lane * 4], 16)) {
            fail(caller, "an operand in registers changed while a product read it, by %s", place_of(first + lane).c_str());
        }
    }
    compute({warp, first, state.warp_clocks[warp], caller}, pending);
    Accumulator& to = *pending.to;
    if (--to.uses) return;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
        for (int i = 0; i < to.tiles * 4; ++i) {
            float& d = to.registers[lane][i];
            if (bits_of(d) != bits_of(kInFlight)) {
                fail(caller, "an accumulator was written while a product was in flight, by %s", place_of(first + lane).c_str());
            }
            d = to.value[size_t(lane) * to.tiles * 4 + i];
        }
    }
    of.in_flight.erase(to.registers[0]);
}

}  // namespace

void hopper_begin_block() {
    state.mbarriers.clear();
    for (NamedBarrier& barrier : state.named) barrier = {};
    state.copies.clear();
    state.warps.assign(m.warps(), {});
    if (m.block == 0) {
        state.warp_clocks.assign(m.warps(), 0);
        std::fill(state.copy_clocks, state.copy_clocks + kMaxBarriers, 0);
    }
    state.fences.assign(m.threads, {});
}

bool hopper_land_copy() {
    if (state.copies.empty()) return false;
    const size_t which = m.next() % state.copies.size();
    const BulkCopy copy = state.copies[which];
    state.copies.erase(state.copies.begin() + static_cast<long>(which));
    land(copy);
    return true;
}

void hopper_check_end(unsigned thread) {
    const Warpgroups& of = state.warps[thread / kWarpLanes];
    if (!of.open.empty() || !of.in_flight.empty()) {
        fail(running().caller, "%s ended before its products were complete", place_of(thread).c_str());
    }
}

void hopper_end_block() {
    if (!state.copies.empty()) fail(nullptr, "block %llu ended before its bulk copies landed", static_cast<unsigned long long>(m.block));
}

void mbarrier_init(unsigned barrier, unsigned arrivals) {
    const void* caller = __builtin_return_address(0);
    if (barrier % 8 || arrivals == 0 || arrivals >= 1u << 20) {
        fail(caller, "an mbarrier of %u arrivals at address %u: 1 to 2**20 - 1, at a multiple of 8", arrivals, barrier);
    }
    const Clock& known = m.clocks[m.running];
    check_shared(m.running, known[m.running], known, shared_pointer(barrier), 8, true, caller, "mbarrier.init");
    const unsigned number = static_cast<unsigned>(state.mbarriers.size());
    if (number == kMaxBarriers || state.mbarriers.count(barrier)) {
        fail(caller, "the mbarrier at offset %lld is initialised twice, or is more than the machine has (%u)",
             offset_of(barrier), kMaxBarriers);
    }
    const Clock nothing(m.columns(), 0);
    state.mbarriers.emplace(barrier, Mbarrier{number, arrivals, arrivals, 0, 0, m.running, false, nothing, nothing});
}

void mbarrier_init_fence() {
    for (auto& [address, barrier] : state.mbarriers) barrier.fenced |= barrier.initialiser == m.running;
}

void mbarrier_arrive(unsigned barrier) {
    const void* caller = __builtin_return_address(0);
    arrive(barrier, mbarrier_at(barrier, caller), caller);
}

void mbarrier_expect(unsigned barrier, unsigned bytes) {
    const void* caller = __builtin_return_address(0);
    Mbarrier& at = mbarrier_at(barrier, caller);
    at.bytes += bytes;
    arrive(barrier, at, caller);
}

bool mbarrier_wait(unsigned barrier, unsigned parity) {
    const void* caller = __builtin_return_address(0);
    Mbarrier& at = mbarrier_at(barrier, caller);
    if ((at.phase & 1) == (parity & 1)) {  // the phase of this parity is under way
        Fiber& fiber = running();
        fiber.barrier = barrier;
        fiber.parity = parity;
        fiber.caller = caller;
        fiber.state = kAtMbarrier;
        yield();
        if ((at.phase & 1) == (parity & 1)) return false;
    }
    learn(m.clocks[m.running], at.complete);
    return true;
}

void named_barrier(int number, int threads, bool wait) {
    const void* caller = __builtin_return_address(0);
    if (number < 0 || number >= static_cast<int>(kNamedBarriers) || threads <= 0 || threads % kWarpLanes) {
        fail(caller, "barrier %d of %d threads: numbers go from 0 to 15, and whole warps meet", number, threads);
    }
    NamedBarrier& barrier = state.named[number];
    if (barrier.came.empty()) barrier.threads = threads;
    if (barrier.threads != threads) {
        fail(caller, "barrier %d of %d threads, which others come to as one of %d, by %s", number, threads,
             barrier.threads, place_of(m.running).c_str());
    }
    if (std::find(barrier.came.begin(), barrier.came.end(), m.running) != barrier.came.end()) {
        fail(caller, "barrier %d is reached a second time, before all have come once, by %s", number,
             place_of(m.running).c_str());
    }
    Fiber& fiber = running();
    fiber.caller = caller;
    barrier.came.push_back(m.running);
    if (wait) barrier.waiting.push_back(m.running);
    if (static_cast<int>(barrier.came.size()) == threads) {
        Clock known(m.columns(), 0);
        for (const unsigned t : barrier.came) {
            learn(known, m.clocks[t]);
            ++m.clocks[t][t];
        }
        for (const unsigned t : barrier.waiting) {
            learn(m.clocks[t], known);
            m.fibers[t]->state = kReady;
        }
        barrier = {};
    } else if (wait) {
        fiber.barrier = static_cast<u32>(number);
        fiber.state = kAtNamedBarrier;
        yield();
    }
}

void async_proxy_fence() {
    u32& own = m.clocks[m.running][m.running];
    state.fences[m.running].push_back(own);
    ++own;
}

void copy_box(unsigned destination, const void* map, unsigned barrier, const int* x, int rank) {
    const void* caller = __builtin_return_address(0);
    BulkCopy copy = {decode_map(map, caller), {}, destination, 0, barrier};
    const Box& box = copy.box;
    Mbarrier& at = mbarrier_at(barrier, caller);
    if (!at.fenced) {
        fail(caller, "a bulk copy arrives at the mbarrier at offset %lld, after whose initialisation there was no "
                     "fence.mbarrier_init", offset_of(barrier));
    }
    if (rank != box.rank) fail(caller, "a copy of %d axes by a map of %d", rank, box.rank);
    copy.bytes = box.element_bytes;
    for (int i = 0; i < rank; ++i) {
        copy.x[i] = x[i];
        copy.bytes *= box.box[i];
    }
    if (destination % 128) fail(caller, "a bulk copy to an address that is not a multiple of 128");
    // The copy engine of an H100 ends the kernel with an illegal instruction.
    if (copy.x[0] * box.element_bytes % 16) fail(caller, "a bulk copy whose columns do not start at a multiple of 16 bytes");
    each_row(copy, [&](address_t from, size_t bytes, size_t) {
        if (bytes) check_global(m.running, from, bytes, false, caller, "a bulk copy");
    });
    const unsigned who = m.copy_unit(at.number);
    const Clock& known = m.clocks[m.running];
    for (u32 chunk = 0; chunk < copy.bytes; chunk += 16) {
        const address_t to = shared_pointer(swizzled(destination + chunk, box.swizzle));
        check_shared(who, state.copy_clocks[at.number] + 1, known, to, 16, true, caller, "a bulk copy");
        memset(reinterpret_cast<void*>(to), 0xff, 16);
        for (int i = 0; i < 16; ++i) m.in_flight[to - m.shared_start + i] = who + 1;
    }
    ++m.statistics.instructions[kCopyAsync];
    state.copies.push_back(copy);
}

int atomic_add(int* counter, int value) {
    check_atomic(m.running, reinterpret_cast<address_t>(counter), sizeof *counter, __builtin_return_address(0), "atom.add");
    const int before = *counter;
    *counter += value;
    return before;
}
int atomic_add_in_order(int* counter, int value) {
    learn_and_tell(reinterpret_cast<address_t>(counter));
    return atomic_add(counter, value);
}

void warpgroup_multiply(Operands (&lanes)[kWarpLanes]) {
    const unsigned warp = m.running / kWarpLanes;
    const unsigned first = first_of_warp();
    const void* caller = caller_of(first);
    Warpgroups& of = state.warps[warp];
    ++m.statistics.instructions[kMultiply];
    const auto in = [&](unsigned lane) { return static_cast<const WarpgroupProduct*>(lanes[lane].in); };
    const WarpgroupProduct& p = *in(0);
    if (!of.fenced) fail(caller, "wgmma without a wgmma.fence since the last wait, by %s", place_of(first).c_str());
    Pending pending = {p, {}, {}, nullptr};
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        if (in(lane)->a != p.a || in(lane)->b != p.b || in(lane)->tiles != p.tiles) {
            fail(caller, "lanes of warp %u start different products", warp);
        }
        if (p.a_registers) {
            pending.a_registers.push_back(in(lane)->a_registers);
            pending.a_values.insert(pending.a_values.end(), in(lane)->a_registers, in(lane)->a_registers + 4);
        }
    }
    std::shared_ptr<Accumulator>& to = of.in_flight[p.d];
    if (!to) {
        to = std::make_shared<Accumulator>();
        to->tiles = p.tiles;
        to->uses = 0;
        for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
            float* d = in(lane)->d;
            to->registers.push_back(d);
            to->value.insert(to->value.end(), d, d + p.tiles * 4);
            std::fill(d, d + p.tiles * 4, kInFlight);
        }
    }
    ++to->uses;
    pending.to = to;
    // What it may read from now on must be there now.
    static float scratch[256][16];
    const Reader reader = {warp, first, ++state.warp_clocks[warp], caller};
    read_a(reader, pending, scratch);
    read_b(reader, p, scratch, p.tiles * 8);
    of.open.push_back(std::move(pending));
}

void warpgroup_fence(Operands (&)[kWarpLanes]) { state.warps[m.running / kWarpLanes].fenced = true; }

void warpgroup_commit(Operands (&)[kWarpLanes]) {
    Warpgroups& of = state.warps[m.running / kWarpLanes];
    of.groups.push_back(std::move(of.open));
    of.open.clear();
}

void warpgroup_wait(Operands (&lanes)[kWarpLanes]) {
    const unsigned warp = m.running / kWarpLanes;
    const unsigned first = first_of_warp();
    Warpgroups& of = state.warps[warp];
    const size_t left = static_cast<size_t>(*static_cast<const int*>(lanes[0].in));
    while (of.groups.size() > left) {
        const u32 clock = ++state.warp_clocks[warp];
        for (Pending& pending : of.groups.front()) complete(warp, pending);
        of.groups.pop_front();
        for (unsigned lane = 0; lane < kWarpLanes; ++lane) m.clocks[first + lane][m.warp_unit(warp)] = clock;
    }
    of.fenced = of.groups.size() > 0 && of.fenced;
}

}  // namespace machine
