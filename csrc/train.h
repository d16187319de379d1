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
    const Quantize<S> quantize;
    const typename S::F wide_low;
    const typename S::F wide_high;
    const float low, high;
    float inside[kLanes] = {};
    float below[kLanes] = {};
    float above[kLanes] = {};

    BW_INLINE explicit StraightThrough(const Quantizer& q)
        : quantize(q), wide_low(S::set(q.low - 2.0f)), wide_high(S::set(q.high + 2.0f)), low(q.low), high(q.high) {}

    BW_INLINE void block(const float* g, const float* x, float* dx) {
        float steps[kLanes];
        float codes[kLanes];
        const typename S::F real = S::div(S::load(x), quantize.scale);
        S::store(steps, real);
        S::store(codes, S::to_float(S::round(S::min(S::max(real, wide_low), wide_high))));
        for (int j = 0; j < kLanes; ++j) {
            const float at = LEARNED ? steps[j] : codes[j];
            dx[j] = at >= low && at <= high ? g[j] : 0.0f;
        }
        if (!LEARNED) return;
        for (int j = 0; j < kLanes; ++j) {
            const bool under = steps[j] <= low;
            const bool over = steps[j] >= high;
            inside[j] += under || over ? 0.0f : g[j] * (codes[j] - steps[j]);
            below[j] += under ? g[j] : 0.0f;
            above[j] += over ? g[j] : 0.0f;
        }
    }
};

template <class S, bool LEARNED>
void straight_through_run(const Gradient& job) {
    StraightThrough<S, LEARNED> ste(job.quantizer);
    float g[kLanes] = {};
    float x[kLanes] = {};
    float dx[kLanes];
    for (int64_t i = 0; i < job.count; i += kLanes) {
        const int64_t n = job.count - i < kLanes ? job.count - i : kLanes;
        if (n == kLanes && job.wide != nullptr) {
            ste.block(job.wide + i, job.x + i, job.dx + i);
            continue;
        }
        for (int64_t j = 0; j < kLanes; ++j) {
            g[j] = j >= n ? 0.0f : job.wide != nullptr ? job.wide[i + j] : widen(job.narrow[i + j]);
            x[j] = j < n ? job.x[i + j] : 0.0f;
        }
        ste.block(g, x, dx);
        for (int64_t j = 0; j < n; ++j) job.dx[i + j] = dx[j];
    }
    double sums[3] = {};
    for (int j = 0; j < kLanes; ++j) {
        sums[0] += static_cast<double>(ste.inside[j]);
        sums[1] += static_cast<double>(ste.below[j]);
        sums[2] += static_cast<double>(ste.above[j]);
    }
    for (int j = 0; j < 3; ++j) job.sums[j] = sums[j];
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
