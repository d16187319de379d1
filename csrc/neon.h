// The primitives of 64-bit Arm with the dot product instructions (Armv8.2 and up): a logical vector is four 128-bit
// registers, SDOT multiplies signed bytes and adds four products to a 32-bit lane without saturation. Weights of at
// most 4 bits are signed bytes as they are; at 8 bits the activations are made signed by flipping their highest bit,
// which takes 128 off each (kByteBias). Tiles of 5 rows x 1 block: 20 accumulators, 4 weights and one broadcast of the
// 32 registers; with a sixth row GCC 12 keeps some in memory. Layouts in dispatch.h; unaligned access throughout.
// Everything here is local to the file that includes it (see simd.h).
#pragma once

#include <arm_neon.h>

#include "kernels.h"

namespace bitwright {
namespace {

struct Neon {
    struct F {
        float32x4_t v[4];
    };
    struct I {
        int32x4_t v[4];
    };
    struct Raw {
        uint8x16_t v[4];
    };
    struct Bytes {  // unpacked weights, 4 consecutive k per lane
        int8x16_t v[4];
    };
    static constexpr int kTileRows = 5;
    static constexpr int kTileBlocks = 1;
    static constexpr int kNarrowRows = 1;
    static constexpr int kNarrowBlocks = 2;
    static constexpr int kPixels = 4;
    static constexpr int kDecodedRows = 4;
    static constexpr int kSingleBlocks = 1;
    static constexpr int kByteBias = 128;
    static constexpr bool kPairs = false;
    static constexpr bool kHalves = false;
    static constexpr bool kConsecutive = false;
    static constexpr bool kFused = false;
    static constexpr int kSignedHalf = 0;
    using Table = uint8x16x4_t;

    template <class V, class Fn>
    static BW_INLINE V each(Fn fn) {
        return V{{fn(0), fn(1), fn(2), fn(3)}};
    }

