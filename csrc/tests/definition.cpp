#include "definition.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bitwright::test {

uint64_t Random::next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int32_t centred(float x, float scale, float zero, const Range8& range) {
    const float low = static_cast<float>(range.qmin), high = static_cast<float>(range.qmax);
    const float code = std::rint(x / scale) + zero;
    const float clamped = !(code > low) ? low : code > high ? high : code;
    return static_cast<int32_t>(clamped - zero);
}

float dynamic_scale(const float* x, int64_t count, const Range8& range) {
    float top = 0.0f;
    for (int64_t i = 0; i < count; ++i) top = std::fmax(top, std::fabs(x[i]));
    return std::fmax(top / static_cast<float>(range.qmax), FLT_EPSILON);
}

Encoding random_encoding(Random& random, bool wide) {
    const Range8 ranges[] = {{-128, 127}, {-127, 127}, {0, 255}, {-8, 7}, {0, 15}, {-1, 1}};
    const Range8 range = ranges[random.between(0, 5)];
    const int64_t outside = wide ? 40 : 0;
    const bool symmetric = random.one_in(3) && range.qmin < 0;
    const int64_t zero = symmetric ? 0 : random.between(range.qmin - outside, range.qmax + outside);
    return {range, random.uniform(0.01f, 0.1f), static_cast<float>(zero)};
}

Buffer<float> numbers(Random& random, int64_t count, float low, float high) {
    Buffer<float> out(count, random);
    for (int64_t i = 0; i < count; ++i) out[i] = random.uniform(low, high);
    return out;
}

Buffer<float> activations(Random& random, int64_t count, float scale, bool special) {
    const float specials[] = {0.0f, -0.0f, 1e-45f, FLT_MAX, -FLT_MAX, NAN, INFINITY, -INFINITY};
    Buffer<float> out = numbers(random, count, -150.0f * scale, 150.0f * scale);
    for (int64_t i = 0; i < count; ++i) {
        if (random.one_in(8)) out[i] = (static_cast<float>(random.between(-150, 150)) + 0.5f) * scale;
        if (random.one_in(50)) out[i] = specials[random.between(0, special ? 7 : 2)];
    }
    return out;
}

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found{{static_cast<int>(Isa::kPortable), "portable"}};
        if (has_avx2()) found.push_back({static_cast<int>(Isa::kAvx2), "avx2"});
        if (has_avx512_vnni()) found.push_back({static_cast<int>(Isa::kAvx512Vnni), "avx512_vnni"});
        if (has_neon_dotprod()) found.push_back({static_cast<int>(Isa::kNeonDotprod), "neon_dotprod"});
        if (has_neon_i8mm()) found.push_back({static_cast<int>(Isa::kNeonI8mm), "neon_i8mm"});
        return found;
    }();
    return sets;
}

void expect(bool holds, const std::string& what) {
    if (holds) return;
    std::printf("FAILED %s\n", what.c_str());
    std::exit(1);
}

void expect_equal(const Buffer<float>& found, const Buffer<float>& wanted, const std::string& what) {
    expect(found.size() == wanted.size(), what + ": sizes differ");
    for (int64_t i = 0; i < found.size(); ++i) {
        uint32_t bits[2];
        std::memcpy(&bits[0], &found[i], 4);
        std::memcpy(&bits[1], &wanted[i], 4);
        if (bits[0] == bits[1] || (std::isnan(found[i]) && std::isnan(wanted[i]))) continue;
        char text[96];
        std::snprintf(text, sizeof text, ": element %lld is %.9g, not %.9g", static_cast<long long>(i),
                      static_cast<double>(found[i]), static_cast<double>(wanted[i]));
        expect(false, what + text);
    }
}

}  // namespace bitwright::test
