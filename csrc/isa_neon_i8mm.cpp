// 64-bit Arm with the matrix instructions for bytes (I8MM, Armv8.6 and some before): SMMLA multiplies 8 inputs of two
// rows by those of two channels and adds to the four sums, twice the products of SDOT. Two steps of packed weights,
// zipped, are the operand for pairs of channels, and serve every pair of rows. While products are added, the sums of two
// rows lie in each other's registers: in place of channels 4i..4i+3 of its own row, the first holds channels 4i and
// 4i+1 of both, the second 4i+2 and 4i+3. A single row keeps to SDOT.
#include "neon.h"

namespace bitwright {
namespace {

struct NeonI8mm : Neon {
    static constexpr int kTileRows = 6;
    static constexpr bool kPairs = true;

    // From rows to pairs, and back.
    static BW_INLINE void exchange(I& a, I& b) {
        for (int i = 0; i < 4; ++i) {
            const int64x2_t first = vreinterpretq_s64_s32(a.v[i]), second = vreinterpretq_s64_s32(b.v[i]);
            a.v[i] = vreinterpretq_s32_s64(vzip1q_s64(first, second));
            b.v[i] = vreinterpretq_s32_s64(vzip2q_s64(first, second));
        }
    }
    static BW_INLINE Bytes no_weights() {
        return each<Bytes>([](int) { return vdupq_n_s8(0); });
    }
    // 8 inputs of two rows; with STEPS = 1 there are only 4, and the others meet weights of zero.
    template <int BITS, int STEPS>
    static BW_INLINE int8x16_t two_rows(const uint8_t* a, const uint8_t* b) {
        if constexpr (STEPS == 1) {
            const int8x16_t first = broadcast<BITS>(a), second = broadcast<BITS>(b);
            return vcombine_s8(vget_low_s8(first), vget_low_s8(second));
        } else {
            const int8x16_t x = vreinterpretq_s8_u8(vcombine_u8(vld1_u8(a), vld1_u8(b)));
            return BITS == 8 ? veorq_s8(x, vdupq_n_s8(-128)) : x;
        }
    }
    // Channels 4I..4I+3 of two steps.
    template <int I>
    static BW_INLINE void zip(const Bytes& even, const Bytes& odd, int8x16_t& first, int8x16_t& second) {
        const int32x4_t a = vreinterpretq_s32_s8(even.v[I]), b = vreinterpretq_s32_s8(odd.v[I]);
        first = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        second = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    // Adds the products of two steps to the sums of COUNT pairs of rows.
    template <int COUNT, int ROWS>
    static BW_INLINE void multiply(I (&acc)[ROWS], const Bytes& even, const Bytes& odd, const int8x16_t (&x)[COUNT]) {
        quarter<0>(acc, even, odd, x);
        quarter<1>(acc, even, odd, x);
        quarter<2>(acc, even, odd, x);
        quarter<3>(acc, even, odd, x);
    }
    template <int I4, int COUNT, int ROWS>
    static BW_INLINE void quarter(I (&acc)[ROWS], const Bytes& even, const Bytes& odd, const int8x16_t (&x)[COUNT]) {
        int8x16_t first, second;
        zip<I4>(even, odd, first, second);
        BW_UNROLL
        for (int p = 0; p < COUNT; ++p) {
            acc[2 * p].v[I4] = vmmlaq_s32(acc[2 * p].v[I4], x[p], first);
            acc[2 * p + 1].v[I4] = vmmlaq_s32(acc[2 * p + 1].v[I4], x[p], second);
        }
    }
};

}  // namespace

const Kernels* neon_i8mm_kernels() { return table<NeonI8mm>(); }

}  // namespace bitwright
