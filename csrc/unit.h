// How a tile takes packed weights: the smallest run of codes that can be read by itself, and its products with
// steps of 4 activations. Layouts: dispatch.h.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace bitwright {

// One load, or at 3 bits two loads of lower bits and one of upper bits. kForm is what the instruction sets are
// asked to unpack.
template <int BITS>
struct Unit {
    static constexpr int kForm = BITS == 3 ? 2 : BITS;
    static constexpr int kLoads = BITS == 3 ? 3 : 1;
    static constexpr int kPerLoad = BITS == kSignedEight ? 1 : 8 / kForm;  // steps
    static constexpr int kSteps = BITS == 3 ? 8 : kPerLoad;
    static constexpr int64_t kInputs = 4 * kSteps;
    static constexpr int64_t kBytes = kLoads * kGroupBytes;
};

// Addresses of the rows of a tile: every third row has a pointer, the two after it are reached by the
// addressing modes [p + stride] and [p + 2 * stride]. One pointer per row would not fit the general
// registers.
template <int ROWS>
struct RowPointers {
    static constexpr int kPointers = (ROWS + 2) / 3;
    const uint8_t* pointer[kPointers];

    BW_INLINE RowPointers(const uint8_t* x, int64_t stride) {
        BW_UNROLL
        for (int i = 0; i < kPointers; ++i) {
            pointer[i] = x + 3 * i * stride;
            BW_OPAQUE(pointer[i]);  // or the compiler turns them back into one base and many offsets
        }
    }
    BW_INLINE const uint8_t* row(int r, int64_t stride) const { return pointer[r / 3] + r % 3 * stride; }
    BW_INLINE void advance(int64_t bytes) {
        BW_UNROLL
        for (int i = 0; i < kPointers; ++i) pointer[i] += bytes;
    }
};

// Weights that a later tile will read: one line is requested per load, `step` bytes apart.
struct Ahead {
    const uint8_t* at;
    int64_t step;
};

template <class S, int BITS, int STEP>
BW_INLINE auto unpack_unit(const typename S::Raw (&raw)[Unit<BITS>::kLoads]) {
    constexpr int kPerLoad = Unit<BITS>::kPerLoad;
    const auto low = S::template unpack<Unit<BITS>::kForm, STEP % kPerLoad>(raw[STEP / kPerLoad]);
    if constexpr (BITS == 3) {
        return S::template with_third<STEP>(low, raw[2]);
    } else {
        return low;
    }
}

template <class S, int BITS, int ROWS, int BLOCKS, int STEP>
BW_INLINE void unit_step(const typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads], const RowPointers<ROWS>& x,
                         int64_t stride, typename S::I (&acc)[BLOCKS][ROWS]) {
    constexpr int kSide = BITS == 3 ? 4 : BITS;  // which operand is the unsigned one
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
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        BW_UNROLL
        for (int i = 0; i < Unit<BITS>::kLoads; ++i) raw[b][i] = S::load_raw(w + b * block_bytes + i * kGroupBytes);
    }
    unit_step<S, BITS, ROWS, BLOCKS, 0>(raw, x, stride, acc);
    BW_UNROLL
    for (int i = 0; i < Unit<BITS>::kLoads; ++i) {
        if constexpr (ROWS == 1) {
            BW_UNROLL
            for (int b = 0; b < BLOCKS; ++b) BW_PREFETCH(w + b * block_bytes + i * kGroupBytes + kAheadBytes);
        } else {
            BW_PREFETCH(ahead.at);
            ahead.at += ahead.step;
        }
    }
}

}  // namespace bitwright
