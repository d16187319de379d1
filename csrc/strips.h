// Deals the strips of a matrix product to the threads. A strip is a set of activation rows at a constant distance (all rows of
// a linear layer, one row of pixels of a convolution). Threads split either the strips or the output blocks, whichever leaves
// them more even; inside a thread the blocks go in slabs that stay in its L2 cache while all its strips pass.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace bitwright {

constexpr int64_t kSlabBytes = 256 << 10;

// Work below this many multiplications is done before a second thread has woken up.
constexpr int64_t kSerialWork = 1 << 18;

inline int weight_index(int bits) { return bits == 8 ? 0 : bits == 4 ? 1 : 2; }

// How a team shares one product.
struct Split {
    bool by_blocks;

    static Split choose(int64_t strips, int64_t blocks, int64_t tile_blocks, int threads) {
        return {imbalance(ceil_div(blocks, tile_blocks), threads) <= imbalance(strips, threads)};
    }
};

// The part of member `index`: `at(i)` gives the strip i, whose weights must be the same for all strips.
template <class StripAt>
void run_strips(const Kernels& kernels, int bits, int64_t strips, int64_t blocks, int64_t block_bytes, Split split,
                const StripAt& at, int index, int count) {
    const int64_t unit = kernels.tile_blocks;
    const Range rows = split.by_blocks ? Range{0, strips} : share(strips, 1, index, count);
    const Range cols = split.by_blocks ? share(blocks, unit, index, count) : Range{0, blocks};
    // A single row of tiles reads each weight once: nothing to keep in the cache.
    const bool once = rows.end - rows.begin == 1 && at(rows.begin).rows <= kernels.tile_rows;
    const int64_t fitting = std::max<int64_t>(1, kSlabBytes / std::max<int64_t>(1, block_bytes));
    const int64_t slab = once ? std::max<int64_t>(1, blocks) : round_up(fitting, unit);
    for (int64_t begin = cols.begin; begin < cols.end; begin += slab) {
        const int64_t end = std::min(cols.end, begin + slab);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const int64_t next_end = i + 1 == rows.end ? cols.end : end;
            kernels.gemm[weight_index(bits)](at(i), begin, end, next_end);
        }
    }
}

}  // namespace bitwright
