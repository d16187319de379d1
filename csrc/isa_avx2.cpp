// AVX2: a logical vector is a pair of ymm registers. vpmaddubsw saturates its 16-bit sums for 8-bit weights,
// so those are split into even and odd bytes of 16 bits each and multiplied with vpmaddwd, which is exact; narrower
// weights stay below the limit (halves.h). Tiles of 4 rows x 1 block: 8 accumulators.
// Layouts in dispatch.h; unaligned access throughout.
#include <immintrin.h>

#include "kernels.h"

namespace bitwright {
namespace {

// CONSECUTIVE: tables of values count up by 1, see decoded.h.
template <bool CONSECUTIVE>
struct Avx2For {
    struct F {
        __m256 lo, hi;
    };
    struct I {
        __m256i lo, hi;
    };
    using Raw = I;
    struct Split {  // 8-bit weights, widened
        __m256i lo_even, lo_odd, hi_even, hi_odd;
    };
    struct Four {  // four broadcast activations, widened
        __m256i even, odd;
    };
    static constexpr int kTileRows = 4;
    static constexpr int kTileBlocks = 1;
    static constexpr int kNarrowRows = 1;
    static constexpr int kNarrowBlocks = 2;
    static constexpr int kPixels = 4;
    static constexpr int kDecodedRows = 4;
    static constexpr int kSingleBlocks = 2;
    static constexpr int kByteBias = 0;
    static constexpr bool kPairs = false;
    static constexpr bool kHalves = true;
    static constexpr bool kConsecutive = !CONSECUTIVE;
    using Consecutive = Avx2For<true>;
    static constexpr bool kFused = false;
    static constexpr int kSignedHalf = 0;
    using Table = F;

    static BW_INLINE __m256i load_half(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }

