// Tiles in shared memory, and their copies from global memory.
#pragma once
#include "ptx/copy.cuh"

// kRows x kColumns elements, rows kPad elements apart. The default pad of 16 bytes makes the pitch an odd number of
// 16-byte chunks (kColumns is a multiple of two chunks), so eight rows at one column lie in eight different bank
// groups: ldmatrix has no conflicts. Against an XOR swizzle this costs 16 bytes a row and saves the address
// arithmetic: every offset inside a tile is a constant in the instruction.
template <class T, int kRows_, int kColumns_, int kPad = kChunkBytes / int(sizeof(T))>
struct SharedTile {
    typedef T Element;
    static constexpr int kRows = kRows_;
    static constexpr int kColumns = kColumns_;
    static constexpr int kPitch = kColumns + kPad;
    static_assert(kColumns * sizeof(T) % kChunkBytes == 0, "SharedTile: a row must be whole 16-byte chunks");
    static_assert(kPitch * sizeof(T) % kChunkBytes == 0, "SharedTile: rows must start at 16-byte chunks");
    alignas(16) T data[kRows * kPitch];

    DEVICE T& at(int row, int column) { return data[row * kPitch + column]; }
    DEVICE const T& at(int row, int column) const { return data[row * kPitch + column]; }
};

// The same with rows an odd number of words apart, for elements that are read one by one: threads side by side may have
// columns of a row, or rows of a column.
template <class T, int kRows_, int kColumns>
struct OddTile {
    static constexpr int kRows = kRows_;
    static constexpr int kPitch = kColumns + 4 / int(sizeof(T));
    static_assert(kColumns * sizeof(T) % 8 == 0, "OddTile: a row must be an even number of words");
    T data[kRows * kPitch];

    DEVICE T& at(int row, int column) { return data[row * kPitch + column]; }
    DEVICE const T& at(int row, int column) const { return data[row * kPitch + column]; }
};

// Two neighbours, read at once.
template <class T>
struct alignas(2 * sizeof(T)) Two {
    T element[2];
};

// How kThreads threads walk over a tile whose rows have kChunks chunks: a power of two of threads side by side, so
// that a thread keeps its column, and rows advance by a constant.
template <int kThreads, int kChunks>
struct CopyShape {
    static constexpr int kAcross = kChunks > 4 ? 8 : kChunks > 2 ? 4 : kChunks;
    static constexpr int kRowsPerPass = kThreads / kAcross;
    static constexpr int kPassesAcross = (kChunks + kAcross - 1) / kAcross;
    static_assert(kThreads % kAcross == 0, "CopyShape: threads must fill whole rows");
};

// Reads a chunk element by element, for data that does not lie on 16-byte boundaries.
template <class T>
DEVICE Chunk gather_chunk(const T* source, bool valid) {
    constexpr int kElements = kChunkBytes / int(sizeof(T));
    union {
        Chunk chunk;
        T element[kElements];
    } value;
    value.chunk = Chunk{{0, 0, 0, 0}};
    if (valid) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) value.element[i] = source[i];
    }
    return value.chunk;
}

// Copies one chunk to base + offset elements: asynchronously if kVector says that source is 16-byte aligned, through
// registers if not. The address in shared memory is a base and a constant, so that all chunks share one register.
template <bool kVector, class T>
DEVICE void copy_chunk(T* base, u32 base_address, int offset, const T* source, bool valid) {
    if constexpr (kVector) {
        cp_async_chunk(base_address + offset * int(sizeof(T)), source, valid);
    } else {
        *reinterpret_cast<Chunk*>(base + offset) = gather_chunk(source, valid);
    }
}

// One thread's part in copying tiles of a row-major matrix, kWidth valid columns, one tile after another: it keeps a
// running pointer, so that the loop over tiles multiplies nothing, and derives its place in the tile anew each time,
// which costs less than registers held over the loop. What lies outside becomes zero. The caller commits and waits.
template <bool kVector, int kThreads, int kWidth, class T, class Tile>
struct RowCopy {
    static constexpr int kElements = kChunkBytes / int(sizeof(T));
    static constexpr int kChunks = Tile::kColumns / kElements;
    typedef CopyShape<kThreads, kChunks> Shape;
    static constexpr int kAcross = Shape::kAcross * kElements;

    const T* from;

    static DEVICE int first_row() { return thread_index() / Shape::kAcross; }
    static DEVICE int column() { return thread_index() % Shape::kAcross * kElements; }

    // source: the first row of the first tile.
    DEVICE void open(const T* source, i64 row_stride) { from = source + first_row() * row_stride + column(); }

    // Copies the rows below the given number of rows of the current tile, and of them the chunks that hold the first
    // columns; the rest of the tile is left as it is.
    DEVICE void run(Tile& tile, i64 row_stride, int rows, int columns = Tile::kColumns) const {
        const T* source = from;
        const int row0 = first_row();
        const int column0 = column();
        T* to = &tile.at(row0, column0);
        const u32 to_address = shared_address(to);
#pragma unroll
        for (int row = 0; row < Tile::kRows; row += Shape::kRowsPerPass) {
            const bool row_inside = Tile::kRows % Shape::kRowsPerPass == 0 || row0 + row < Tile::kRows;
#pragma unroll
            for (int offset = 0; offset < Shape::kPassesAcross * kAcross; offset += kAcross) {
                const bool column_inside = (Tile::kColumns % kAcross == 0 || column0 + offset < Tile::kColumns) &&
                                           (columns == Tile::kColumns || column0 + offset < columns);
                const bool valid = row0 + row < rows && (kWidth == Tile::kColumns || column0 + offset < kWidth);
                if (row_inside && column_inside) {
                    copy_chunk<kVector>(to, to_address, row * Tile::kPitch + offset, source + offset, valid);
                }
            }
            source += Shape::kRowsPerPass * row_stride;
        }
    }

    DEVICE void move(i64 elements) { from += elements; }
};
