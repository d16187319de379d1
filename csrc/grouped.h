// The matrix kernel for weights whose scale changes every few inputs: the tile of gemm.h, whose int32 sums end
// with each scale group. They are converted, multiplied by the scale of the group and added to float sums, which
// wait in memory meanwhile: registers hold one group's accumulators only. Each operation rounds once, groups go
// in order, so that every instruction set ends in the same bits.
#pragma once

#include "dispatch.h"
#include "gemm.h"
#include "simd.h"

namespace bitwright {

// The smallest run of packed codes that can be read by itself: one load, or at 3 bits two loads of lower bits
// and one of upper bits.
template <int BITS>
struct Unit {
    static constexpr int kWidth = BITS == 3 ? 2 : BITS;
    static constexpr int kLoads = BITS == 3 ? 3 : 1;
    static constexpr int kSteps = BITS == 3 ? 8 : 8 / BITS;  // of 4 inputs
};

template <class S, int BITS, int STEP>
BW_INLINE auto unpack_unit(const typename S::Raw (&raw)[Unit<BITS>::kLoads]) {
    constexpr int kPerLoad = 8 / Unit<BITS>::kWidth;
    const auto low = S::template unpack<Unit<BITS>::kWidth, STEP % kPerLoad>(raw[STEP / kPerLoad]);
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

// What the sums of a scale group start from: constant - zero * w_sum.
template <class S, int ROWS, int BLOCKS>
BW_INLINE void start_group(const Gemm& g, int64_t row, int64_t block, int64_t group,
                           typename S::I (&acc)[BLOCKS][ROWS]) {
    const int32_t* constants = g.constants + group * g.constants_stride + row;
    if (!g.shifted) {
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            BW_UNROLL
            for (int b = 0; b < BLOCKS; ++b) acc[b][r] = S::set_int(constants[r]);
        }
        return;
    }
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        const typename S::I sum = S::load_int(g.w_sum + ((block + b) * g.scale_groups + group) * kLanes);
        typename S::I shift = S::mul_int(S::set_int(g.terms[row].zero), sum);
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            if (r > 0 && !g.one_zero) shift = S::mul_int(S::set_int(g.terms[row + r].zero), sum);
            acc[b][r] = S::sub_int(S::set_int(constants[r]), shift);
        }
    }
}

// y = total * scale + bias, one rounding per operation.
template <class S, int ROWS, int BLOCKS>
BW_INLINE void finish_rows(const Gemm& g, int64_t row, int64_t block, const float* totals) {
    for (int b = 0; b < BLOCKS; ++b) {
        const int64_t first = (block + b) * kLanes;
        const int64_t count = g.columns - first < kLanes ? g.columns - first : kLanes;
        for (int r = 0; r < ROWS; ++r) {
            const typename S::F scale = S::set(g.terms[row + r].scale);
            const typename S::F value = S::mul(S::load(totals + (b * ROWS + r) * kLanes), scale);
            float* y = g.y + (row + r) * g.y_stride + first;
            if (count == kLanes) {
                S::store(y, g.bias != nullptr ? S::add(value, S::load(g.bias + first)) : value);
                continue;
            }
            float lanes[kLanes];
            S::store(lanes, value);
            for (int64_t i = 0; i < count; ++i) y[i] = g.bias != nullptr ? lanes[i] + g.bias[first + i] : lanes[i];
        }
    }
}

template <class S, int BITS, int ROWS, int BLOCKS>
void grouped_tile(const Gemm& g, int64_t row, int64_t block, Ahead ahead) {
    constexpr int64_t kInputs = 4 * Unit<BITS>::kSteps;
    constexpr int64_t kBytes = Unit<BITS>::kLoads * kGroupBytes;
    alignas(64) float totals[BLOCKS * ROWS * kLanes] = {};
    const int64_t stride = g.x_stride;
    const int64_t block_bytes = g.block_bytes;
    const uint8_t* w = g.w + block * block_bytes;
    RowPointers<ROWS> x(g.x + row * stride, stride);
    for (int64_t group = 0; group < g.scale_groups; ++group) {
        typename S::I acc[BLOCKS][ROWS];
        start_group<S>(g, row, block, group, acc);
        for (int64_t left = g.run_groups; left > 0; --left) {
            typename S::Raw raw[BLOCKS][Unit<BITS>::kLoads];
            BW_UNROLL
            for (int b = 0; b < BLOCKS; ++b) {
                BW_UNROLL
                for (int i = 0; i < Unit<BITS>::kLoads; ++i) {
                    raw[b][i] = S::load_raw(w + b * block_bytes + i * kGroupBytes);
                }
            }
            unit_step<S, BITS, ROWS, BLOCKS, 0>(raw, x, stride, acc);
            BW_UNROLL
            for (int i = 0; i < Unit<BITS>::kLoads; ++i) {
                BW_UNROLL
                for (int b = 0; b < BLOCKS && ROWS == 1; ++b) {
                    BW_PREFETCH(w + b * block_bytes + i * kGroupBytes + kAheadBytes);
                }
                if (ROWS > 1) BW_PREFETCH(ahead.at);
                ahead.at += ahead.step;
            }
            x.advance(kInputs);
            w += kBytes;
        }
        float* total = totals;
        BW_OPAQUE(total);  // or the sums would take the registers of the accumulators
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            const typename S::F scale = S::load(g.w_scale + ((block + b) * g.scale_groups + group) * kLanes);
            BW_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                float* at = total + (b * ROWS + r) * kLanes;
                S::store(at, S::add(S::load(at), S::mul(S::to_float(acc[b][r]), scale)));
            }
        }
    }
    finish_rows<S, ROWS, BLOCKS>(g, row, block, totals);
}

// The kind of tile that `gemm_strip` is given.
struct Grouped {
    template <class S, int BITS, int ROWS, int BLOCKS>
    static BW_INLINE void run(const Gemm& g, int64_t row, int64_t block, Ahead ahead) {
        grouped_tile<S, BITS, ROWS, BLOCKS>(g, row, block, ahead);
    }
};

}  // namespace bitwright
