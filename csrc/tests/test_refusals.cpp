// What cannot be computed is refused before memory is touched.
#include <cmath>
#include <stdexcept>

#include "definition.h"

namespace bitwright::test {
namespace {

template <class F>
void expect_refused(const std::string& message, F&& call) {
    try {
        call();
    } catch (const std::exception& error) {
        expect(std::string(error.what()).find(message) != std::string::npos,
               "refused with '" + std::string(error.what()) + "', not '" + message + "'");
        return;
    }
    expect(false, "not refused: " + message);
}

float one[64] = {};
uint8_t weight[256];
int32_t sums[64];

Linear small_linear() {
    one[0] = 1.0f;
    return {0, 8, one, 1, 4, 1, one, nullptr, 0, false, {-128, 127}, weight, one, sums, nullptr, one + 1, 1, 0};
}

Conv small_conv() {
    return {0, 8, one, 1, 1, 4, 4, {16, 16, 4, 1}, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1.0f, 0.0f, {-128, 127}, weight, one, sums,
            nullptr, one + 1, 1};
}

void linear_refusals() {
    const auto refused = [](const std::string& message, auto change) {
        Linear a = small_linear();
        change(a);
        expect_refused(message, [&] { linear(a); });
    };
    const int64_t huge = int64_t{1} << 33;
    refused("size too large", [&](Linear& a) { a.n = a.k = huge; });
    refused("size too large", [&](Linear& a) { a.m = a.k = huge; });
    refused("size too large", [&](Linear& a) { a.m = a.n = huge; });
    refused("negative size", [](Linear& a) { a.m = -1; });
    refused("exceed 32 bits", [](Linear& a) { a.k = 70000 * 4; });
    refused("null pointer", [](Linear& a) { a.x = nullptr; });
    refused("needs a scale", [](Linear& a) { a.scale = nullptr; });
    refused("is not available on this machine", [](Linear& a) { a.isa = 99; });
    refused("is not available on this machine", [](Linear& a) { a.isa = -1; });
    refused("threads must be positive", [](Linear& a) { a.threads = 0; });
    refused("groups must divide", [](Linear& a) { a.group_size = 3; });
    refused("whole units", [](Linear& a) { a.bits = 4, a.group_size = 4; });
    refused("need the sums", [](Linear& a) { a.w_sum = nullptr; });
    refused("8, 4, 3 or 2 bits", [](Linear& a) { a.bits = 5; });
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        refused("row 0 of x has no dynamic scale", [&](Linear& a) {
            static float x[4];
            x[2] = bad;
            a.x = x;
            a.scale = nullptr;
            a.dynamic = true;
        });
    }
}

void conv_refusals() {
    const auto refused = [](const std::string& message, auto change) {
        Conv a = small_conv();
        change(a);
        expect_refused(message, [&] { conv2d(a); });
    };
    const int64_t huge = int64_t{1} << 40;
    refused("size too large", [&](Conv& a) { a.h = a.w = huge; });
    refused("size too large", [&](Conv& a) { a.kh = huge, a.dil_h = (int64_t{1} << 24) - 1; });
    refused("size too large", [&](Conv& a) { a.w = huge, a.pad_h = (int64_t{1} << 24) - 1; });
    refused("too large", [&](Conv& a) { a.pad_w = huge; });
    refused("negative padding", [](Conv& a) { a.pad_h = -1; });
    refused("filter larger than image", [](Conv& a) { a.kh = 5; });
    refused("stride and dilation", [](Conv& a) { a.stride_w = 0; });
    refused("do not divide", [](Conv& a) { a.groups = 2; });
    refused("inside the range", [](Conv& a) { a.zero = 200.0f, a.pad_h = 1; });
    refused("null pointer", [](Conv& a) { a.weight = nullptr; });
    refused("8, 4, 3 or 2 bits", [](Conv& a) { a.bits = 5; });
    refused("is not available", [](Conv& a) { a.isa = 99; });
}

void other_refusals() {
    const int64_t huge = int64_t{1} << 40;
    expect_refused("size too large", [&] { linear_layout_bytes(8, huge, huge); });
    expect_refused("size too large", [&] { decoded_layout_bytes(4, huge, huge); });
    expect_refused("size too large", [&] { conv_layout_bytes(4, huge, huge, 1, 1, 1); });
    expect_refused("do not divide", [&] { conv_layout_bytes(8, 4, 4, 1, 1, 3); });
    expect_refused("negative size", [&] { conv_layout_bytes(8, 4, 4, -1, 1, 1); });
    const int8_t code = 8;
    const uint8_t index = 4;
    expect_refused("does not fit", [&] { pack_linear(&code, 4, 1, 1, weight); });
    expect_refused("does not fit", [&] { pack_decoded(&index, 2, 1, 1, weight); });
    expect_refused("does not fit", [&] { pack_conv(&code, 4, 1, 1, 1, 1, 1, weight); });  // depthwise
    expect_refused("does not fit", [&] { pack_conv(&code, 4, 1, 2, 1, 1, 1, weight); });
    expect_refused("8, 4, 3 or 2 bits", [&] { conv_layout_bytes(6, 4, 4, 1, 1, 1); });
    expect_refused("no such blocks", [&] {
        decode_panel({0, 8, nullptr, 0, 4, 4, 4, weight, one, one, nullptr, nullptr, nullptr, 1}, 0, 2, one);
    });
    const Addend x{one, 1.0f, 0.5f, {-128, 127}, nullptr};
    expect_refused("small integers", [&] { add(0, x, x, 1, one, {}, 1); });
    expect_refused("small integers", [&] { centred_codes(0, x, 1, one, nullptr, 1); });
    expect_refused("negative size", [&] { has_nan(one, -1, 1); });
    expect_refused("[-128, 127]", [&] { weight_codes(0, one, 1, 1, one, 0, {0, 255}, nullptr, sums, 1); });
}

}  // namespace

void test_refusals() {
    linear_refusals();
    conv_refusals();
    other_refusals();
}

}  // namespace bitwright::test
