// Tiles in shared memory as the copy engine writes them and warpgroup products read them, and rings of such tiles.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "ptx/tma.cuh"

// kRows x kColumns elements of 16 bits, cut into panels of 128, 64 or 32 bytes of columns: the widest that divides a
// row. A panel holds its rows one below the other, and the 16-byte chunks of a row are permuted (swizzled) with the
// row, so that eight rows of one chunk lie in eight different bank groups.
template <class T, int kRows_, int kColumns_>
struct PanelTile {
    static constexpr int kRows = kRows_;
    static constexpr int kColumns = kColumns_;
    static constexpr int kRowBytes = kColumns * int(sizeof(T));
    static constexpr int kWidth = kRowBytes % 128 == 0 ? 128 : kRowBytes % 64 == 0 ? 64 : 32;  // bytes of a panel's row
    static constexpr int kPanelColumns = kWidth / int(sizeof(T));
    static constexpr int kPanels = kRowBytes / kWidth;
    static constexpr int kPanelBytes = kRows * kWidth;
    static constexpr int kBytes = kPanels * kPanelBytes;
    static_assert(sizeof(T) == 2 && kRowBytes % 32 == 0, "PanelTile: 16-bit elements, columns in multiples of 16");
    static_assert(kRows % 8 == 0 && kRows <= 256, "PanelTile: swizzles repeat every 8 rows; a copy has at most 256");
    alignas(1024) T data[kRows * kColumns];  // where the swizzle begins anew

    // One element, where the swizzle has put it.
    DEVICE const T& at(int row, int column) const {
        const int chunk = column % kPanelColumns / 8 ^ row / (128 / kWidth) % (kWidth / 16);
        return data[column / kPanelColumns * (kRows * kPanelColumns) + row * kPanelColumns + chunk * 8 + column % 8];
    }

    // Bytes of the panels that hold the first columns of a row.
    static DEVICE u32 bytes(int columns) { return u32((columns + kPanelColumns - 1) / kPanelColumns * kPanelBytes); }

    // Copies the rows that start at a row of the map, those panels of them that hold the first columns, to where the
    // tile has row to_row, a multiple of 8; of a map whose boxes have all rows, bytes(columns) will arrive at the barrier.
    // One thread.
    DEVICE void load(const TensorMap* map, u32 barrier, int row, int head, int batch, u64 policy, int columns = kColumns,
                     int to_row = 0) {
        const u32 to = shared_address(data) + to_row * kWidth;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const int x[4] = {panel * kPanelColumns, row, head, batch};
            if (x[0] < columns) tma_load_4d(to + panel * kPanelBytes, map, barrier, x, policy);
        }
    }

    // A descriptor tells a product where a matrix lies. Its upper word is the same for all places in a tile: the
    // swizzle, and the distance of groups of eight rows. The lower one is an address and a distance of panels, both in
    // units of 16 bytes; an address in shared memory does not carry into the distance, so constants can be added.
    static constexpr u64 kUpper = u64(kWidth == 128 ? 1 : kWidth == 64 ? 2 : 3) << 62 | u64(8 * kWidth / 16) << 32;
    static DEVICE u32 lower(u32 address) { return u32(kPanelBytes / 16) << 16 | address / 16; }

    // A matrix whose sum runs along the rows: 16 columns of the tile from column 16 * step on. They lie in one panel.
    static DEVICE u64 along_columns(u32 lower, int step) {
        const int column = step * 16;
        const int offset = column / kPanelColumns * kPanelBytes + column % kPanelColumns * int(sizeof(T));
        return kUpper | (lower + offset / 16);
    }

    // A matrix whose sum runs down the columns: 16 rows from row 16 * step on, all columns.
    static DEVICE u64 along_rows(u32 lower, int step) { return kUpper | (lower + step * kWidth); }
};

// Waits for the phase of the given parity.
DEVICE void wait_barrier(u32 barrier, u32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// Barriers of a ring of kStages tiles: full when its writers have written or a copy has landed, empty when all readers
// are done with it. Use n of the ring, counted from 0, is in stage n % kStages.
template <int kStages>
struct RingBarriers {
    u64 full[kStages];
    u64 empty[kStages];

    DEVICE void init(u32 readers, u32 writers) {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(shared_address(&full[stage]), writers);
            mbarrier_init(shared_address(&empty[stage]), readers);
        }
    }
    static DEVICE u32 parity(u32 n) { return n / kStages % 2; }

    // The writer: waits until use n may begin.
    DEVICE void wait_empty(u32 n) { wait_barrier(shared_address(&empty[n % kStages]), parity(n) ^ 1); }
    // The same for a copy: announces its bytes, and returns the barrier at which they are to arrive.
    DEVICE u32 open(u32 n, u32 bytes) {
        wait_empty(n);
        const u32 barrier = shared_address(&full[n % kStages]);
        mbarrier_arrive_expect(barrier, bytes);
        return barrier;
    }
    // The readers: wait for the data of use n; give it back.
    DEVICE void wait(u32 n) { wait_barrier(shared_address(&full[n % kStages]), parity(n)); }
    DEVICE void release(u32 n) { mbarrier_arrive(shared_address(&empty[n % kStages])); }
};
