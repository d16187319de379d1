// Activations from float32 to bytes, templates over an instruction set (see isa_*.cpp for the primitives it
// offers). All loops work on 16 elements; a shorter tail goes through a 16-element copy on the stack, so any
// length is allowed. NaN ends as the lowest code because the lower bound is applied first and `max` returns its
// second operand then.
//
// Quotients are those of a true division. Where an instruction set has fused multiply-adds, they are found without
// its latency: with r = 1 / s correctly rounded, q = x r + (x - x r s) r is off by less than one unit in the last
// place, the remainder x - q s is exact, and q + (x - q s) r is the correctly rounded quotient (Markstein 1990; Muller
// et al., Handbook of Floating-Point Arithmetic, 4.7). x is first clamped to 2^18 s, far outside of all codes, so that
// infinities do not meet a remainder; quotients too small for an exact remainder round to 0 either way.
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
    const F inverse;
    const F least;
    const F most;
    const bool divides;

    BW_INLINE explicit Quantize(const Quantizer& q)
        : scale(S::set(q.scale)), low(S::set(q.low)), high(S::set(q.high)), offset(S::set_int(q.offset)),
          inverse(S::set(q.inverse)), least(S::set(-0x1p18f * q.scale)), most(S::set(0x1p18f * q.scale)),
          divides(q.inverse == 0.0f) {}

    BW_INLINE F quotient(F x) const {
        if constexpr (S::kFused) {
            if (divides) return S::div(x, scale);
            x = S::min(S::max(x, least), most);
            const F near = S::mul(x, inverse);
            const F close = S::fma(S::fnma(near, scale, x), inverse, near);
            return S::fma(S::fnma(close, scale, x), inverse, close);
        } else {
            return S::div(x, scale);
        }
    }

    // code - z, before the offset
    BW_INLINE I centred(F x) const { return S::round(S::min(S::max(quotient(x), low), high)); }
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

// One side of a sum as values (code - z) * s; the integers are exact as floats, so the product rounds once.
template <class S>
struct SideValues {
    const Side& side;
    const Quantize<S> quantize;

    BW_INLINE explicit SideValues(const Side& s) : side(s), quantize(s.quantizer) {}
    BW_INLINE typename S::F floats(const float* x) const {
        return S::mul(S::to_float(quantize.centred(S::load(x))), quantize.scale);
    }
    BW_INLINE typename S::F bytes(const uint8_t* x) const {
        return S::mul(S::to_float(S::sub_int(S::load_u8(x), quantize.offset)), quantize.scale);
    }
    BW_INLINE typename S::F at(int64_t i) const {
        return side.bytes != nullptr ? bytes(side.bytes + i) : floats(side.x + i);
    }
    BW_INLINE typename S::F tail(int64_t i, int64_t count) const {
        float values[kLanes] = {};
        uint8_t codes[kLanes] = {};
        for (int64_t j = 0; i + j < count; ++j) {
            if (side.bytes != nullptr) {
                codes[j] = side.bytes[i + j];
            } else {
                values[j] = side.x[i + j];
            }
        }
        return side.bytes != nullptr ? bytes(codes) : floats(values);
    }
};

template <class S>
void add_run(const Sum& sum) {
    const SideValues<S> left(sum.a);
    const SideValues<S> right(sum.b);
    const Quantize<S> to(sum.to);
    int64_t i = 0;
    for (; i + kLanes <= sum.count; i += kLanes) {
        const typename S::F value = S::add(left.at(i), right.at(i));
        if (sum.bytes != nullptr) {
            S::store_bytes(sum.bytes + i, to.code(value));
        } else {
            S::store(sum.y + i, value);
        }
    }
    if (i == sum.count) return;
    const typename S::F value = S::add(left.tail(i, sum.count), right.tail(i, sum.count));
    float values[kLanes];
    uint8_t codes[kLanes];
    S::store(values, value);
    S::store_bytes(codes, to.code(value));
    for (int64_t j = 0; i + j < sum.count; ++j) {
        if (sum.bytes != nullptr) {
            sum.bytes[i + j] = codes[j];
        } else {
            sum.y[i + j] = values[j];
        }
    }
}

}  // namespace bitwright
