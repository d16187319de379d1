// Sums of quantized tensors and the elementwise passes of a training step: codes equal the definition, gradients and
// moments are the same bits on every instruction set and for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "definition.h"

namespace bitwright::test {
namespace {

int64_t random_count(Random& random) { return random.one_in(10) ? random.between(20000, 50000) : random.between(0, 100); }
int threads(Random& random) { return static_cast<int>(random.between(1, 3)); }

}  // namespace

void test_add(int64_t cases) {
    Random random(6);
    for (int64_t i = 0; i < cases; ++i) {
        const int64_t count = random_count(random);
        const Encoding a = random_encoding(random, true), b = random_encoding(random, true);
        const Buffer<float> left = activations(random, count, a.scale, true), right = activations(random, count, b.scale, true);
        Buffer<float> wanted(count, random);
        for (int64_t j = 0; j < count; ++j) {
            const float va = static_cast<float>(centred(left[j], a.scale, a.zero, a.range)) * a.scale;
            wanted[j] = va + static_cast<float>(centred(right[j], b.scale, b.zero, b.range)) * b.scale;
        }
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<float> out(count, random);
            add(isa.number, {left.data(), a.scale, a.zero, a.range, nullptr}, {right.data(), b.scale, b.zero, b.range, nullptr},
                count, out.data(), {}, threads(random));
            expect_equal(out, wanted, std::string("add on ") + isa.name);
            const Encoding e = random_encoding(random, true);
            const auto bytes_of = [&](const Buffer<float>& x, const Encoding& by) {
                Buffer<uint8_t> bytes(count, random);
                for (int64_t j = 0; j < count; ++j) {
                    const int32_t code = centred(x[j], by.scale, by.zero, by.range) + static_cast<int32_t>(by.zero);
                    bytes[j] = static_cast<uint8_t>(code + (by.range.qmin < 0 ? 128 : 0));
                }
                return bytes;
            };
            const Buffer<uint8_t> first = bytes_of(left, a), second = bytes_of(right, b);
            Buffer<uint8_t> bytes(count, random);
            add(isa.number, {nullptr, a.scale, a.zero, a.range, first.data()},
                {nullptr, b.scale, b.zero, b.range, second.data()}, count, nullptr,
                {bytes.data(), e.scale, e.zero, e.range, -INFINITY, INFINITY}, threads(random));
            expect_same(bytes, bytes_of(wanted, e), std::string("add of bytes on ") + isa.name);
        }
    }
}

void test_pool(int64_t cases) {
    Random random(10);
    for (int64_t i = 0; i < cases; ++i) {
        const int64_t n = random.between(0, 3), h = random.between(3, 20), w = random.between(3, 20), c = random.between(1, 70);
        const int64_t kh = random.between(1, 3), kw = random.between(1, 3), sh = random.between(1, 4), sw = random.between(1, 4);
        const int64_t ph = random.between(0, kh / 2), pw = random.between(0, kw / 2);
        const int64_t ho = (h + 2 * ph - kh) / sh + 1, wo = (w + 2 * pw - kw) / sw + 1;
        Buffer<uint8_t> x(n * h * w * c, random), wanted(n * ho * wo * c, random), y(n * ho * wo * c, random);
        for (int64_t j = 0; j < x.size(); ++j) x[j] = static_cast<uint8_t>(random.between(0, 255));
        for (int64_t j = 0; j < wanted.size(); ++j) {
            const int64_t pixel = j / c, row = pixel / wo % ho * sh - ph, column = pixel % wo * sw - pw;
            wanted[j] = 0;
            for (int64_t k = 0; k < kh * kw; ++k) {
                const int64_t at_y = row + k / kw, at_x = column + k % kw;
                if (at_y < 0 || at_y >= h || at_x < 0 || at_x >= w) continue;
                wanted[j] = std::max(wanted[j], x[((pixel / wo / ho * h + at_y) * w + at_x) * c + j % c]);
            }
        }
        max_pool({x.data(), n, h, w, c, kh, kw, sh, sw, ph, pw, y.data(), threads(random)});
        expect_same(y, wanted, "max_pool");
    }
}

