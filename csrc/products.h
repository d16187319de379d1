// The products of one unit of weights with the rows of a tile.
#pragma once

#include "halves.h"
#include "pairs.h"
#include "unit.h"

namespace bitwright {

template <class S, int BITS, int ROWS, int BLOCKS, int STEP>
BW_INLINE void unit_step(const typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads], const RowPointers<ROWS>& x,
                         int64_t stride, typename S::I (&acc)[BLOCKS][ROWS]) {
    constexpr int kSide = side<BITS>();
    decltype(unpack_unit<S, BITS, STEP>(raw[0])) w[BLOCKS];
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) w[b] = unpack_unit<S, BITS, STEP>(raw[b]);
    BW_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        const auto four = S::template broadcast<kSide>(x.row(r, stride) + 4 * STEP);
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) acc[b][r] = S::template dot<kSide>(acc[b][r], w[b], four);
    }
    if constexpr (STEP + 1 < Unit<BITS>::kSteps) unit_step<S, BITS, ROWS, BLOCKS, STEP + 1>(raw, x, stride, acc);
}

// The unit at `w` of every block against every row. A single row reads each weight once, and the stream is all that
// there is to wait for: it requests what it reads itself later, several rows what comes after them.
template <class S, int BITS, int ROWS, int BLOCKS>
BW_INLINE void unit_products(const uint8_t* w, int64_t block_bytes, const RowPointers<ROWS>& x, int64_t stride,
                             typename S::I (&acc)[BLOCKS][ROWS], Ahead& ahead) {
    typename S::Raw raw[BLOCKS][Unit<BITS>::kLoads];
    load_unit<S, BITS>(w, block_bytes, raw);
    if constexpr (in_pairs<S, ROWS>()) {
        pair_steps<S, BITS, ROWS, BLOCKS, 0>(raw, x, stride, acc);
    } else if constexpr (in_halves<S, BITS>()) {
        half_steps<S, BITS, 0>(raw, x, stride, acc);
    } else {
        unit_step<S, BITS, ROWS, BLOCKS, 0>(raw, x, stride, acc);
    }
    if constexpr (ROWS > 1) return request<BITS>(ahead);
    BW_UNROLL
    for (int i = 0; i < Unit<BITS>::kLoads; ++i) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) BW_PREFETCH(w + b * block_bytes + i * kGroupBytes + kAheadBytes);
    }
}

}  // namespace bitwright