    static BW_INLINE F set(float v) {
        return each<F>([=](int) { return vdupq_n_f32(v); });
    }
    static BW_INLINE F load(const float* p) {
        return each<F>([=](int i) { return vld1q_f32(p + 4 * i); });
    }
    static BW_INLINE void store(float* p, F a) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
    }
    static BW_INLINE F add(F a, F b) {
        return each<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
    }
    static BW_INLINE F sub(F a, F b) {
        return each<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
    }
    // v where a <= b, else 0
    static BW_INLINE F keep(F v, F a, F b) {
        return each<F>([&](int i) {
            return vreinterpretq_f32_u32(vandq_u32(vcleq_f32(a.v[i], b.v[i]), vreinterpretq_u32_f32(v.v[i])));
        });
    }
    static BW_INLINE F mul(F a, F b) {
        return each<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
    }
    static BW_INLINE F fma(F a, F b, F c) {
        return each<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
    }
    static BW_INLINE F div(F a, F b) {
        return each<F>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
    }
    // FMIN and FMAX pass NaN on; here the second operand wins against it.
    static BW_INLINE F min(F a, F b) {
        return each<F>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static BW_INLINE F max(F a, F b) {
        return each<F>([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
    }
    static BW_INLINE F abs(F a) {
        return each<F>([&](int i) { return vabsq_f32(a.v[i]); });
    }
    static BW_INLINE I round(F a) {
        return each<I>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
    }
    static BW_INLINE F to_float(I a) {
        return each<F>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
    }

    static BW_INLINE void pin(I&) {}
    static BW_INLINE I set_int(int32_t v) {
        return each<I>([=](int) { return vdupq_n_s32(v); });
    }
    static BW_INLINE I load_int(const int32_t* p) {
        return each<I>([=](int i) { return vld1q_s32(p + 4 * i); });
    }
    static BW_INLINE void store_int(int32_t* p, I a) {
        for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
    }
    static BW_INLINE I add_int(I a, I b) {
        return each<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
    }
    static BW_INLINE I sub_int(I a, I b) {
        return each<I>([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
    }
    static BW_INLINE I mul_int(I a, I b) {
        return each<I>([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
    }
    static BW_INLINE I shift_byte(I a) {
        return each<I>([&](int i) { return vshlq_n_s32(a.v[i], 8); });
    }
    static BW_INLINE void store_bytes(uint8_t* p, I a) {
        const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
        const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
        vst1q_u8(p, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
    }
    // Words of 4 channels (16 pixels each) to 16 bytes per pixel.
    static BW_INLINE void store_pixels(uint8_t* p, const I& a, const I& b, const I& c, const I& d) {
        int32_t* words = reinterpret_cast<int32_t*>(p);
        for (int i = 0; i < 4; ++i) vst4q_s32(words + 16 * i, int32x4x4_t{{a.v[i], b.v[i], c.v[i], d.v[i]}});
    }
    static BW_INLINE int64_t pixel_at(int64_t pixel) { return pixel; }
    static BW_INLINE I load_u8(const uint8_t* p) {
        const uint8x16_t bytes = vld1q_u8(p);
        const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
        return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
    }
    static BW_INLINE I load_s8(const int8_t* p) {
        const int8x16_t bytes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
        return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                 vmovl_s16(vget_high_s16(high))}};
    }
    static BW_INLINE I mul_add(I acc, I x, I w) {
        return each<I>([&](int i) { return vmlaq_s32(acc.v[i], x.v[i], w.v[i]); });
    }

    static BW_INLINE Table table(const float* p) {
        return {{vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4)),
                 vreinterpretq_u8_f32(vld1q_f32(p + 8)), vreinterpretq_u8_f32(vld1q_f32(p + 12))}};
    }
    static BW_INLINE I load_codes(const uint8_t* p) {
        return each<I>([=](int i) { return vreinterpretq_s32_u8(vld1q_u8(p + 16 * i)); });
    }
    template <int COUNT>
    static BW_INLINE I shift_right(I a) {
        if constexpr (COUNT == 0) {
            return a;
        } else {
            return each<I>([&](int i) {
                return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), COUNT));
            });
        }
    }
    // Byte T of every lane as a signed number.
    template <int T>
    static BW_INLINE I signed_byte(I a) {
        return each<I>([&](int i) { return vshrq_n_s32(vshlq_n_s32(a.v[i], 24 - 8 * T), 24); });
    }
    // The low two bits of `low` and, above them, bit K of `high`.
    template <int K>
    static BW_INLINE I low_two(I low, I high) {
        const I third = shift_right<K>(high);
        return each<I>([&](int i) {
            return vorrq_s32(vandq_s32(low.v[i], vdupq_n_s32(3)), vandq_s32(vshlq_n_s32(third.v[i], 2), vdupq_n_s32(4)));
        });
    }
    // The table has 64 bytes; value c is at the four from 4c on.
    template <int BITS>
    static BW_INLINE F look_up(Table table, I codes) {
        return each<F>([&](int i) {
            const uint32x4_t code = vandq_u32(vreinterpretq_u32_s32(codes.v[i]), vdupq_n_u32(15));
            const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100u), code, vdupq_n_u32(0x04040404u));
            return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
        });
    }

    static BW_INLINE Raw load_raw(const uint8_t* p) {
        return each<Raw>([=](int i) { return vld1q_u8(p + 16 * i); });
    }
    template <int COUNT>
    static BW_INLINE uint8x16_t shift_bytes(uint8x16_t a) {
        if constexpr (COUNT > 0) {
            return vshrq_n_u8(a, COUNT);
        } else {
            return vshlq_n_u8(a, -COUNT);
        }
    }
    template <int BITS, int STEP>
    static BW_INLINE Bytes unpack(Raw raw) {
        return each<Bytes>([&](int i) {
            if constexpr (BITS >= 8) {
                return vreinterpretq_s8_u8(raw.v[i]);
            } else {
                return vreinterpretq_s8_u8(vandq_u8(shift_bytes<STEP * BITS>(raw.v[i]), vdupq_n_u8((1 << BITS) - 1)));
            }
        });
    }
    // Unpacked lower two bits of a step and, above them, its third bits.
    template <int STEP>
    static BW_INLINE Bytes with_third(Bytes low, Raw third) {
        return each<Bytes>([&](int i) {
            const uint8x16_t bit = vandq_u8(shift_bytes<STEP - 2>(third.v[i]), vdupq_n_u8(4));
            return vorrq_s8(low.v[i], vreinterpretq_s8_u8(bit));
        });
    }
    template <int BITS>
    static BW_INLINE int8x16_t broadcast(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
        return BITS == 8 ? veorq_s8(x, vdupq_n_s8(-128)) : x;
    }
    template <int BITS>
    static BW_INLINE I dot(I acc, Bytes w, int8x16_t x) {
        return each<I>([&](int i) { return vdotq_s32(acc.v[i], w.v[i], x); });
    }
};

}  // namespace
}  // namespace bitwright
