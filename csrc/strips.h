// Deals the strips of a matrix product to the threads. A strip is a set of activation rows at a constant
// distance (all rows of a linear layer, one row of pixels of a convolution). Threads split either the strips
// or the output blocks, whichever leaves them more even; inside a thread the blocks go in slabs that stay in
// its L2 cache while all its strips pass.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace bitwright {

constexpr int64_t kSlabBytes = 256 << 10;

// Work below this many multiplications is done before a second thread has woken up.
constexpr int64_t kSerialWork = 1 << 20;

// One product: its strips, the blocks of its weights, their size and the kernel for their width.
struct Work {
    int64_t strips;
    int64_t blocks;
    int64_t block_bytes;
    void (*run)(const Gemm& gemm, const Span& span);
};

// Whether the threads share the blocks (true) or the strips. Where both are even, the larger operand is the
// one to be read only once.
inline bool split_by_blocks(const Work& work, const Kernels& kernels, int threads, int64_t activation_bytes) {
    const double blocks = imbalance(ceil_div(work.blocks, kernels.tile_blocks), threads);
    const double strips = imbalance(work.strips, threads);
    return blocks < strips || (blocks == strips && work.blocks * work.block_bytes >= activation_bytes);
}

// The strips and blocks of one member.
struct Part {
    Range rows, cols;
};

inline Part part_of(const Work& work, const Kernels& kernels, bool by_blocks, int index, int count) {
    if (by_blocks) return {{0, work.strips}, share(work.blocks, kernels.tile_blocks, index, count)};
    return {share(work.strips, 1, index, count), {0, work.blocks}};
}

// Blocks that stay in the cache together.
inline int64_t slab_blocks(const Work& work, const Kernels& kernels) {
    const int64_t fitting = std::max<int64_t>(1, kSlabBytes / std::max<int64_t>(1, work.block_bytes));
    return round_up(fitting, kernels.tile_blocks);
}

// The part of member `index`: `at(i)` gives the strip i, whose weights must be the same for all strips.
template <class StripAt>
void run_strips(const Kernels& kernels, const Work& work, bool by_blocks, const StripAt& at, int index,
                int count) {
    const auto [rows, cols] = part_of(work, kernels, by_blocks, index, count);
    // A single row of tiles reads each weight once: nothing to keep in the cache.
    const bool once = rows.end - rows.begin == 1 && at(rows.begin).rows <= kernels.tile_rows;
    const int64_t slab = once ? std::max<int64_t>(1, work.blocks) : slab_blocks(work, kernels);
    for (int64_t begin = cols.begin; begin < cols.end; begin += slab) {
        const int64_t end = std::min(cols.end, begin + slab);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const Span span{begin, end, cols.end, i - rows.begin, rows.end - rows.begin};
            work.run(at(i), span);
        }
    }
}

// The same for weights that the kernel cannot read as they are: `unpack(begin, end)` puts those of the blocks of a slab
// where `at(i, begin)`, the strip i from that block on, has its first.
template <class Unpack, class StripAt>
void run_panels(const Kernels& kernels, const Work& work, bool by_blocks, const Unpack& unpack, const StripAt& at,
                int index, int count) {
    const auto [rows, cols] = part_of(work, kernels, by_blocks, index, count);
    if (rows.begin == rows.end) return;
    const int64_t slab = slab_blocks(work, kernels);
    for (int64_t begin = cols.begin; begin < cols.end; begin += slab) {
        const int64_t blocks = std::min(cols.end - begin, slab);
        unpack(begin, begin + blocks);
        const Span span{0, blocks, blocks, 0, 1};
        for (int64_t i = rows.begin; i < rows.end; ++i) work.run(at(i, begin), span);
    }
}

}  // namespace bitwright
