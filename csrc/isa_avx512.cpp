// AVX-512 with VNNI: a logical vector is one zmm register, vpdpbusd multiplies unsigned by signed bytes and
// adds four products to a 32-bit lane without saturation. Tiles of 12 rows x 2 blocks: 24 accumulators, two
// weights and the broadcasts fill the 32 registers. Needs avx512f, bw, vl and vnni. Reads and writes are
// unaligned; layouts in dispatch.h.
#include <immintrin.h>

#include "kernels.h"

namespace bitwright {
namespace {

struct Avx512 {
    using F = __m512;
    using I = __m512i;
    using Raw = __m512i;
    static constexpr int kTileRows = 12;
    static constexpr int kTileBlocks = 2;
    static constexpr int kNarrowRows = 3;
    static constexpr int kNarrowBlocks = 4;
    static constexpr int kPixels = 8;
    static constexpr int kDecodedRows = 12;
    static constexpr int kSingleBlocks = 4;
    static constexpr int kByteBias = 0;
    static constexpr bool kPairs = false;
    static constexpr bool kHalves = false;
    static constexpr bool kConsecutive = false;
    static constexpr bool kFused = true;
    static constexpr int kSignedHalf = 128;
    using Table = __m512;

    static BW_INLINE F set(float v) { return _mm512_set1_ps(v); }
    static BW_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static BW_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static BW_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static BW_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static BW_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    // v where a <= b, else 0
    static BW_INLINE F keep(F v, F a, F b) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), v);
    }
    static BW_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // c - a * b
    static BW_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
    static BW_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static BW_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
    static BW_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static BW_INLINE F abs(F a) { return _mm512_abs_ps(a); }
    static BW_INLINE I round(F a) {
        return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static BW_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }

    static BW_INLINE void pin(I& a) { BW_PIN(a); }
    static BW_INLINE I set_int(int32_t v) { return _mm512_set1_epi32(v); }
    static BW_INLINE I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
    static BW_INLINE void store_int(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static BW_INLINE I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
    static BW_INLINE I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
    static BW_INLINE I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static BW_INLINE I shift_byte(I a) { return _mm512_slli_epi32(a, 8); }
    static BW_INLINE void store_bytes(uint8_t* p, I v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
    }
    // Words of 4 channels (16 pixels each) to 16 bytes per pixel; the 4 x 4 transposes stay inside 128-bit
    // lanes, so the pixels come out in the order of pixel_at.
    static BW_INLINE void store_pixels(uint8_t* p, I a, I b, I c, I d) {
        const I ab_lo = _mm512_unpacklo_epi32(a, b), ab_hi = _mm512_unpackhi_epi32(a, b);
        const I cd_lo = _mm512_unpacklo_epi32(c, d), cd_hi = _mm512_unpackhi_epi32(c, d);
        _mm512_store_si512(p, _mm512_unpacklo_epi64(ab_lo, cd_lo));
        _mm512_store_si512(p + 64, _mm512_unpackhi_epi64(ab_lo, cd_lo));
        _mm512_store_si512(p + 128, _mm512_unpacklo_epi64(ab_hi, cd_hi));
        _mm512_store_si512(p + 192, _mm512_unpackhi_epi64(ab_hi, cd_hi));
    }
    static BW_INLINE int64_t pixel_at(int64_t pixel) { return pixel % 4 * 4 + pixel / 4; }
    static BW_INLINE I load_u8(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static BW_INLINE I load_s8(const int8_t* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    // The upper half of each x lane is 0, so the 16-bit pair product is x * w.
    static BW_INLINE I mul_add(I acc, I x, I w) { return _mm512_dpwssd_epi32(acc, x, w); }

    static BW_INLINE Table table(const float* p) { return _mm512_loadu_ps(p); }
    static BW_INLINE I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int COUNT>
    static BW_INLINE I shift_right(I a) {
        return COUNT == 0 ? a : _mm512_srli_epi32(a, COUNT);
    }
    // Byte T of every lane as a signed number.
    template <int T>
    static BW_INLINE I signed_byte(I a) {
        return _mm512_srai_epi32(T == 3 ? a : _mm512_slli_epi32(a, 24 - 8 * T), 24);
    }
    // The low two bits of `low` and, above them, bit K of `high`.
    template <int K>
    static BW_INLINE I low_two(I low, I high) {
        const I third = K < 2 ? _mm512_slli_epi32(high, K < 2 ? 2 - K : 0) : _mm512_srli_epi32(high, K < 2 ? 0 : K - 2);
        return _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), low, third, 0xCA);  // mask ? low : third
    }
    template <int BITS>
    static BW_INLINE F look_up(Table table, I codes) { return _mm512_permutexvar_ps(codes, table); }

    static BW_INLINE Raw load_raw(const uint8_t* p) { return _mm512_loadu_si512(p); }
    template <int BITS, int STEP>
    static BW_INLINE I unpack(Raw raw) {
        if constexpr (BITS == 8) {
            return raw;
        } else if constexpr (BITS == kSignedEight) {
            return _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
        } else {
            const I moved = STEP == 0 ? raw : _mm512_srli_epi16(raw, STEP * BITS);
            return _mm512_and_si512(moved, _mm512_set1_epi8((1 << BITS) - 1));
        }
    }
    // Unpacked lower two bits of a step and, above them, its third bits.
    template <int STEP>
    static BW_INLINE I with_third(I low, Raw third) {
        const I moved = STEP < 2 ? _mm512_slli_epi16(third, STEP < 2 ? 2 - STEP : 0)
                                 : _mm512_srli_epi16(third, STEP < 2 ? 0 : STEP - 2);
        return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi8(4), low, 0xEA);  // (moved & 4) | low
    }
    template <int BITS>
    static BW_INLINE I broadcast(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    template <int BITS>
    static BW_INLINE I dot(I acc, I w, I x) {
        return BITS == 8 ? _mm512_dpbusd_epi32(acc, x, w) : _mm512_dpbusd_epi32(acc, w, x);
    }
};

}  // namespace

const Kernels* avx512_kernels() { return table<Avx512>(); }

}  // namespace bitwright
