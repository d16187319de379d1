// Codes back from the layouts that linear.cpp and decoded.cpp pack: a model in memory holds its weights in these
// layouts alone. Padding is left out. Convolutions: conv_weights.cpp.
#include "ops.h"

namespace bitwright {
namespace {

// Where the bits of one input lie inside a unit of 16 rows: the lower ones, and at 3 bits the third.
struct Place {
    int64_t low, low_shift, third, third_shift;
};

struct Layout {
    int64_t bits, inputs, bytes;  // of a unit
    Place (*place)(int64_t bits, int64_t input);
};

// Steps of 4 inputs; fields of a byte belong to consecutive steps.
Place linear_place(int64_t bits, int64_t input) {
    const int64_t width = bits == 3 ? 2 : bits, per_load = 8 / width, step = input / 4;
    return {step / per_load * kGroupBytes + input % 4, step % per_load * width, 2 * kGroupBytes + input % 4, step};
}

// The same, but third bits are consecutive in the lane.
Place decoded_place(int64_t bits, int64_t input) {
    const Place place = linear_place(bits, input);
    return {place.low, place.low_shift, 2 * kGroupBytes + input / 8, input % 8};
}

Layout layout_of(int64_t bits, Place (*place)(int64_t, int64_t)) {
    return {bits, bits == 3 ? 32 : 32 / bits, bits == 3 ? 3 * kGroupBytes : kGroupBytes, place};
}

template <class CODE>
void unpack(const uint8_t* in, const Layout& layout, int64_t n, int64_t k, int offset, CODE* codes) {
    const int64_t units = ceil_div(k, layout.inputs);
    const int mask = layout.bits == 3 ? 3 : (1 << layout.bits) - 1;
    for (int64_t row = 0; row < n; ++row) {
        const uint8_t* lane = in + row / kLanes * units * layout.bytes + row % kLanes * 4;
        for (int64_t i = 0; i < k; ++i) {
            const Place place = layout.place(layout.bits, i % layout.inputs);
            const uint8_t* unit = lane + i / layout.inputs * layout.bytes;
            int code = unit[place.low] >> place.low_shift & mask;
            if (layout.bits == 3) code |= (unit[place.third] >> place.third_shift & 1) << 2;
            codes[row * k + i] = static_cast<CODE>(code - offset);
        }
    }
}

}  // namespace

void unpack_linear(const uint8_t* in, int64_t bits, int64_t n, int64_t k, int8_t* codes) {
    if (linear_layout_bytes(bits, n, k) == 0) return;
    require(in != nullptr && codes != nullptr, "null pointer");
    unpack(in, layout_of(bits, linear_place), n, k, bits == 8 ? 0 : 1 << (bits - 1), codes);
}

void unpack_decoded(const uint8_t* in, int64_t bits, int64_t n, int64_t k, uint8_t* codes) {
    if (decoded_layout_bytes(bits, n, k) == 0) return;
    require(in != nullptr && codes != nullptr, "null pointer");
    unpack(in, layout_of(bits, decoded_place), n, k, 0, codes);
}

}  // namespace bitwright
