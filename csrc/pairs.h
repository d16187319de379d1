// Products of pairs of rows, for instruction sets that have them (S::kPairs): they keep the sums of two rows in each
// other's registers while they add, and take two steps of weights at once. The last of an odd number of rows is alone.
#pragma once

#include "unit.h"

namespace bitwright {

template <class S, int ROWS>
constexpr bool in_pairs() {
    return S::kPairs && ROWS > 1;
}

// From rows to pairs, and back.
template <class S, int ROWS, int BLOCKS>
BW_INLINE void exchange_pairs(typename S::I (&acc)[BLOCKS][ROWS]) {
    if constexpr (in_pairs<S, ROWS>()) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            BW_UNROLL
            for (int r = 0; r + 1 < ROWS; r += 2) S::exchange(acc[b][r], acc[b][r + 1]);
        }
    }
}

// Two steps of weights of a block, or with STEPS = 1 one and zeros, against the activations from byte `at` of every row.
template <class S, int BITS, int STEPS, int ROWS>
BW_INLINE void pair_step(const typename S::Bytes& even, const typename S::Bytes& odd, const RowPointers<ROWS>& x,
                         int64_t stride, int64_t at, typename S::I (&acc)[ROWS]) {
    constexpr int kSide = side<BITS>();
    decltype(S::template broadcast<kSide>(nullptr)) two[ROWS / 2];
    BW_UNROLL
    for (int p = 0; p < ROWS / 2; ++p) {
        two[p] = S::template two_rows<kSide, STEPS>(x.row(2 * p, stride) + at, x.row(2 * p + 1, stride) + at);
    }
    S::multiply(acc, even, odd, two);
    if constexpr (ROWS % 2 == 1) {
        const uint8_t* last = x.row(ROWS - 1, stride) + at;
        typename S::I& sum = acc[ROWS - 1];
        sum = S::template dot<kSide>(sum, even, S::template broadcast<kSide>(last));
        if constexpr (STEPS == 2) sum = S::template dot<kSide>(sum, odd, S::template broadcast<kSide>(last + 4));
    }
}

// The steps of a unit from STEP on.
template <class S, int BITS, int ROWS, int BLOCKS, int STEP>
BW_INLINE void pair_steps(const typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads], const RowPointers<ROWS>& x,
                          int64_t stride, typename S::I (&acc)[BLOCKS][ROWS]) {
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        const auto even = unpack_unit<S, BITS, STEP>(raw[b]);
        if constexpr (STEP + 1 < Unit<BITS>::kSteps) {
            pair_step<S, BITS, 2>(even, unpack_unit<S, BITS, STEP + 1>(raw[b]), x, stride, 4 * STEP, acc[b]);
        } else {
            pair_step<S, BITS, 1>(even, S::no_weights(), x, stride, 4 * STEP, acc[b]);
        }
    }
    if constexpr (STEP + 2 < Unit<BITS>::kSteps) pair_steps<S, BITS, ROWS, BLOCKS, STEP + 2>(raw, x, stride, acc);
}

// Where a unit is a single step: two units at a time, as long as there are two. Returns how many are left.
template <class S, int BITS, int ROWS, int BLOCKS>
BW_INLINE int64_t paired_units(const uint8_t*& w, int64_t block_bytes, RowPointers<ROWS>& x, int64_t stride,
                               typename S::I (&acc)[BLOCKS][ROWS], int64_t units, Ahead& ahead) {
    if constexpr (in_pairs<S, ROWS>() && Unit<BITS>::kSteps == 1) {
        for (; units > 1; units -= 2) {
            BW_UNROLL
            for (int b = 0; b < BLOCKS; ++b) {
                const uint8_t* block = w + b * block_bytes;
                const auto even = S::template unpack<BITS, 0>(S::load_raw(block));
                const auto odd = S::template unpack<BITS, 0>(S::load_raw(block + kGroupBytes));
                pair_step<S, BITS, 2>(even, odd, x, stride, 0, acc[b]);
            }
            x.advance(2 * Unit<BITS>::kInputs);
            w += 2 * Unit<BITS>::kBytes;
            request<BITS>(ahead);
            request<BITS>(ahead);
        }
    }
    return units;
}

}  // namespace bitwright
