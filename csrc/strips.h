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

// The part of member `index`: `at(i)` gives the strip i, whose weights must be the same for all strips.
template <class StripAt>
void run_strips(const Kernels& kernels, const Work& work, bool by_blocks, const StripAt& at, int index,
                int count) {
    const int64_t unit = kernels.tile_blocks;
    const Range rows = by_blocks ? Range{0, work.strips} : share(work.strips, 1, index, count);
    const Range cols = by_blocks ? share(work.blocks, unit, index, count) : Range{0, work.blocks};
    // A single row of tiles reads each weight once: nothing to keep in the cache.
    const bool once = rows.end - rows.begin == 1 && at(rows.begin).rows <= kernels.tile_rows;
    const int64_t fitting = std::max<int64_t>(1, kSlabBytes / std::max<int64_t>(1, work.block_bytes));
    const int64_t slab = once ? std::max<int64_t>(1, work.blocks) : round_up(fitting, unit);
    for (int64_t begin = cols.begin; begin < cols.end; begin += slab) {
        const int64_t end = std::min(cols.end, begin + slab);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const Span span{begin, end, cols.end, i - rows.begin, rows.end - rows.begin};
            work.run(at(i), span);
        }
    }
}

}  // namespace bitwright
