// Plain C++ for every other machine, and the yardstick for the vector files: a logical vector is an array
// of 16. The loops are short and simple so that a compiler can vectorize them for its baseline. Layouts in
// dispatch.h.
#include <cfloat>

#include "kernels.h"

namespace bitwright {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "float expressions must be rounded to float32 after each operation");

struct Portable {
    struct F {
        float v[kLanes];
    };
    struct I {
        int32_t v[kLanes];
    };
    struct Raw {
        uint32_t v[kLanes];
    };
    struct Bytes {  // unpacked weights, 4 consecutive k per lane
        int32_t v[4][kLanes];
    };
    struct Four {
        int32_t v[4];
    };
    static constexpr int kTileRows = 4;
    static constexpr int kTileBlocks = 1;
    static constexpr int kNarrowRows = 1;
    static constexpr int kNarrowBlocks = 1;
    static constexpr int kPixels = 2;
    static constexpr int kDecodedRows = 4;
    static constexpr int kSingleBlocks = 1;
    static constexpr int kByteBias = 0;
    static constexpr bool kPairs = false;
    static constexpr bool kHalves = false;
    static constexpr bool kConsecutive = false;
    static constexpr bool kFused = false;
    static constexpr int kSignedHalf = 0;
    using Table = F;

    template <class V, class Fn>
    static BW_INLINE V each(Fn fn) {
        V out;
        for (int i = 0; i < kLanes; ++i) out.v[i] = fn(i);
        return out;
    }

