// Float activations against decoded weights. Values of weights are exact; sums go in an order of their own, so
// products are held to the error that float32 sums of their length may have.
#include <cmath>

#include "definition.h"

namespace bitwright::test {
namespace {

struct Case {
    int64_t bits, m, k, n, group_size, groups;
    Buffer<uint8_t> codes;
    Buffer<float> x, table, scales, zeros, bias;  // scales and zeros [blocks][groups][16]
    Buffer<uint8_t> packed;
    bool has_zeros, has_bias;

    float weight(int64_t o, int64_t j) const {
        const int64_t at = (o / kLanes * groups + (groups == 1 ? 0 : j / group_size)) * kLanes + o % kLanes;
        const uint8_t code = codes[o * k + j];
        const float value = bits == 8 ? static_cast<float>(static_cast<int8_t>(code)) : table[code];
        return (has_zeros ? value - zeros[at] : value) * scales[at];
    }
    DecodedLinear call(int isa, float* y, int threads) const {
        return {isa, static_cast<int>(bits), x.data(), m, k, n, group_size, packed.data(), table.data(), scales.data(),
                has_zeros ? zeros.data() : nullptr, has_bias ? bias.data() : nullptr, y, threads};
    }
    std::string text() const {
        return std::to_string(bits) + " bits, " + std::to_string(m) + " x " + std::to_string(k) + " x " + std::to_string(n);
    }
};

Case make_case(Random& random) {
    const int64_t widths[] = {8, 4, 3, 2};
    const int64_t bits = widths[random.between(0, 3)], unit = bits == 3 ? 32 : 32 / bits;
    const bool large = random.one_in(40), grouped = random.one_in(2);
    const int64_t size = unit * random.between(1, 3), count = random.between(1, large ? 20 : 5);
    const int64_t k = grouped ? size * count : random.between(0, large ? 900 : 120);
    const int64_t m = random.between(0, large ? 40 : 14), n = random.between(0, large ? 200 : 70);
    const int64_t groups = grouped ? count : 1, padded = round_up(n, kLanes) * groups;
    Case c{bits, m, k, n, grouped ? size : k + 1, groups, Buffer<uint8_t>(n * k, random),
           numbers(random, m * k, -2.0f, 2.0f), numbers(random, 16, -1.0f, 1.0f), numbers(random, padded, 0.01f, 1.0f),
           numbers(random, padded, -9.0f, 9.0f), numbers(random, n, -1.0f, 1.0f),
           Buffer<uint8_t>(decoded_layout_bytes(bits, n, k), random), random.one_in(2), random.one_in(2)};
    const int64_t distinct = int64_t{1} << (bits == 8 ? 4 : bits);
    for (int64_t i = distinct; i < 16; ++i) c.table[i] = c.table[i % distinct];
    for (int64_t i = 0; i < n * k; ++i) c.codes[i] = static_cast<uint8_t>(random.between(0, (1 << bits) - 1));
    pack_decoded(c.codes.data(), bits, n, k, c.packed.data());
    Buffer<uint8_t> unpacked(n * k, random);
    unpack_decoded(c.packed.data(), bits, n, k, unpacked.data());
    expect_same(unpacked, c.codes, "decoded linear: unpacked codes");
    return c;
}

void expect_near(const Case& c, const Buffer<float>& y, const std::string& what) {
    for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t o = 0; o < c.n; ++o) {
            double sum = c.has_bias ? static_cast<double>(c.bias[o]) : 0.0, size = 10.0;
            for (int64_t j = 0; j < c.k; ++j) {
                const double product = static_cast<double>(c.x[i * c.k + j]) * static_cast<double>(c.weight(o, j));
                sum += product;
                size += std::fabs(product) + (c.has_zeros ? 20.0 : 0.0);  // a single row subtracts its zeros last
            }
            const double error = std::fabs(static_cast<double>(y[i * c.n + o]) - sum);
            expect(error <= 1e-6 * static_cast<double>(c.k + 2) * size, what);
        }
    }
}

}  // namespace

void test_decoded(int64_t cases) {
    Random random(3);
    for (int64_t i = 0; i < cases; ++i) {
        const Case c = make_case(random);
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<float> y(c.m * c.n, random);
            decoded_linear(c.call(isa.number, y.data(), static_cast<int>(random.between(1, 3))));
            expect_near(c, y, std::string("decoded linear on ") + isa.name + ": " + c.text());
        }
    }
}

void test_panels(int64_t cases) {
    Random random(4);
    for (int64_t i = 0; i < cases; ++i) {
        const Case c = make_case(random);
        if (c.k == 0 || c.n == 0) continue;
        const int64_t unit = c.bits == 3 ? 32 : 32 / c.bits, blocks = ceil_div(c.n, kLanes);
        const int64_t begin = random.between(0, blocks), end = random.between(begin, blocks);
        const int64_t width = (end - begin) * kLanes;
        for (const InstructionSet& isa : instruction_sets()) {
            Buffer<float> panel(round_up(c.k, unit) * width, random);
            decode_panel(c.call(isa.number, nullptr, 2), begin, end, panel.data());
            for (int64_t j = 0; j < c.k; ++j) {
                for (int64_t o = begin * kLanes; o < end * kLanes && o < c.n; ++o) {
                    expect(panel[j * width + o - begin * kLanes] == c.weight(o, j),
                           std::string("panel on ") + isa.name + ": " + c.text());
                }
            }
        }
    }
}

}  // namespace bitwright::test
