// Convolutions of any geometry and width, from contiguous, channels-last and other memory: every instruction set
// equals the definition bit for bit.
#include <algorithm>
#include <cmath>

#include "definition.h"

namespace bitwright::test {
namespace {

struct Case {
    Conv a;  // without pointers
    int64_t ho, wo;
    Encoding encoding;
    Buffer<float> x, w_scale, bias;
    Buffer<int8_t> codes;  // [o][c / groups][kh][kw]
    Buffer<int32_t> w_sum;
    bool has_bias;

    int64_t inputs() const { return a.c / a.groups; }
    // The centred code at a pixel, 0 outside of the image.
    int64_t code(int64_t image, int64_t channel, int64_t row, int64_t column) const {
        if (row < 0 || row >= a.h || column < 0 || column >= a.w) return 0;
        const int64_t at = image * a.x_stride[0] + channel * a.x_stride[1] + row * a.x_stride[2] + column * a.x_stride[3];
        return centred(x[at], encoding.scale, encoding.zero, encoding.range);
    }
};

Conv random_geometry(Random& random) {
    Conv a{};
    const bool depthwise = random.one_in(4), large = random.one_in(40);
    a.n = random.between(0, 3);
    a.groups = depthwise ? random.between(1, 40) : random.one_in(2) ? 1 : random.between(1, 4);
    a.c = a.groups * (depthwise ? 1 : random.between(1, random.one_in(3) ? 40 : 9));
    a.o = depthwise ? a.groups : a.groups * random.between(1, large ? 70 : 20);
    a.kh = random.between(1, 4);
    a.kw = random.between(1, 4);
    if (random.one_in(4)) a.kh = a.kw = 1;
    a.stride_h = random.between(1, 3);
    a.stride_w = random.between(1, 3);
    a.pad_h = random.one_in(2) ? 0 : random.between(1, 3);
    a.pad_w = random.one_in(2) ? 0 : random.between(1, 3);
    a.dil_h = random.between(1, 2);
    a.dil_w = random.between(1, 2);
    a.h = std::max<int64_t>(1, (a.kh - 1) * a.dil_h + 1 - 2 * a.pad_h) + random.between(0, large ? 60 : 9);
    a.w = std::max<int64_t>(1, (a.kw - 1) * a.dil_w + 1 - 2 * a.pad_w) + random.between(0, large ? 70 : 20);
    const int widths[] = {8, 4, 3, 2};
    a.bits = widths[random.between(0, 3)];
    return a;
}

// More weights than a thread unpacks at once, and few pixels.
Conv deep_geometry(Random& random) {
    Conv a = random_geometry(random);
    a.n = 1;
    a.groups = random.between(1, 2);
    a.c = a.groups * random.between(120, 200);
    a.o = a.groups * random.between(150, 250);
    a.kh = a.kw = 3;
    a.h = 2 * a.dil_h + 1 + random.between(0, 5);
    a.w = 2 * a.dil_w + 1 + random.between(0, 5);
    a.pad_h = a.pad_w = 0;
    return a;
}

// Strides of contiguous or channels-last images, sometimes with gaps; returns the elements they span.
int64_t lay_out(Conv& a, Random& random) {
    const int64_t gap = random.one_in(3) ? random.between(1, 3) : 0;
    if (random.one_in(2)) {
        a.x_stride[3] = random.one_in(8) ? 2 : 1;
        a.x_stride[2] = a.w * a.x_stride[3] + gap;
        a.x_stride[1] = a.h * a.x_stride[2] + gap;
        a.x_stride[0] = a.c * a.x_stride[1];
    } else {
        a.x_stride[1] = 1;
        a.x_stride[3] = a.c + gap;
        a.x_stride[2] = a.w * a.x_stride[3] + gap;
        a.x_stride[0] = a.h * a.x_stride[2];
    }
    const int64_t last = (a.n - 1) * a.x_stride[0] + (a.c - 1) * a.x_stride[1] + (a.h - 1) * a.x_stride[2] +
                         (a.w - 1) * a.x_stride[3];
    return a.n == 0 ? 0 : last + 1;
}

Case make_case(Random& random) {
    Conv a = random.one_in(50) ? deep_geometry(random) : random_geometry(random);
    const int64_t span = lay_out(a, random), taps = a.c / a.groups * a.kh * a.kw;
    const Encoding encoding = random_encoding(random, false);
    Case c{a, (a.h + 2 * a.pad_h - a.dil_h * (a.kh - 1) - 1) / a.stride_h + 1,
           (a.w + 2 * a.pad_w - a.dil_w * (a.kw - 1) - 1) / a.stride_w + 1, encoding,
           activations(random, span, encoding.scale, true), numbers(random, a.o, 0.001f, 0.1f),
           numbers(random, a.o, -1.0f, 1.0f), Buffer<int8_t>(a.o * taps, random), Buffer<int32_t>(a.o, random),
           random.one_in(2)};
    const int64_t half = int64_t{1} << (a.bits - 1);
    for (int64_t i = 0; i < a.o * taps; ++i) {
        c.codes[i] = static_cast<int8_t>(random.between(-half, half - 1));
        c.w_sum[i / taps] += c.codes[i];
    }
    return c;
}

float output(const Case& c, int64_t image, int64_t row, int64_t column, int64_t o) {
    const Conv& a = c.a;
    const int64_t first = o / (a.o / a.groups) * c.inputs();
    const int8_t* codes = c.codes.data() + o * c.inputs() * a.kh * a.kw;
    int64_t sum = 0;
    for (int64_t channel = 0; channel < c.inputs(); ++channel) {
        for (int64_t i = 0; i < a.kh; ++i) {
            for (int64_t j = 0; j < a.kw; ++j) {
                const int64_t y = row * a.stride_h - a.pad_h + i * a.dil_h, x = column * a.stride_w - a.pad_w + j * a.dil_w;
                sum += c.code(image, first + channel, y, x) * *codes++;
            }
        }
    }
    const float value = static_cast<float>(sum) * (c.encoding.scale * c.w_scale[o]);
    return c.has_bias ? value + c.bias[o] : value;
}

Buffer<float> defined(const Case& c, Random& random) {
    Buffer<float> y(c.a.n * c.ho * c.wo * c.a.o, random);
    int64_t at = 0;
    for (int64_t image = 0; image < c.a.n; ++image) {
        for (int64_t row = 0; row < c.ho; ++row) {
            for (int64_t column = 0; column < c.wo; ++column) {
                for (int64_t o = 0; o < c.a.o; ++o) y[at++] = output(c, image, row, column, o);
            }
        }
    }
    return y;
}

// Bytes that a layer asks for, and what they have to be: those of results [pixels][channels], each clamped first.
struct Wanted {
    Encoding encoding;
    float low, high;
    int64_t channels, pixel;
    Buffer<uint8_t> bytes;  // [pixels][channels rounded up to 4]

