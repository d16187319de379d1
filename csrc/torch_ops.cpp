// bitwright._torch_ops: the operators that converted models call on the CPU, for processes without Python (AOTInductor)
// and with less time per call. Schemas, checks and results are those of bitwright.kernels (cpu, grouped, decoded), which
// compares the schemas when it loads this library and adds the shapes that compilers ask for.
#include "parallel.h"
#include "torch_tensor.h"

namespace bitwright {
namespace {

constexpr int64_t kFewRows = 64;  // more rows of activations than these are multiplied by panels
constexpr int64_t kPanelBytes = 8 << 20;

// How activations of `rows` rows are encoded: with one scale, one per row, or (no scale) each row by its own range.
struct Scales {
    Maybe scale, zero;
    int64_t stride;
};

Scales scales_of(const Maybe& scale, const Maybe& zero_point, int64_t rows) {
    if (!scale) {
        if (zero_point) refuse("a dynamic quantizer has no zero point");
        return {{}, {}, 0};
    }
    const int64_t count = scale->numel();
    return {parameter(scale, {1, rows}, "scale"), parameter(zero_point, {count}, "zero_point"), count != 1};
}

// y [..., n] for x [..., k]; `rows` is what lies in front.
struct Product {
    Tensor x, y;
    int64_t rows, k;
};

Product product_of(const Tensor& x, int64_t n) {
    check_floats(x, "x");
    if (x.dim() == 0) refuse("x needs at least one dimension");
    Sizes sizes = sizes_of(x);
    const int64_t k = sizes.back();
    sizes.back() = n;
    const Tensor y = empty(sizes);
    return {dense(x), y, n > 0 ? y.numel() / n : 0, k};
}

// The sums of the codes of `n` outputs.
Maybe sums_of(const Maybe& sums, int64_t n) {
    if (!sums) return {};
    if (sums->scalar_type() != ScalarType::Int || sums->numel() != n) refuse("weight_sum must be ", n, " int32");
    return dense(*sums);
}

Tensor linear_operator(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Maybe& weight_sum,
                       const Maybe& bias, const Maybe& scale, const Maybe& zero_point, int64_t bits, int64_t qmin,
                       int64_t qmax, int64_t isa) {
    return named("linear", [&] {
        const int64_t n = weight_scale.numel();
        const Product p = product_of(x, n);
        const Maybe w_sum = sums_of(weight_sum, n);
        const Tensor w_scale = parameter(weight_scale, {n}, "weight_scale");
        const Maybe b = parameter(bias, {n}, "bias");
        const Scales s = scales_of(scale, zero_point, p.rows);
        check_layout(weight, linear_layout_bytes(bits, n, p.k));
        linear({narrow(isa), narrow(bits), in<float>(p.x), p.rows, p.k, n, in<float>(s.scale), in<float>(s.zero),
                s.stride, !scale, {qmin, qmax}, in<uint8_t>(weight), in<float>(w_scale), in<int32_t>(w_sum),
                in<float>(b), out(p.y), threads(), 0});
        return p.y;
    });
}

void check_grouped(const Tensor& weight, const Tensor& scale, const Maybe& sums, const Maybe& bias, int64_t n,
                   int64_t k, int64_t group_size, int64_t bits) {
    if (group_size < 1 || k % group_size != 0) refuse("groups of ", group_size, " do not divide ", k, " inputs");
    if (!fills(weight, ScalarType::Byte, linear_layout_bytes(bits, n, k))) {
        refuse(weight.numel(), " bytes of weights do not fit ", n, " x ", k, " codes");
    }
    const Sizes shape{ceil_div(n, kLanes), k / group_size, kLanes};
    const int64_t count = shape[0] * shape[1] * kLanes;
    const bool shaped = sizes_of(scale) == shape && (!sums || sizes_of(*sums) == shape);
    if (!shaped || !fills(scale, ScalarType::Float, count) || !fills(sums, ScalarType::Int, count) ||
        !fills(bias, ScalarType::Float, n)) {
        refuse("scales, sums or bias do not fit ", n, " x ", k, " codes in groups of ", group_size);
    }
}

Tensor grouped_linear_operator(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                               const Maybe& weight_sum, const Maybe& bias, const Maybe& scale, const Maybe& zero_point,
                               int64_t outputs, int64_t group_size, int64_t bits, int64_t qmin, int64_t qmax,
                               int64_t isa) {
    return named("grouped_linear", [&] {
        const Product p = product_of(x, outputs);
        if (scale && scale->numel() != 1 && scale->numel() != p.rows) {
            refuse(scale->numel(), " scales and their zero points do not fit ", p.rows, " rows");
        }
        const Scales s = scales_of(scale, zero_point, p.rows);
        check_grouped(weight, weight_scale, weight_sum, bias, outputs, p.k, group_size, bits);
        linear({narrow(isa), narrow(bits), in<float>(p.x), p.rows, p.k, outputs, in<float>(s.scale),
                in<float>(s.zero), s.stride, !scale, {qmin, qmax}, in<uint8_t>(weight), in<float>(weight_scale),
                in<int32_t>(weight_sum), in<float>(bias), out(p.y), threads(), group_size});
        return p.y;
    });
}

// The product by panels of decoded outputs, which stay in the last-level cache; torch multiplies.
void multiply_panels(const DecodedLinear& a) {
    const int64_t unit = a.bits == 3 ? 32 : 32 / a.bits;
    const int64_t padded = round_up(a.k, unit);
    const int64_t blocks = ceil_div(a.n, kLanes);
    const int64_t width = std::max<int64_t>(4, kPanelBytes / (4 * kLanes * padded));
    const Tensor panel = empty({padded, kLanes * std::min(width, blocks)});
    const Tensor rows = matrix(a.x, a.m, a.k, a.k);
    for (int64_t begin = 0; begin < blocks; begin += width) {
        const int64_t end = std::min(begin + width, blocks);
        decode_panel(a, begin, end, out(panel));
        const int64_t columns = std::min(end * kLanes, a.n) - begin * kLanes;
        const Tensor values = matrix(in<float>(panel), a.k, columns, (end - begin) * kLanes);
        const Tensor part = matrix(a.y + begin * kLanes, a.m, columns, a.n);
        succeed(aoti_torch_cpu_mm_out(part.get(), rows.get(), values.get()));
    }
    if (a.bias == nullptr) return;
    parallel_for(a.threads, [&](int index, int team) {
        const Range mine = share(a.m, 1, index, team);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            for (int64_t i = 0; i < a.n; ++i) a.y[row * a.n + i] += a.bias[i];
        }
    });
}

void check_decoded(const Tensor& layout, const Tensor& table, const Tensor& scales, const Maybe& zeros,
                   const Maybe& bias, int64_t n, int64_t k, int64_t group_size, int64_t bits) {
    if (group_size < 0 || (group_size > 0 && k % group_size != 0)) {
        refuse("groups of ", group_size, " do not divide ", k, " inputs");
    }
    if (!fills(layout, ScalarType::Byte, decoded_layout_bytes(bits, n, k))) {
        refuse(layout.numel(), " bytes of weights do not fit ", n, " x ", k, " codes");
    }
    const int64_t groups = group_size > 0 ? std::max<int64_t>(k / group_size, 1) : 1;
    const int64_t count = ceil_div(n, kLanes) * groups * kLanes;
    if (!fills(table, ScalarType::Float, 16) || !fills(scales, ScalarType::Float, count) ||
        !fills(zeros, ScalarType::Float, count) || !fills(bias, ScalarType::Float, n)) {
        refuse("table, scales, zeros or bias do not fit ", n, " x ", k, " codes");
    }
}

Tensor decoded_linear_operator(const Tensor& x, const Tensor& layout, const Tensor& table, const Tensor& scales,
                               const Maybe& zeros, const Maybe& bias, int64_t outputs, int64_t group_size, int64_t bits,
                               int64_t isa) {
    return named("decoded_linear", [&] {
        const Product p = product_of(x, outputs);
        check_decoded(layout, table, scales, zeros, bias, outputs, p.k, group_size, bits);
        const DecodedLinear job{narrow(isa), narrow(bits), in<float>(p.x), p.rows, p.k, outputs,
                                group_size > 0 ? group_size : std::max<int64_t>(p.k, 1), in<uint8_t>(layout),
                                in<float>(table), in<float>(scales), in<float>(zeros), in<float>(bias), out(p.y),
                                threads()};
        if (p.rows > kFewRows && p.k > 0) {
            multiply_panels(job);
        } else {
            decoded_linear(job);
        }
        return p.y;
    });
}

struct Pair {
    int64_t y, x;
};

Pair pair_of(const Sizes& values, const char* name) {
    if (values.size() != 2) refuse(name, " needs two values");
    for (int64_t value : values) size_product({value});
    return {values[0], values[1]};
}

// Outputs of a convolution along one axis.
int64_t convolved(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    if (stride < 1) refuse("stride must be positive, got ", stride);
    const int64_t padded = size_product({size + 2 * padding});
    const bool fits = kernel < 1 || dilation < 1 || kernel - 1 <= (padded - 1) / dilation;
    const int64_t span = fits ? (kernel - 1) * dilation + 1 : 0;
    if (!fits || span > padded) refuse("a filter of ", kernel, " does not fit an image of ", size);
    return (padded - span) / stride + 1;
}

Tensor conv2d_operator(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& weight_sum,
                       const Maybe& bias, const Tensor& scale, const Maybe& zero_point, const Sizes& kernel_size,
                       const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, int64_t bits,
                       int64_t qmin, int64_t qmax, int64_t isa) {
    return named("conv2d", [&] {
        check_floats(x, "x");
        if (x.dim() != 4) refuse("x must be [n, c, h, w], got ", text(x.sizes()));
        const int64_t o = weight_scale.numel();
        const Maybe w_sum = sums_of(weight_sum, o);
        const Tensor w_scale = parameter(weight_scale, {o}, "weight_scale");
        const Maybe b = parameter(bias, {o}, "bias");
        const Tensor step = parameter(scale, {1}, "scale");
        const Maybe zero = parameter(zero_point, {1}, "zero_point");
        const Tensor image = x.stride(1) != 1 && x.stride(3) != 1 ? dense(x) : x;
        const Sizes s = sizes_of(image);
        if (groups < 1 || s[1] % groups != 0) refuse(s[1], " channels do not divide into ", groups, " groups");
        const Pair kernel = pair_of(kernel_size, "kernel_size"), by = pair_of(stride, "stride");
        const Pair pad = pair_of(padding, "padding"), dil = pair_of(dilation, "dilation");
        const Tensor y = empty({s[0], o, convolved(s[2], kernel.y, by.y, pad.y, dil.y),
                                convolved(s[3], kernel.x, by.x, pad.x, dil.x)}, true);
        check_layout(weight, conv_layout_bytes(bits, o, s[1] / groups, kernel.y, kernel.x, groups));
        conv2d({narrow(isa), narrow(bits), in<float>(image), s[0], s[1], s[2], s[3],
                {image.stride(0), image.stride(1), image.stride(2), image.stride(3)}, o, kernel.y, kernel.x, by.y, by.x,
                pad.y, pad.x, dil.y, dil.x, groups, *in<float>(step), zero ? *in<float>(zero) : 0.0f, {qmin, qmax},
                in<uint8_t>(weight), in<float>(w_scale), in<int32_t>(w_sum), in<float>(b), out(y), threads(), nullptr,
                {}});
        return y;
    });
}

int best_isa() {
    if (has_avx512_vnni()) return static_cast<int>(Isa::kAvx512Vnni);
    if (has_avx2()) return static_cast<int>(Isa::kAvx2);
    if (has_neon_i8mm()) return static_cast<int>(Isa::kNeonI8mm);
    return static_cast<int>(has_neon_dotprod() ? Isa::kNeonDotprod : Isa::kPortable);
}

// x in the memory format of `like`.
Tensor laid_out(const Tensor& x, bool channels_last) {
    if (!channels_last) return dense(x);
    return is_channels_last(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Addend addend(const Tensor& x, const Tensor& scale, const Maybe& zero, const Sizes& range, const char* name) {
    if (range.size() != 2) refuse("a range needs two values");
    parameter(scale, {1}, name);
    parameter(zero, {1}, name);
    return {in<float>(x), *in<float>(scale), zero ? *in<float>(zero) : 0.0f, {range[0], range[1]}, nullptr};
}

Tensor add_operator(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Maybe& zero_a, const Tensor& scale_b,
                    const Maybe& zero_b, const Sizes& range_a, const Sizes& range_b) {
    return named("add", [&] {
        check_floats(a, "a");
        check_floats(b, "b");
        const Sizes sizes = sizes_of(a);
        if (sizes != sizes_of(b)) refuse("shapes differ: ", text(a.sizes()), " and ", text(b.sizes()));
        const bool channels_last = is_channels_last(a);
        const Tensor left = laid_out(a, channels_last), right = laid_out(b, channels_last);
        const Tensor y = empty(sizes, channels_last);
        add(best_isa(), addend(left, scale_a, zero_a, range_a, "scale_a or zero_a"),
            addend(right, scale_b, zero_b, range_b, "scale_b or zero_b"), left.numel(), out(y), {}, threads());
        return y;
    });
}

}  // namespace
}  // namespace bitwright

STABLE_TORCH_LIBRARY_FRAGMENT(bitwright, m) {
    m.def(
        "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_sum, Tensor? bias, Tensor? scale, "
        "Tensor? zero_point, int bits, int qmin, int qmax, int isa) -> Tensor");
    m.def(
        "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_sum, Tensor? bias, Tensor? scale, "
        "Tensor? zero_point, int outputs, int group_size, int bits, int qmin, int qmax, int isa) -> Tensor");
    m.def(
        "decoded_linear(Tensor x, Tensor layout, Tensor table, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int outputs, int group_size, int bits, int isa) -> Tensor");
    m.def(
        "conv2d(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias, Tensor scale, "
        "Tensor? zero_point, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "int bits, int qmin, int qmax, int isa) -> Tensor");
    m.def(
        "add(Tensor a, Tensor b, Tensor scale_a, Tensor? zero_a, Tensor scale_b, Tensor? zero_b, "
        "int[2] range_a, int[2] range_b) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bitwright, CPU, m) {
    m.impl("linear", TORCH_BOX(&bitwright::linear_operator));
    m.impl("grouped_linear", TORCH_BOX(&bitwright::grouped_linear_operator));
    m.impl("decoded_linear", TORCH_BOX(&bitwright::decoded_linear_operator));
    m.impl("conv2d", TORCH_BOX(&bitwright::conv2d_operator));
    m.impl("add", TORCH_BOX(&bitwright::add_operator));
}
