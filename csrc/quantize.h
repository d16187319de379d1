// Activations from float32 to bytes, templates over an instruction set (see isa_*.cpp for the primitives it
// offers). All loops work on 16 elements; a shorter tail goes through a 16-element copy on the stack, so any
// length is allowed. Division is a true division; NaN ends as the lowest code because the lower bound is
// applied first and `max` returns its second operand then.
#pragma once

#include <cfloat>
#include <cmath>

#include "dispatch.h"
#include "simd.h"

namespace bitwright {

template <class S>
struct Quantize {
    using F = typename S::F;
    using I = typename S::I;

    const F scale;
    const F low;
    const F high;
    const I offset;

    BW_INLINE explicit Quantize(const Quantizer& q)
        : scale(S::set(q.scale)), low(S::set(q.low)), high(S::set(q.high)), offset(S::set_int(q.offset)) {}

    // code - z, before the offset
    BW_INLINE I centred(F x) const { return S::round(S::min(S::max(S::div(x, scale), low), high)); }
    BW_INLINE I code(F x) const { return S::add_int(centred(x), offset); }
};

template <class S>
float absmax_run(const float* x, int64_t count) {
    const typename S::F largest = S::set(FLT_MAX);
    typename S::F top = S::set(0.0f);
    typename S::F finite = S::set(1.0f);
    const auto take = [&](const float* p) {
        const typename S::F size = S::abs(S::load(p));
        finite = S::keep(finite, size, largest);
        top = S::max(size, top);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) take(x + i);
    float lanes[kLanes] = {};
    for (int64_t j = 0; i + j < count; ++j) lanes[j] = x[i + j];
    take(lanes);
    float flags[kLanes];
    S::store(lanes, top);
    S::store(flags, finite);
    float best = 0.0f;
    for (int64_t j = 0; j < kLanes; ++j) best = flags[j] == 0.0f ? INFINITY : lanes[j] > best ? lanes[j] : best;
    return best;
}

template <class S>
int32_t quantize_run(const float* x, int64_t count, const Quantizer& quantizer, uint8_t* out) {
    const Quantize<S> quantize(quantizer);
    typename S::I sum = S::set_int(0);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const typename S::I code = quantize.code(S::load(x + i));
        sum = S::add_int(sum, code);
        S::store_bytes(out + i, code);
    }
    int32_t lanes[kLanes];
    S::store_int(lanes, sum);
    uint32_t total = 0;
    for (int32_t lane : lanes) total += static_cast<uint32_t>(lane);
    if (i < count) {
        float tail[kLanes] = {};
        for (int64_t j = 0; i + j < count; ++j) tail[j] = x[i + j];
        S::store_int(lanes, quantize.code(S::load(tail)));
        for (int64_t j = 0; i + j < count; ++j) {
            total += static_cast<uint32_t>(lanes[j]);
            out[i + j] = static_cast<uint8_t>(lanes[j]);
        }
    }
    return static_cast<int32_t>(total);
}

// Planes to interleaved channels. One vector holds 16 pixels of a channel; four channels are merged into 16
// words. Four such vectors are transposed to 16 bytes per pixel; fewer are written word by word. Codes must
// be unsigned bytes.
template <class S, bool DENSE>
struct PlaneReader {
    const Planes& planes;
    const Quantize<S> quantize;

    // Channels first..first+3 (those that exist) of the pixels i..i+count-1.
    BW_INLINE typename S::I words(int64_t first, int64_t i, int64_t count) const {
        const int64_t last = first + 4 < planes.channels ? first + 4 : planes.channels;
        typename S::I merged = S::set_int(0);
        for (int64_t c = last - 1; c >= first; --c) {
            const float* source = planes.source + c * planes.channel_stride + i * planes.pixel_stride;
            merged = S::add_int(S::shift_byte(merged), quantize.code(pixels(source, count)));
        }
        return merged;
    }
    BW_INLINE typename S::F pixels(const float* source, int64_t count) const {
        if (DENSE && count == kLanes) return S::load(source);
        float values[kLanes] = {};
        for (int64_t j = 0; j < count; ++j) values[j] = source[j * planes.pixel_stride];
        return S::load(values);
    }
};

template <class S, bool DENSE>
void quantize_planes_run(const Planes& p, const Quantizer& quantizer) {
    const PlaneReader<S, DENSE> reader{p, Quantize<S>(quantizer)};
    alignas(64) uint8_t bytes[kLanes * kLanes];
    for (int64_t i = 0; i < p.pixels; i += kLanes) {
        const int64_t count = p.pixels - i < kLanes ? p.pixels - i : kLanes;
        const int64_t* offsets = p.offsets + i;
        if (p.channels == kLanes) {
            S::store_pixels(bytes, reader.words(0, i, count), reader.words(4, i, count),
                            reader.words(8, i, count), reader.words(12, i, count));
            for (int64_t j = 0; j < count; ++j) {
                std::memcpy(p.destination + offsets[j], bytes + S::pixel_at(j) * kLanes, kLanes);
            }
            continue;
        }
        for (int64_t c = 0; c < p.channels; c += 4) {
            S::store_int(reinterpret_cast<int32_t*>(bytes), reader.words(c, i, count));
            for (int64_t j = 0; j < count; ++j) std::memcpy(p.destination + offsets[j] + c, bytes + 4 * j, 4);
        }
    }
}

template <class S>
void quantize_planes(const Planes& planes, const Quantizer& quantizer) {
    if (planes.pixel_stride == 1) {
        quantize_planes_run<S, true>(planes, quantizer);
    } else {
        quantize_planes_run<S, false>(planes, quantizer);
    }
}

// out = (code(a) - za) * sa + (code(b) - zb) * sb; the integers are exact as floats, so each product rounds
// once.
template <class S>
void add_run(const float* a, const float* b, int64_t count, const Quantizer& qa, const Quantizer& qb,
             float* out) {
    const Quantize<S> left(qa);
    const Quantize<S> right(qb);
    const auto sum = [&](const float* pa, const float* pb) {
        const typename S::F va = S::mul(S::to_float(left.centred(S::load(pa))), left.scale);
        const typename S::F vb = S::mul(S::to_float(right.centred(S::load(pb))), right.scale);
        return S::add(va, vb);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) S::store(out + i, sum(a + i, b + i));
    if (i < count) {
        float tail_a[kLanes] = {};
        float tail_b[kLanes] = {};
        const size_t bytes = static_cast<size_t>(count - i) * sizeof(float);
        std::memcpy(tail_a, a + i, bytes);
        std::memcpy(tail_b, b + i, bytes);
        S::store(tail_a, sum(tail_a, tail_b));
        std::memcpy(out + i, tail_a, bytes);
    }
}

}  // namespace bitwright