    Bytes to(uint8_t* out) const { return {out, encoding.scale, encoding.zero, encoding.range, low, high}; }
};

Wanted wanted_bytes(const Buffer<float>& results, int64_t channels, Random& random) {
    const int64_t pixels = results.size() / channels, pixel = round_up(channels, 4);
    const bool relu = random.one_in(2);
    Wanted w{random_encoding(random, true), relu ? 0.0f : -INFINITY, random.one_in(2) ? random.uniform(0.1f, 6.0f) : INFINITY,
             channels, pixel, Buffer<uint8_t>(pixels * pixel, random)};
    const Encoding& e = w.encoding;
    for (int64_t i = 0; i < results.size(); ++i) {
        const float value = std::min(std::max(results[i], w.low), w.high);
        const int32_t code = centred(value, e.scale, e.zero, e.range) + static_cast<int32_t>(e.zero);
        w.bytes[i / channels * pixel + i % channels] = static_cast<uint8_t>(code + (e.range.qmin < 0 ? 128 : 0));
    }
    return w;
}

// What lies between the channels of two pixels is nobody's.
void expect_bytes(const Buffer<uint8_t>& found, const Wanted& wanted, const std::string& what) {
    for (int64_t i = 0; i < found.size(); ++i) {
        if (i % wanted.pixel >= wanted.channels) continue;
        expect(found[i] == wanted.bytes[i], what + ": byte " + std::to_string(i) + " is " + std::to_string(found[i]) +
                                                ", not " + std::to_string(wanted.bytes[i]));
    }
}

// The same convolution from bytes, to floats and to bytes.
void test_bytes(const Case& c, Conv a, const Buffer<float>& results, const InstructionSet& isa, Random& random) {
    const int64_t pixel = round_up(a.c, 4);
    Buffer<uint8_t> image(a.n * a.h * a.w * pixel, random);
    encode_images(isa.number, c.x.data(), a.n, a.c, a.h, a.w, a.x_stride,
                  {image.data(), a.scale, a.zero, a.range, -INFINITY, INFINITY}, a.threads);
    a.x = nullptr;
    a.x_bytes = image.data();
    const int64_t strides[] = {a.h * a.w * pixel, 1, a.w * pixel, pixel};
    std::copy(strides, strides + 4, a.x_stride);
    Buffer<float> y(results.size(), random);
    a.y = y.data();
    conv2d(a);
    expect_equal(y, results, std::string("conv2d of bytes on ") + isa.name);
    const Wanted wanted = wanted_bytes(results, a.o, random);
    Buffer<uint8_t> out(wanted.bytes.size(), random);
    a.y = nullptr;
    a.to = wanted.to(out.data());
    conv2d(a);
    expect_bytes(out, wanted, std::string("conv2d to bytes on ") + isa.name);
}

}  // namespace

void test_conv(int64_t cases) {
    Random random(5);
    for (int64_t i = 0; i < cases; ++i) {
        const Case c = make_case(random);
        Conv a = c.a;
        Buffer<uint8_t> packed(conv_layout_bytes(a.bits, a.o, c.inputs(), a.kh, a.kw, a.groups), random);
        pack_conv(c.codes.data(), a.bits, a.o, c.inputs(), a.kh, a.kw, a.groups, packed.data());
        Buffer<int8_t> unpacked(a.o * c.inputs() * a.kh * a.kw, random);
        unpack_conv(packed.data(), a.bits, a.o, c.inputs(), a.kh, a.kw, a.groups, unpacked.data());
        expect_same(unpacked, c.codes, "conv2d: unpacked codes");
        const Buffer<float> wanted = defined(c, random);
        a.x = c.x.data();
        a.scale = c.encoding.scale;
        a.zero = c.encoding.zero;
        a.range = c.encoding.range;
        a.weight = packed.data();
        a.w_scale = c.w_scale.data();
        a.w_sum = c.w_sum.data();
        a.bias = c.has_bias ? c.bias.data() : nullptr;
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<float> y(wanted.size(), random);
            a.isa = isa.number;
            a.threads = static_cast<int>(random.between(1, 3));
            a.y = y.data();
            conv2d(a);
            expect_equal(y, wanted, std::string("conv2d on ") + isa.name + ", case " + std::to_string(i));
            test_bytes(c, a, wanted, isa, random);
        }
    }
}

}  // namespace bitwright::test
