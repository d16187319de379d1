// The elementwise passes of a training step, templates over an instruction set. Blocks of 16 elements; a
// shorter tail goes through copies on the stack. Plain loops over 16-element arrays are left to the compiler.
#pragma once

#include "quantize.h"

namespace bitwright {

// bfloat16 is the upper half of a float32. Codes of at most 8 bits fit it exactly.
static BW_INLINE float widen(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static BW_INLINE uint16_t upper_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

template <class S>
void centred_codes(const float* x, int64_t count, const Quantizer& quantizer, float* wide, uint16_t* narrow) {
    const Quantize<S> quantize(quantizer);
    float codes[kLanes] = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = count - i < kLanes ? count - i : kLanes;
        if (n == kLanes && wide != nullptr) {
            S::store(wide + i, S::to_float(quantize.centred(S::load(x + i))));
            continue;
        }
        for (int64_t j = 0; j < n; ++j) codes[j] = x[i + j];
        S::store(codes, S::to_float(quantize.centred(S::load(codes))));
        if (wide != nullptr) {
            for (int64_t j = 0; j < n; ++j) wide[i + j] = codes[j];
        } else {
            for (int64_t j = 0; j < n; ++j) narrow[i + j] = upper_half(codes[j]);
        }
    }
}

// One block of the table in numerics/ste.py: gradient to x, and the three sums of the gradient.
template <class S, bool LEARNED>
struct StraightThrough {
    using F = typename S::F;
    const F scale;
    const F low, high;            // of the codes
    const F wide_low, wide_high;  // what rounding may see: far enough outside to be clipped, small enough to convert
    F inside = S::set(0.0f);
    F below = S::set(0.0f);
    F above = S::set(0.0f);

    BW_INLINE explicit StraightThrough(const Quantizer& q)
        : scale(S::set(q.scale)),
          low(S::set(q.low)),
          high(S::set(q.high)),
          wide_low(S::set(q.low - 2.0f)),
          wide_high(S::set(q.high + 2.0f)) {}

    BW_INLINE F block(F g, F x) {
        const F steps = S::div(x, scale);
        const F codes = S::to_float(S::round(S::min(S::max(steps, wide_low), wide_high)));
        const F at = LEARNED ? steps : codes;
        if (LEARNED) {
            const F under = S::keep(g, steps, low);
            const F over = S::keep(g, high, steps);
            const F within = S::sub(S::sub(g, under), over);
            inside = S::add(inside, S::mul(within, S::sub(codes, steps)));
            below = S::add(below, under);
            above = S::add(above, over);
        }
        return S::keep(S::keep(g, low, at), at, high);
    }
};

template <class S, bool LEARNED>
void straight_through_run(const Gradient& job) {
    StraightThrough<S, LEARNED> ste(job.quantizer);
    float g[kLanes] = {};
    float x[kLanes] = {};
    for (int64_t i = 0; i < job.count; i += kLanes) {
        const int64_t n = job.count - i < kLanes ? job.count - i : kLanes;
        if (n == kLanes && job.wide != nullptr) {
            S::store(job.dx + i, ste.block(S::load(job.wide + i), S::load(job.x + i)));
            continue;
        }
        for (int64_t j = 0; j < kLanes; ++j) {
            g[j] = j >= n ? 0.0f : job.wide != nullptr ? job.wide[i + j] : widen(job.narrow[i + j]);
            x[j] = j < n ? job.x[i + j] : 0.0f;
        }
        S::store(g, ste.block(S::load(g), S::load(x)));
        for (int64_t j = 0; j < n; ++j) job.dx[i + j] = g[j];
    }
    const typename S::F parts[3] = {ste.inside, ste.below, ste.above};
    for (int k = 0; k < 3; ++k) {
        S::store(g, parts[k]);
        job.sums[k] = 0.0;
        for (float lane : g) job.sums[k] += static_cast<double>(lane);
    }
}

template <class S>
void straight_through(const Gradient& job) {
    if (job.learned) {
        straight_through_run<S, true>(job);
    } else {
        straight_through_run<S, false>(job);
    }
}

// Sums of the differences to `origin` and of their squares, per channel, over rows of adjacent channels.
template <class S>
void moments_run(const float* y, int64_t rows, int64_t channels, const float* origin, double* sum, double* square) {
    for (int64_t c = 0; c < channels; ++c) sum[c] = square[c] = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = y + r * channels;
        for (int64_t c = 0; c < channels; ++c) {
            const double value = static_cast<double>(row[c]) - static_cast<double>(origin[c]);
            sum[c] += value;
            square[c] += value * value;
        }
    }
}

}  // namespace bitwright
