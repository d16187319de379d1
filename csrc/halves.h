// Products of narrow weights for instruction sets that multiply bytes into 16-bit sums of pairs (S::kHalves): a few
// steps are added in 16 bits before they are widened to the accumulators. Two steps of 4-bit weights
// reach 2 * 2 * 15 * 128 = 7680, four of 3 bits 7168: nothing saturates. Half of the lanes at a time: the accumulators of a tile leave few
// registers, and those must hold the weights of all steps.
#pragma once

#include "unit.h"

namespace bitwright {

template <class S, int BITS>
constexpr bool in_halves() {
    return S::kHalves && BITS < 8;
}

template <int... STEP>
struct Steps {};

template <class S, int BITS, int FIRST, int HALF, int ROWS, int BLOCKS, int... STEP>
BW_INLINE void half_products(const typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads], const RowPointers<ROWS>& x,
                             int64_t stride, typename S::I (&acc)[BLOCKS][ROWS], Steps<STEP...>) {
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        const typename S::Half w[] = {S::template half<HALF>(unpack_unit<S, BITS, FIRST + STEP>(raw[b]))...};
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* at = x.row(r, stride) + 4 * FIRST;
            typename S::Half sum = S::pairs(w[0], at);
            ((sum = STEP > 0 ? S::add_halves(sum, S::pairs(w[STEP], at + 4 * STEP)) : sum), ...);
            S::template widen<HALF>(acc[b][r], sum);
        }
    }
}

template <int BITS>
struct StepsOf : Steps<0, 1, 2, 3> {};
template <>
struct StepsOf<4> : Steps<0, 1> {};

// The steps of a unit from FIRST on: the two at 4 bits, else four at a time.
template <class S, int BITS, int FIRST, int ROWS, int BLOCKS>
BW_INLINE void half_steps(const typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads], const RowPointers<ROWS>& x,
                          int64_t stride, typename S::I (&acc)[BLOCKS][ROWS]) {
    half_products<S, BITS, FIRST, 0>(raw, x, stride, acc, StepsOf<BITS>());
    // Or the activations of all rows wait for the second half in registers that are not there.
    if constexpr (ROWS > 1) BW_FORGET;
    half_products<S, BITS, FIRST, 1>(raw, x, stride, acc, StepsOf<BITS>());
    if constexpr (ROWS > 1) BW_FORGET;
    if constexpr (FIRST + 4 < Unit<BITS>::kSteps) half_steps<S, BITS, FIRST + 4>(raw, x, stride, acc);
}

}  // namespace bitwright
