// The Python module bitwright._native: pointers and sizes as integers, so that it depends on no version of
// torch. Nothing is checked here that the operations check themselves; the global interpreter lock is
// released while they run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "ops.h"

namespace nb = nanobind;

namespace bitwright {
namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> features() {
    std::vector<std::string> found;
    if (has_avx2()) found.emplace_back("avx2");
    if (has_avx512_vnni()) found.emplace_back("avx512_vnni");
    if (has_neon_dotprod()) found.emplace_back("neon_dotprod");
    if (has_neon_i8mm()) found.emplace_back("neon_i8mm");
    return found;
}

float value_or_zero(uintptr_t address) { return address != 0 ? *at<const float>(address) : 0.0f; }

float one_value(uintptr_t address) {
    require(address != 0, "null pointer");
    return *at<const float>(address);
}

void linear_call(int isa, int bits, uintptr_t x, int64_t m, int64_t k, int64_t n, uintptr_t scale,
                 uintptr_t zero, int64_t rows_per_scale_stride, bool dynamic, int64_t qmin, int64_t qmax,
                 uintptr_t w, uintptr_t w_scale, uintptr_t w_sum, uintptr_t bias, uintptr_t y, int threads,
                 int64_t group_size) {
    linear({isa,
            bits,
            at<const float>(x),
            m,
            k,
            n,
            at<const float>(scale),
            at<const float>(zero),
            rows_per_scale_stride,
            dynamic,
            {qmin, qmax},
            at<const uint8_t>(w),
            at<const float>(w_scale),
            at<const int32_t>(w_sum),
            at<const float>(bias),
            at<float>(y),
            threads,
            group_size});
}

void conv2d_call(int isa, uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t stride_n,
                 int64_t stride_c, int64_t stride_y, int64_t stride_x, int64_t o, int64_t kh, int64_t kw,
                 int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h,
                 int64_t dil_w, int64_t groups, int bits, float scale, float zero, int64_t qmin, int64_t qmax,
                 uintptr_t weight, uintptr_t w_scale, uintptr_t w_sum, uintptr_t bias, uintptr_t y,
                 int threads, uintptr_t x_bytes, const Bytes& to) {
    conv2d({isa,
            bits,
            at<const float>(x),
            n,
            c,
            h,
            w,
            {stride_n, stride_c, stride_y, stride_x},
            o,
            kh,
            kw,
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dil_h,
            dil_w,
            groups,
            scale,
            zero,
            {qmin, qmax},
            at<const uint8_t>(weight),
            at<const float>(w_scale),
            at<const int32_t>(w_sum),
            at<const float>(bias),
            at<float>(y),
            threads,
            at<const uint8_t>(x_bytes),
            to});
}

Bytes bytes_of(uintptr_t out, float scale, float zero, int64_t qmin, int64_t qmax, float low, float high) {
    return {at<uint8_t>(out), scale, zero, {qmin, qmax}, low, high};
}

void encode_images_call(int isa, uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t stride_n,
                        int64_t stride_c, int64_t stride_y, int64_t stride_x, const Bytes& to, int threads) {
    encode_images(isa, at<const float>(x), n, c, h, w, {stride_n, stride_c, stride_y, stride_x}, to, threads);
}

void add_images_call(int isa, uintptr_t a, const Bytes& left, uintptr_t b, const Bytes& right, int64_t count,
                     uintptr_t out, const Bytes& to, int threads) {
    add(isa, {nullptr, left.scale, left.zero, left.range, at<const uint8_t>(a)},
        {nullptr, right.scale, right.zero, right.range, at<const uint8_t>(b)}, count, at<float>(out), to, threads);
}

void add_call(int isa, uintptr_t a, uintptr_t b, int64_t count, uintptr_t scale_a, uintptr_t zero_a,
              uintptr_t scale_b, uintptr_t zero_b, int64_t qmin_a, int64_t qmax_a, int64_t qmin_b,
              int64_t qmax_b, uintptr_t out, int threads) {
    const Addend left{at<const float>(a), one_value(scale_a), value_or_zero(zero_a), {qmin_a, qmax_a}, nullptr};
    const Addend right{at<const float>(b), one_value(scale_b), value_or_zero(zero_b), {qmin_b, qmax_b}, nullptr};
    add(isa, left, right, count, at<float>(out), {}, threads);
}

void straight_through_call(int isa, uintptr_t wide, uintptr_t narrow, uintptr_t x, int64_t rows, int64_t columns,
                           uintptr_t scale, int64_t scale_stride, uintptr_t zero, int64_t qmin, int64_t qmax,
                           bool learned, uintptr_t dx, uintptr_t sums, int threads) {
    straight_through(isa, {at<const float>(wide),
                           at<const uint16_t>(narrow),
                           at<const float>(x),
                           rows,
                           columns,
                           at<const float>(scale),
                           scale_stride,
                           value_or_zero(zero),
                           {qmin, qmax},
                           learned,
                           at<float>(dx),
                           at<float>(sums),
                           threads});
}

}  // namespace
}  // namespace bitwright