void test_codes(int64_t cases) {
    Random random(7);
    for (int64_t i = 0; i < cases; ++i) {
        const int64_t columns = random_count(random), rows = columns > 1000 ? 1 : random.between(0, 9);
        const Encoding e = random_encoding(random, true);
        const bool per_row = random.one_in(2);
        const Buffer<float> x = activations(random, rows * columns, e.scale, true);
        const Buffer<float> scales = numbers(random, per_row ? rows : 1, 0.01f, 0.1f);
        Buffer<float> wanted(x.size(), random), wide(x.size(), random);
        Buffer<int8_t> wanted_codes(x.size(), random);
        Buffer<int32_t> wanted_sums(rows, random);
        const Range8 range{-7, 7};
        for (int64_t j = 0; j < x.size(); ++j) {
            wanted[j] = static_cast<float>(centred(x[j], e.scale, e.zero, e.range));
            wanted_codes[j] = static_cast<int8_t>(centred(x[j], scales[per_row ? j / columns : 0], 0.0f, range));
            wanted_sums[j / columns] += wanted_codes[j];
        }
        for (const InstructionSet& isa : instruction_sets()) {
            const std::string name = std::string("codes on ") + isa.name;
            Buffer<uint16_t> narrow(x.size(), random);
            Buffer<int8_t> codes(x.size(), random);
            Buffer<int32_t> sums(rows, random);
            const Addend whole{x.data(), e.scale, e.zero, e.range, nullptr};
            centred_codes(isa.number, whole, x.size(), wide.data(), nullptr, threads(random));
            expect_equal(wide, wanted, name);
            centred_codes(isa.number, whole, x.size(), nullptr, narrow.data(), threads(random));
            for (int64_t j = 0; j < x.size(); ++j) {
                uint32_t bits;
                std::memcpy(&bits, &wanted[j], 4);
                expect(narrow[j] == bits >> 16, name + " in bfloat16");
            }
            weight_codes(isa.number, x.data(), rows, columns, scales.data(), per_row ? 1 : 0, range, codes.data(),
                         sums.data(), threads(random));
            expect_same(codes, wanted_codes, name);
            expect_same(sums, wanted_sums, name);
        }
        bool nan = false;
        for (int64_t j = 0; j < x.size(); ++j) nan |= std::isnan(x[j]);
        expect(has_nan(x.data(), x.size(), 2) == nan, "has_nan");
    }
}

void test_straight_through(int64_t cases) {
    Random random(8);
    for (int64_t i = 0; i < cases; ++i) {
        const int64_t columns = random_count(random), rows = columns > 1000 ? random.between(1, 2) : random.between(0, 9);
        const Encoding e = random_encoding(random, true);
        const bool per_row = random.one_in(2), narrow = random.one_in(2), learned = random.one_in(2);
        const Buffer<float> x = activations(random, rows * columns, e.scale, true);
        const Buffer<float> scales = numbers(random, per_row ? rows : 1, 0.01f, 0.1f);
        const Buffer<float> gradient = numbers(random, x.size(), -1.0f, 1.0f);
        Buffer<uint16_t> half(x.size(), random);
        for (int64_t j = 0; j < x.size(); ++j) half[j] = static_cast<uint16_t>(random.between(0x3c00, 0x3fff));
        Buffer<float> first_dx(x.size(), random), first_sums(3 * rows, random);
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<float> dx = gradient, sums(3 * rows, random);  // in place, where the gradient is wide
            straight_through(isa.number, {narrow ? nullptr : dx.data(), narrow ? half.data() : nullptr, x.data(), rows,
                                          columns, scales.data(), per_row ? 1 : 0, e.zero, e.range, learned, dx.data(),
                                          sums.data(), threads(random)});
            if (isa.number == 0) {
                first_dx = dx;
                first_sums = sums;
                for (int64_t j = 0; j < x.size(); ++j) expect(dx[j] == 0.0f || narrow || dx[j] == gradient[j], "gradient");
            }
            expect_equal(dx, first_dx, std::string("gradient on ") + isa.name);
            if (learned) expect_equal(sums, first_sums, std::string("sums of the gradient on ") + isa.name);
        }
    }
}

void test_moments(int64_t cases) {
    Random random(9);
    for (int64_t i = 0; i < cases; ++i) {
        const int64_t rows = random.between(0, random.one_in(5) ? 2500 : 40), channels = random.between(0, 40);
        const Buffer<float> y = numbers(random, rows * channels, -2.0f, 2.0f), origin = numbers(random, channels, -1.0f, 1.0f);
        Buffer<double> first_sum(channels, random), first_square(channels, random);
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<double> sum(channels, random), square(channels, random);
            moments(isa.number, y.data(), rows, channels, origin.data(), sum.data(), square.data(), threads(random));
            if (isa.number == 0) {
                first_sum = sum;
                first_square = square;
            }
            expect_same(sum, first_sum, std::string("sums on ") + isa.name);
            expect_same(square, first_square, std::string("squares on ") + isa.name);
            for (int64_t c = 0; c < channels; ++c) {
                double wanted = 0.0;
                for (int64_t r = 0; r < rows; ++r) {
                    wanted += static_cast<double>(y[r * channels + c]) - static_cast<double>(origin[c]);
                }
                expect(std::fabs(sum[c] - wanted) < 1e-9, "moments");
            }
        }
    }
}

}  // namespace bitwright::test
