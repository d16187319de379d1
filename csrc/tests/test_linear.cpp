// Products of integers with a scale per output, and with a scale per group of inputs: every instruction set equals
// the definition bit for bit.
#include "definition.h"

namespace bitwright::test {
namespace {

struct Case {
    int64_t bits, m, k, n, group_size;
    bool dynamic, per_row;
    Encoding encoding;
    Buffer<float> x, scale, zero, bias;
    Buffer<int8_t> codes;
    Buffer<float> w_scale;  // [n][groups]
    bool has_zero, has_bias;

    int64_t groups() const { return group_size == 0 ? 1 : k / group_size; }
    int64_t inputs() const { return group_size == 0 ? k : group_size; }
};

Case make_case(Random& random, bool grouped) {
    const int64_t widths[] = {8, 4, 2, 3};
    const int64_t bits = widths[random.between(0, 3)];
    const int64_t unit = bits == 3 ? 32 : 4 * (8 / bits);
    const bool large = random.one_in(40);  // enough work for threads, more rows than a strip, more weights than a slab
    const int64_t group_size = grouped ? unit * random.between(1, 4) : 0;
    const int64_t k = grouped ? group_size * random.between(0, large ? 20 : 5) : random.between(0, large ? 1500 : 150);
    const int64_t m = random.between(0, large ? 210 : 30), n = random.between(0, large ? 300 : 70);
    const bool dynamic = random.one_in(3), per_row = random.one_in(2);
    Encoding encoding = random_encoding(random, true);
    if (dynamic) encoding = {{random.one_in(2) ? -127 : -128, 127}, 0.05f, 0.0f};
    const int64_t half = int64_t{1} << (bits - 1), rows = per_row ? m : 1;
    Case c{bits, m, k, n, group_size, dynamic, per_row, encoding,
           activations(random, m * k, encoding.scale, !dynamic), numbers(random, rows, 0.01f, 0.1f),
           Buffer<float>(rows, random), numbers(random, n, -1.0f, 1.0f), Buffer<int8_t>(n * k, random),
           numbers(random, n * (group_size == 0 ? 1 : k / group_size), 0.001f, 0.1f), !dynamic && random.one_in(2),
           random.one_in(2)};
    for (int64_t i = 0; i < rows; ++i) c.zero[i] = encoding.zero;
    for (int64_t i = 0; i < n * k; ++i) c.codes[i] = static_cast<int8_t>(random.between(-half, half - 1));
    return c;
}

Buffer<float> defined(const Case& c, Random& random) {
    Buffer<float> y(c.m * c.n, random);
    std::vector<int32_t> row(static_cast<size_t>(c.k));
    for (int64_t i = 0; i < c.m; ++i) {
        const float* x = c.x.data() + i * c.k;
        const float scale = c.dynamic ? dynamic_scale(x, c.k, c.encoding.range) : c.scale[c.per_row ? i : 0];
        const float zero = c.has_zero ? c.zero[c.per_row ? i : 0] : 0.0f;
        for (int64_t j = 0; j < c.k; ++j) row[static_cast<size_t>(j)] = centred(x[j], scale, zero, c.encoding.range);
        for (int64_t o = 0; o < c.n; ++o) {
            float total = 0.0f;
            for (int64_t g = 0; g < c.groups(); ++g) {
                int64_t sum = 0;
                for (int64_t j = g * c.inputs(); j < (g + 1) * c.inputs(); ++j) {
                    sum += row[static_cast<size_t>(j)] * int64_t{c.codes[o * c.k + j]};
                }
                const float value = static_cast<float>(sum), step = c.w_scale[o * c.groups() + g];
                total = c.group_size == 0 ? value * (scale * step) : total + value * step;
            }
            if (c.group_size > 0) total *= scale;
            y[i * c.n + o] = c.has_bias ? total + c.bias[o] : total;
        }
    }
    return y;
}

// Scales and sums as the kernel reads them: [n], or [blocks][groups][16] padded with 0.
struct Constants {
    Buffer<float> scale;
    Buffer<int32_t> sum;
};

Constants constants_of(const Case& c, Random& random) {
    const int64_t padded = c.group_size == 0 ? c.n : round_up(c.n, kLanes) * c.groups();
    Constants out{Buffer<float>(padded, random), Buffer<int32_t>(padded, random)};
    for (int64_t o = 0; o < c.n; ++o) {
        for (int64_t g = 0; g < c.groups(); ++g) {
            int32_t sum = 0;
            for (int64_t j = g * c.inputs(); j < (g + 1) * c.inputs(); ++j) sum += c.codes[o * c.k + j];
            const int64_t at = c.group_size == 0 ? o : (o / kLanes * c.groups() + g) * kLanes + o % kLanes;
            out.scale[at] = c.w_scale[o * c.groups() + g];
            out.sum[at] = sum;
        }
    }
    return out;
}

// Whether the kernel has no use for the sums on any instruction set.
bool needs_no_sums(const Case& c) {
    return !c.has_zero && c.encoding.range.qmax <= 127 && (c.bits < 8 || c.group_size > 0);
}

void run_case(const Case& c, Random& random, const std::string& name) {
    Buffer<uint8_t> packed(linear_layout_bytes(c.bits, c.n, c.k), random);
    pack_linear(c.codes.data(), c.bits, c.n, c.k, packed.data());
    Buffer<int8_t> unpacked(c.n * c.k, random);
    unpack_linear(packed.data(), c.bits, c.n, c.k, unpacked.data());
    expect_same(unpacked, c.codes, name + ": unpacked codes");
    const Constants constants = constants_of(c, random);
    const Buffer<float> wanted = defined(c, random);
    for (const InstructionSet& isa : instruction_sets()) {
        Buffer<float> y(c.m * c.n, random);
        linear({isa.number, static_cast<int>(c.bits), c.x.data(), c.m, c.k, c.n, c.dynamic ? nullptr : c.scale.data(),
                c.has_zero ? c.zero.data() : nullptr, c.per_row && !c.dynamic ? 1 : 0, c.dynamic, c.encoding.range,
                packed.data(), constants.scale.data(), needs_no_sums(c) ? nullptr : constants.sum.data(), c.has_bias ? c.bias.data() : nullptr,
                y.data(), static_cast<int>(random.between(1, 3)), c.group_size});
        expect_equal(y, wanted, name + " on " + isa.name + ": " + std::to_string(c.bits) + " bits, " +
                                    std::to_string(c.m) + " x " + std::to_string(c.k) + " x " + std::to_string(c.n));
    }
}

}  // namespace

void test_linear(int64_t cases) {
    Random random(1);
    for (int64_t i = 0; i < cases; ++i) run_case(make_case(random, false), random, "linear");
}

void test_grouped(int64_t cases) {
    Random random(2);
    for (int64_t i = 0; i < cases; ++i) run_case(make_case(random, true), random, "grouped linear");
}

}  // namespace bitwright::test