    static BW_INLINE F set(float v) {
        return each<F>([=](int) { return v; });
    }
    static BW_INLINE F load(const float* p) {
        return each<F>([=](int i) { return p[i]; });
    }
    static BW_INLINE void store(float* p, const F& v) { std::memcpy(p, v.v, sizeof v.v); }
    static BW_INLINE F add(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] + b.v[i]; });
    }
    static BW_INLINE F sub(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] - b.v[i]; });
    }
    // v where a <= b, else 0
    static BW_INLINE F keep(const F& v, const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] <= b.v[i] ? v.v[i] : 0.0f; });
    }
    static BW_INLINE F mul(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] * b.v[i]; });
    }
    static BW_INLINE F fma(const F& a, const F& b, const F& c) { return add(mul(a, b), c); }
    static BW_INLINE F div(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] / b.v[i]; });
    }
    // The second operand wins against NaN, as in the vector instructions.
    static BW_INLINE F min(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    static BW_INLINE F max(const F& a, const F& b) {
        return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static BW_INLINE F abs(const F& a) {
        return each<F>([&](int i) { return a.v[i] < 0.0f ? -a.v[i] : a.v[i]; });
    }
    // Adding 1.5 * 2^23 leaves no fraction bits: the sum rounds half to even. Callers have clamped to small
    // numbers.
    static BW_INLINE I round(const F& a) {
        constexpr float kMagic = 12582912.0f;
        return each<I>([&](int i) { return static_cast<int32_t>((a.v[i] + kMagic) - kMagic); });
    }
    static BW_INLINE F to_float(const I& a) {
        return each<F>([&](int i) { return static_cast<float>(a.v[i]); });
    }

    // 32-bit arithmetic wraps in the vector files; unsigned numbers say the same without undefined behaviour.
    static BW_INLINE int32_t wrap(uint32_t v) { return static_cast<int32_t>(v); }
    static BW_INLINE uint32_t bits(int32_t v) { return static_cast<uint32_t>(v); }
    static BW_INLINE void pin(I&) {}
    static BW_INLINE I set_int(int32_t v) {
        return each<I>([=](int) { return v; });
    }
    static BW_INLINE I load_int(const int32_t* p) {
        return each<I>([=](int i) { return p[i]; });
    }
    static BW_INLINE void store_int(int32_t* p, const I& v) { std::memcpy(p, v.v, sizeof v.v); }
    static BW_INLINE I add_int(const I& a, const I& b) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) + bits(b.v[i])); });
    }
    static BW_INLINE I sub_int(const I& a, const I& b) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) - bits(b.v[i])); });
    }
    static BW_INLINE I mul_int(const I& a, const I& b) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) * bits(b.v[i])); });
    }
    static BW_INLINE I shift_byte(const I& a) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) << 8); });
    }
    static BW_INLINE void store_bytes(uint8_t* p, const I& v) {
        for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v.v[i]);
    }
    // Words of 4 channels (16 pixels each) to 16 bytes per pixel.
    static BW_INLINE void store_pixels(uint8_t* p, const I& a, const I& b, const I& c, const I& d) {
        for (int i = 0; i < kLanes; ++i) {
            const int32_t words[4] = {a.v[i], b.v[i], c.v[i], d.v[i]};
            std::memcpy(p + i * kLanes, words, sizeof words);
        }
    }
    static BW_INLINE int64_t pixel_at(int64_t pixel) { return pixel; }
    static BW_INLINE I load_u8(const uint8_t* p) {
        return each<I>([=](int i) { return p[i]; });
    }
    static BW_INLINE I load_s8(const int8_t* p) {
        return each<I>([=](int i) { return p[i]; });
    }
    static BW_INLINE I mul_add(const I& acc, const I& x, const I& w) { return add_int(acc, mul_int(x, w)); }

    static BW_INLINE Table table(const float* p) { return load(p); }
    static BW_INLINE I load_codes(const uint8_t* p) {
        I codes;
        std::memcpy(codes.v, p, sizeof codes.v);
        return codes;
    }
    template <int COUNT>
    static BW_INLINE I shift_right(const I& a) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) >> COUNT); });
    }
    // Byte T of every lane as a signed number.
    template <int T>
    static BW_INLINE I signed_byte(const I& a) {
        return each<I>([&](int i) { return wrap(bits(a.v[i]) << (24 - 8 * T)) >> 24; });
    }
    // The low two bits of `low` and, above them, bit K of `high`.
    template <int K>
    static BW_INLINE I low_two(const I& low, const I& high) {
        return each<I>([&](int i) { return wrap((bits(low.v[i]) & 3u) | ((bits(high.v[i]) >> K & 1u) << 2)); });
    }
    template <int BITS>
    static BW_INLINE F look_up(const Table& table, const I& codes) {
        return each<F>([&](int i) { return table.v[bits(codes.v[i]) & 15u]; });
    }

    static BW_INLINE Raw load_raw(const uint8_t* p) {
        Raw raw;
        std::memcpy(raw.v, p, sizeof raw.v);
        return raw;
    }
    // A lane's four bytes are one word; shifting it by whole fields keeps the loop free of byte shuffles.
    template <int BITS, int STEP>
    static BW_INLINE Bytes unpack(const Raw& raw) {
        Bytes out;
        for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < kLanes; ++i) {
                if constexpr (BITS >= 8) {
                    out.v[t][i] = wrap(raw.v[i] << (24 - 8 * t)) >> 24;
                } else {
                    out.v[t][i] = wrap((raw.v[i] >> (8 * t + STEP * BITS)) & ((1u << BITS) - 1));
                }
            }
        }
        return out;
    }
    // Unpacked lower two bits of a step and, above them, its third bits.
    template <int STEP>
    static BW_INLINE Bytes with_third(Bytes low, const Raw& third) {
        for (int t = 0; t < 4; ++t) {
            for (int i = 0; i < kLanes; ++i) low.v[t][i] |= wrap((third.v[i] >> (8 * t + STEP) & 1u) << 2);
        }
        return low;
    }
    template <int BITS>
    static BW_INLINE Four broadcast(const uint8_t* p) {
        Four out;
        for (int t = 0; t < 4; ++t)
            out.v[t] = BITS == 8 ? static_cast<int32_t>(p[t]) : static_cast<int8_t>(p[t]);
        return out;
    }
    template <int BITS>
    static BW_INLINE I dot(const I& acc, const Bytes& w, const Four& x) {
        return each<I>([&](int i) {
            const int32_t sum =
                x.v[0] * w.v[0][i] + x.v[1] * w.v[1][i] + x.v[2] * w.v[2][i] + x.v[3] * w.v[3][i];
            return wrap(bits(acc.v[i]) + bits(sum));
        });
    }
};

}  // namespace

const Kernels* portable_kernels() { return table<Portable>(); }

}  // namespace bitwright
