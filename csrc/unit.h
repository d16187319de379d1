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

// The operand of the activations: at 3 bits that of 4, since only their weights are put together in another way.
template <int BITS>
constexpr int side() {
    return BITS == 3 ? 4 : BITS;
}

template <class S, int BITS, int BLOCKS>
BW_INLINE void load_unit(const uint8_t* w, int64_t block_bytes,
                         typename S::Raw (&raw)[BLOCKS][Unit<BITS>::kLoads]) {
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        BW_UNROLL
        for (int i = 0; i < Unit<BITS>::kLoads; ++i) raw[b][i] = S::load_raw(w + b * block_bytes + i * kGroupBytes);
    }
}

// One line for each load of a unit.
template <int BITS>
BW_INLINE void request(Ahead& ahead) {
    BW_UNROLL
    for (int i = 0; i < Unit<BITS>::kLoads; ++i) {
        BW_PREFETCH(ahead.at);
        ahead.at += ahead.step;
    }
}

}  // namespace bitwright
