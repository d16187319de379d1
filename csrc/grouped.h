// The matrix kernel for weights whose scale changes every few inputs: the tile of gemm.h, whose int32 sums end
// with each scale group. They are converted, multiplied by the scale of the group and added to float sums, which
// wait in memory meanwhile: registers hold one group's accumulators only. Each operation rounds once, groups go
// in order, so that every instruction set ends in the same bits.
#pragma once

#include "dispatch.h"
#include "gemm.h"
#include "simd.h"

namespace bitwright {

// Holds every accumulator in its register: across loops and branches GCC 12 else keeps two copies, or moves them to
// memory and back.
template <class S, int ROWS, int BLOCKS>
BW_INLINE void pin(typename S::I (&acc)[BLOCKS][ROWS]) {
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) S::pin(acc[b][r]);
    }
}

// What the sums of a scale group start from: constant - zero * w_sum.
template <class S, int ROWS, int BLOCKS>
BW_INLINE void start_group(const Gemm& g, int64_t row, int64_t block, int64_t group,
                           typename S::I (&acc)[BLOCKS][ROWS]) {
    const int32_t* constants = g.constants + group * g.constants_stride + row;
    BW_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) acc[b][r] = S::set_int(constants[r]);
    }
    pin<S>(acc);
    if (!g.shifted) return;
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        const typename S::I sum = S::load_int(g.w_sum + ((block + b) * g.scale_groups + group) * kLanes);
        typename S::I shift = S::mul_int(S::set_int(g.terms[row].zero), sum);
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            if (r > 0 && !g.one_zero) shift = S::mul_int(S::set_int(g.terms[row + r].zero), sum);
            acc[b][r] = S::sub_int(acc[b][r], shift);
        }
    }
    pin<S>(acc);
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
    alignas(64) float totals[BLOCKS * ROWS * kLanes] = {};
    const int64_t stride = g.x_stride;
    const int64_t block_bytes = g.block_bytes;
    const uint8_t* w = g.w + block * block_bytes;
    RowPointers<ROWS> x(g.x + row * stride, stride);
    for (int64_t group = 0; group < g.scale_groups; ++group) {
        typename S::I acc[BLOCKS][ROWS];
        start_group<S>(g, row, block, group, acc);
        exchange_pairs<S>(acc);
        int64_t left = paired_units<S, BITS>(w, block_bytes, x, stride, acc, g.run_groups, ahead);
        for (; left > 0; --left) {
            unit_products<S, BITS, ROWS, BLOCKS>(w, block_bytes, x, stride, acc, ahead);
            x.advance(Unit<BITS>::kInputs);
            w += Unit<BITS>::kBytes;
            pin<S>(acc);
        }
        exchange_pairs<S>(acc);
        pin<S>(acc);  // what follows must not ask for copies either
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