    static BW_INLINE F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static BW_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static BW_INLINE void store(float* p, F v) {
        _mm256_storeu_ps(p, v.lo);
        _mm256_storeu_ps(p + 8, v.hi);
    }
    static BW_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
    static BW_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
    // v where a <= b, else 0
    static BW_INLINE F keep(F v, F a, F b) {
        return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), v.lo),
                _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ), v.hi)};
    }
    static BW_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
    static BW_INLINE F fma(F a, F b, F c) { return add(mul(a, b), c); }
    static BW_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
    static BW_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
    static BW_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
    static BW_INLINE F abs(F a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
    }
    static BW_INLINE __m256i round_half(__m256 a) {
        return _mm256_cvtps_epi32(_mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static BW_INLINE I round(F a) { return {round_half(a.lo), round_half(a.hi)}; }
    static BW_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

    static BW_INLINE void pin(I&) {}
    static BW_INLINE I set_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    static BW_INLINE I load_int(const int32_t* p) { return {load_half(p), load_half(p + 8)}; }
    static BW_INLINE void store_int(int32_t* p, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.lo);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.hi);
    }
    static BW_INLINE I add_int(I a, I b) {
        return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
    }
    static BW_INLINE I sub_int(I a, I b) {
        return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
    }
    static BW_INLINE I mul_int(I a, I b) {
        return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
    }
    static BW_INLINE I shift_byte(I a) { return {_mm256_slli_epi32(a.lo, 8), _mm256_slli_epi32(a.hi, 8)}; }
    static BW_INLINE void store_bytes(uint8_t* p, I v) {
        const __m256i mask = _mm256_set1_epi32(255);
        const __m256i words = _mm256_packus_epi32(_mm256_and_si256(v.lo, mask), _mm256_and_si256(v.hi, mask));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);  // packing works per 128-bit lane
        const __m128i bytes =
            _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    // Words of 4 channels to 16 bytes per pixel; the 4 x 4 transposes stay inside 128-bit lanes, see
    // pixel_at.
    static BW_INLINE void store_half(uint8_t* p, __m256i a, __m256i b, __m256i c, __m256i d) {
        const __m256i ab_lo = _mm256_unpacklo_epi32(a, b), ab_hi = _mm256_unpackhi_epi32(a, b);
        const __m256i cd_lo = _mm256_unpacklo_epi32(c, d), cd_hi = _mm256_unpackhi_epi32(c, d);
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi64(ab_lo, cd_lo));
        _mm256_store_si256(reinterpret_cast<__m256i*>(p + 64), _mm256_unpackhi_epi64(ab_lo, cd_lo));
        _mm256_store_si256(reinterpret_cast<__m256i*>(p + 128), _mm256_unpacklo_epi64(ab_hi, cd_hi));
        _mm256_store_si256(reinterpret_cast<__m256i*>(p + 192), _mm256_unpackhi_epi64(ab_hi, cd_hi));
    }
    static BW_INLINE void store_pixels(uint8_t* p, const I& a, const I& b, const I& c, const I& d) {
        store_half(p, a.lo, b.lo, c.lo, d.lo);
        store_half(p + 32, a.hi, b.hi, c.hi, d.hi);
    }
    static BW_INLINE int64_t pixel_at(int64_t pixel) { return pixel % 4 * 4 + pixel / 4; }
    static BW_INLINE __m128i eight(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
    static BW_INLINE I load_u8(const uint8_t* p) {
        return {_mm256_cvtepu8_epi32(eight(p)), _mm256_cvtepu8_epi32(eight(p + 8))};
    }
    static BW_INLINE I load_s8(const int8_t* p) {
        return {_mm256_cvtepi8_epi32(eight(p)), _mm256_cvtepi8_epi32(eight(p + 8))};
    }
    // The upper half of each x lane is 0, so the 16-bit pair product is x * w.
    static BW_INLINE I mul_add(I acc, I x, I w) {
        return add_int(acc, {_mm256_madd_epi16(x.lo, w.lo), _mm256_madd_epi16(x.hi, w.hi)});
    }

    static BW_INLINE Table table(const float* p) { return CONSECUTIVE ? set(p[0]) : load(p); }
    static BW_INLINE I load_codes(const uint8_t* p) { return {load_half(p), load_half(p + 32)}; }
    template <int COUNT>
    static BW_INLINE I shift_right(I a) {
        return {_mm256_srli_epi32(a.lo, COUNT), _mm256_srli_epi32(a.hi, COUNT)};
    }
    // Byte T of every lane as a signed number.
    template <int T>
    static BW_INLINE I signed_byte(I a) {
        return {_mm256_srai_epi32(_mm256_slli_epi32(a.lo, 24 - 8 * T), 24),
                _mm256_srai_epi32(_mm256_slli_epi32(a.hi, 24 - 8 * T), 24)};
    }
    // The low two bits of `low` and, above them, bit K of `high`.
    static BW_INLINE __m256i select_low_two(__m256i low, __m256i third) {
        const __m256i mask = _mm256_set1_epi32(3);
        return _mm256_or_si256(_mm256_and_si256(mask, low), _mm256_andnot_si256(mask, third));
    }
    template <int K>
    static BW_INLINE I low_two(I low, I high) {
        constexpr int kLeft = K < 2 ? 2 - K : 0, kRight = K < 2 ? 0 : K - 2;
        return {select_low_two(low.lo, _mm256_srli_epi32(_mm256_slli_epi32(high.lo, kLeft), kRight)),
                select_low_two(low.hi, _mm256_srli_epi32(_mm256_slli_epi32(high.hi, kLeft), kRight))};
    }
    // A permutation knows eight values, which are all that narrow codes have (tables of fewer are repeated); the fourth
    // bit of a wider code chooses between two of them.
    template <int BITS>
    static BW_INLINE __m256 look_up_half(Table table, __m256i codes) {
        const __m256 below = _mm256_permutevar8x32_ps(table.lo, codes);
        if constexpr (BITS <= 3) return below;
        const __m256 above = _mm256_permutevar8x32_ps(table.hi, codes);
        return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    template <int BITS>
    static BW_INLINE F look_up(Table table, I codes) {
        if constexpr (CONSECUTIVE) {
            const __m256i mask = _mm256_set1_epi32(15);
            return add(to_float({_mm256_and_si256(codes.lo, mask), _mm256_and_si256(codes.hi, mask)}), table);
        }
        return {look_up_half<BITS>(table, codes.lo), look_up_half<BITS>(table, codes.hi)};
    }

    static BW_INLINE Raw load_raw(const uint8_t* p) { return {load_half(p), load_half(p + 32)}; }
    template <int BITS, int STEP>
    static BW_INLINE auto unpack(Raw raw) {
        if constexpr (BITS >= 8) {
            return Split{_mm256_srai_epi16(_mm256_slli_epi16(raw.lo, 8), 8), _mm256_srai_epi16(raw.lo, 8),
                         _mm256_srai_epi16(_mm256_slli_epi16(raw.hi, 8), 8), _mm256_srai_epi16(raw.hi, 8)};
        } else {
            const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
            return I{_mm256_and_si256(_mm256_srli_epi16(raw.lo, STEP * BITS), mask),
                     _mm256_and_si256(_mm256_srli_epi16(raw.hi, STEP * BITS), mask)};
        }
    }
    // Unpacked lower two bits of a step and, above them, its third bits.
    template <int STEP>
    static BW_INLINE I with_third(I low, Raw third) {
        constexpr int kLeft = STEP < 2 ? 2 - STEP : 0, kRight = STEP < 2 ? 0 : STEP - 2;
        const __m256i mask = _mm256_set1_epi8(4);
        const __m256i lo = _mm256_srli_epi16(_mm256_slli_epi16(third.lo, kLeft), kRight);
        const __m256i hi = _mm256_srli_epi16(_mm256_slli_epi16(third.hi, kLeft), kRight);
        return {_mm256_or_si256(_mm256_and_si256(lo, mask), low.lo),
                _mm256_or_si256(_mm256_and_si256(hi, mask), low.hi)};
    }
    static BW_INLINE __m256i four(const uint8_t* p) {
        int32_t bytes;
        std::memcpy(&bytes, p, 4);
        return _mm256_set1_epi32(bytes);
    }
    template <int BITS>
    static BW_INLINE Four broadcast(const uint8_t* p) {
        const __m256i x = four(p);
        if constexpr (BITS == 8) {
            return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
        } else {
            return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
        }
    }
    template <int BITS>
    static BW_INLINE I dot(I acc, const Split& w, const Four& x) {
        acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo_even, x.even));
        acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi_even, x.even));
        acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo_odd, x.odd));
        acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi_odd, x.odd));
        return acc;
    }
    // Narrow weights: halves.h.
    using Half = __m256i;
    template <int HALF>
    static BW_INLINE Half half(const I& w) {
        return HALF == 0 ? w.lo : w.hi;
    }
    static BW_INLINE Half pairs(Half w, const uint8_t* x) { return _mm256_maddubs_epi16(w, four(x)); }
    static BW_INLINE Half add_halves(Half a, Half b) { return _mm256_add_epi16(a, b); }
    template <int HALF>
    static BW_INLINE void widen(I& acc, Half sum) {
        __m256i& to = HALF == 0 ? acc.lo : acc.hi;
        to = _mm256_add_epi32(to, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
};

}  // namespace

const Kernels* avx2_kernels() { return table<Avx2For<false>>(); }

}  // namespace bitwright