NB_MODULE(_native, m) {
    using namespace bitwright;
    m.doc() =
        "Integer CPU kernels of bitwright. Use them through bitwright.kernels.cpu, which checks tensors.";
    m.def("features", &features);
    m.def("linear_layout_bytes", &linear_layout_bytes);
    m.def(
        "pack_linear",
        [](uintptr_t codes, int64_t bits, int64_t n, int64_t k, uintptr_t out) {
            pack_linear(at<const int8_t>(codes), bits, n, k, at<uint8_t>(out));
        },
        Release());
    m.def(
        "unpack_linear",
        [](uintptr_t in, int64_t bits, int64_t n, int64_t k, uintptr_t codes) {
            unpack_linear(at<const uint8_t>(in), bits, n, k, at<int8_t>(codes));
        },
        Release());
    m.def(
        "unpack_decoded",
        [](uintptr_t in, int64_t bits, int64_t n, int64_t k, uintptr_t codes) {
            unpack_decoded(at<const uint8_t>(in), bits, n, k, at<uint8_t>(codes));
        },
        Release());
    m.def(
        "unpack_conv",
        [](uintptr_t in, int64_t bits, int64_t o, int64_t c, int64_t kh, int64_t kw, int64_t groups,
           uintptr_t codes) {
            unpack_conv(at<const uint8_t>(in), bits, o, c, kh, kw, groups, at<int8_t>(codes));
        },
        Release());
    m.def(
        "linear",
        [](int isa, int bits, uintptr_t x, int64_t m, int64_t k, int64_t n, uintptr_t scale, uintptr_t zero,
           int64_t rows_per_scale_stride, bool dynamic, int64_t qmin, int64_t qmax, uintptr_t w, uintptr_t w_scale,
           uintptr_t w_sum, uintptr_t bias, uintptr_t y, int threads) {
            linear_call(isa, bits, x, m, k, n, scale, zero, rows_per_scale_stride, dynamic, qmin, qmax, w, w_scale,
                        w_sum, bias, y, threads, 0);
        },
        Release());
    m.def("grouped_linear", &linear_call, Release());
    m.def("decoded_layout_bytes", &decoded_layout_bytes);
    m.def(
        "pack_decoded",
        [](uintptr_t codes, int64_t bits, int64_t n, int64_t k, uintptr_t out) {
            pack_decoded(at<const uint8_t>(codes), bits, n, k, at<uint8_t>(out));
        },
        Release());
    m.def(
        "decoded_linear",
        [](int isa, int bits, uintptr_t x, int64_t m, int64_t k, int64_t n, int64_t group_size, uintptr_t w,
           uintptr_t table, uintptr_t scales, uintptr_t zeros, uintptr_t bias, uintptr_t y, int threads) {
            decoded_linear({isa, bits, at<const float>(x), m, k, n, group_size, at<const uint8_t>(w),
                            at<const float>(table), at<const float>(scales), at<const float>(zeros),
                            at<const float>(bias), at<float>(y), threads});
        },
        Release());
    m.def(
        "decode_panel",
        [](int isa, int bits, int64_t k, int64_t n, int64_t group_size, uintptr_t w, uintptr_t table,
           uintptr_t scales, uintptr_t zeros, int64_t begin, int64_t end, uintptr_t out, int threads) {
            decode_panel({isa, bits, nullptr, 0, k, n, group_size, at<const uint8_t>(w), at<const float>(table),
                          at<const float>(scales), at<const float>(zeros), nullptr, nullptr, threads},
                         begin, end, at<float>(out));
        },
        Release());
    m.def("conv_layout_bytes", &conv_layout_bytes);
    m.def(
        "pack_conv",
        [](uintptr_t codes, int64_t bits, int64_t o, int64_t c, int64_t kh, int64_t kw, int64_t groups,
           uintptr_t out) {
            pack_conv(at<const int8_t>(codes), bits, o, c, kh, kw, groups, at<uint8_t>(out));
        },
        Release());
    nb::class_<Bytes>(m, "Bytes").def_static("none", [] { return Bytes{}; }).def_static("of", &bytes_of);
    m.def("conv2d", &conv2d_call, Release());
    m.def("encode_images", &encode_images_call, Release());
    m.def("add_images", &add_images_call, Release());
    m.def(
        "max_pool",
        [](uintptr_t x, int64_t n, int64_t h, int64_t w, int64_t c, int64_t kh, int64_t kw, int64_t stride_h,
           int64_t stride_w, int64_t pad_h, int64_t pad_w, uintptr_t y, int threads) {
            max_pool({at<const uint8_t>(x), n, h, w, c, kh, kw, stride_h, stride_w, pad_h, pad_w, at<uint8_t>(y), threads});
        },
        Release());
    m.def("add", &add_call, Release());
    m.def(
        "centred_codes",
        [](int isa, uintptr_t x, int64_t count, uintptr_t scale, uintptr_t zero, int64_t qmin, int64_t qmax,
           uintptr_t wide, uintptr_t narrow, int threads) {
            centred_codes(isa, {at<const float>(x), one_value(scale), value_or_zero(zero), {qmin, qmax}, nullptr}, count,
                          at<float>(wide), at<uint16_t>(narrow), threads);
        },
        Release());
    m.def(
        "weight_codes",
        [](int isa, uintptr_t w, int64_t rows, int64_t columns, uintptr_t scale, int64_t scale_stride,
           int64_t qmin, int64_t qmax, uintptr_t codes, uintptr_t sums, int threads) {
            weight_codes(isa, at<const float>(w), rows, columns, at<const float>(scale), scale_stride,
                         {qmin, qmax}, at<int8_t>(codes), at<int32_t>(sums), threads);
        },
        Release());
    m.def(
        "has_nan",
        [](uintptr_t x, int64_t count, int threads) { return has_nan(at<const float>(x), count, threads); },
        Release());
    m.def("straight_through", &straight_through_call, Release());
    m.def(
        "moments",
        [](int isa, uintptr_t y, int64_t rows, int64_t channels, uintptr_t origin, uintptr_t sum,
           uintptr_t square, int threads) {
            moments(isa, at<const float>(y), rows, channels, at<const float>(origin), at<double>(sum),
                    at<double>(square), threads);
        },
        Release());
}
