// The quantizer shared by all operations, its checks, and the quantized sum of two tensors of the same memory
// layout: out = (code(a) - za) * sa + (code(b) - zb) * sb in float32. Any length.
#include <algorithm>
#include <cmath>

#include "ops.h"
#include "parallel.h"

namespace bitwright {
namespace {

constexpr int64_t kSerialCount = 1 << 15;

int32_t byte_shift(const Range8& range) { return range.qmin < 0 ? 128 : 0; }

Side side_of(const Addend& a, int64_t first) {
    const Quantizer quantizer = make_quantizer(a.scale, a.zero, a.range, byte_shift(a.range));
    return {a.x + (a.bytes == nullptr ? first : 0), a.bytes == nullptr ? nullptr : a.bytes + first, quantizer};
}

}  // namespace

void check_range(const Range8& range) {
    require(range.qmin < range.qmax, "qmin must be below qmax");
    const bool is_signed = range.qmin >= -128 && range.qmax <= 127;
    const bool is_unsigned = range.qmin >= 0 && range.qmax <= 255;
    require(is_signed || is_unsigned, "codes must lie in [-128, 127] or [0, 255]");
}

void check_zero_point(float zero, const Range8& range, int64_t depth, int64_t weight_limit) {
    // Larger zero points mean nothing for 8-bit codes; NaN fails the comparison.
    require(std::fabs(zero) <= 65536.0f && zero == std::rint(zero), "zero points must be small integers");
    const double low = std::fabs(static_cast<double>(range.qmin) - zero);
    const double high = std::fabs(static_cast<double>(range.qmax) - zero);
    const double bound =
        std::fmax(low, high) * static_cast<double>(weight_limit) * static_cast<double>(depth);
    require(bound <= 2147483647.0, "too many inputs per output: the sum could exceed 32 bits");
}

Quantizer make_quantizer(float scale, float zero, const Range8& range, int32_t shift) {
    const int64_t z = static_cast<int64_t>(zero);
    const bool ordinary = scale > 0x1p-80f && scale < 0x1p80f;  // nothing on the way overflows, or loses bits that count
    return {scale, static_cast<float>(range.qmin - z), static_cast<float>(range.qmax - z),
            static_cast<int32_t>(z) + shift, ordinary ? 1.0f / scale : 0.0f};
}

Quantizer bounded_quantizer(const Bytes& bytes) {
    check_range(bytes.range);
    check_zero_point(bytes.zero, bytes.range, 1, 1);
    require(bytes.low <= bytes.high, "the lower bound must not be above the upper one");
    Quantizer quantizer = make_quantizer(bytes.scale, bytes.zero, bytes.range, byte_shift(bytes.range));
    const float low = quantizer.low, high = quantizer.high;
    quantizer.low = std::min(std::max(bytes.low / bytes.scale, low), high);
    quantizer.high = std::min(std::max(bytes.high / bytes.scale, low), high);
    return quantizer;
}

void add(int isa, const Addend& a, const Addend& b, int64_t count, float* out, const Bytes& to, int threads) {
    require(count >= 0 && threads >= 1, "negative size");
    const bool inputs = (a.x != nullptr || a.bytes != nullptr) && (b.x != nullptr || b.bytes != nullptr);
    require(count == 0 || (inputs && (out != nullptr || to.out != nullptr)), "null pointer");
    check_range(a.range);
    check_range(b.range);
    check_zero_point(a.zero, a.range, 1, 1);
    check_zero_point(b.zero, b.range, 1, 1);
    const Kernels& kernels = bitwright::kernels(isa);
    const Quantizer quantizer = to.out == nullptr ? Quantizer{} : bounded_quantizer(to);
    parallel_for(count <= kSerialCount ? 1 : threads, [&](int index, int team) {
        const Range mine = share(count, kLanes, index, team);
        const bool bytes = to.out != nullptr;
        kernels.add({side_of(a, mine.begin), side_of(b, mine.begin), mine.end - mine.begin,
                     bytes ? nullptr : out + mine.begin, bytes ? to.out + mine.begin : nullptr, quantizer});
    });
}

}  // namespace bitwright
