// 2-d convolution as a matrix product of bytes that reads its windows in place. The input becomes
// an NHWC byte image with its border filled in; channels are padded to 4 per group so that every step of 4
// inputs lies inside one pixel. A row of output pixels is then a strip: neighbours are stride_w pixels apart,
// and the window is a list of runs, one per filter row where its pixels are adjacent (no dilation, one
// group), else one per tap. No copy of the windows is made. Input that comes as bytes is copied into that image
// (read in place where it needs neither border nor padding); results leave as float32, or as the bytes that the
// next layer reads. Weights of 4, 3 and 2 bits are unpacked to bytes slab by slab, which all strips of a thread
// then share. Their layouts: conv_weights.h.
#include "conv_input.h"
#include "conv_weights.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "strips.h"

namespace bitwright {
namespace {

constexpr int64_t kChunkBytes = 16 << 20;  // of the quantized images that are in memory at once
constexpr int64_t kStripPixels = 96;
constexpr int64_t kSerialEncode = 1 << 14;

// The geometry of one call after simplification.
struct Plan {
    Conv a;
    Image image;
    bool depthwise;
    int64_t ho, wo;
    int64_t o_per_group, blocks, block_bytes;  // as the kernel reads them
    int64_t packed_bytes;                      // of a block
    int64_t runs, run_groups;
    bool flat;  // 1x1 without border: strips are pieces of one sequence of pixels
    int64_t strip_pixels;
    bool in_place;     // the bytes of the input are the image
    int64_t y_pixel;   // elements of an output pixel
};

void check(const Conv& a) {
    check_filter_bits(a.bits);
    size_product({a.n, a.c, a.h, a.w});
    size_product({a.o, a.c, a.kh, a.kw});
    require(a.c > 0 && a.h > 0 && a.w > 0 && a.o > 0 && a.kh > 0 && a.kw > 0, "empty image or filter");
    require(a.groups > 0 && a.c % a.groups == 0 && a.o % a.groups == 0,
            "channels do not divide into the groups");
    require(a.stride_h > 0 && a.stride_w > 0 && a.dil_h > 0 && a.dil_w > 0,
            "stride and dilation must be positive");
    require(a.pad_h >= 0 && a.pad_w >= 0, "negative padding");
    size_product({a.dil_h, a.kh});
    size_product({a.dil_w, a.kw});
    for (int64_t value : {a.stride_h, a.stride_w, a.dil_h, a.dil_w, a.pad_h, a.pad_w}) {
        require(value < int64_t{1} << 24, "stride, dilation or padding too large");
    }
    require(a.threads >= 1, "threads must be positive");
    check_range(a.range);
    check_zero_point(a.zero, a.range, a.c / a.groups * a.kh * a.kw, 128);
    const bool inside =
        a.zero >= static_cast<float>(a.range.qmin) && a.zero <= static_cast<float>(a.range.qmax);
    require(inside || (a.pad_h == 0 && a.pad_w == 0), "padding needs a zero point inside the range of codes");
    require(a.x != nullptr || a.x_bytes != nullptr || a.n == 0, "null pointer");
    require(a.y != nullptr || a.to.out != nullptr || a.n == 0, "null pointer");
    require(a.weight != nullptr && a.w_scale != nullptr && a.w_sum != nullptr, "null pointer");
}

Plan make_plan(const Conv& args) {
    Plan p{};
    p.a = args;
    Conv& a = p.a;
    p.ho = (a.h + 2 * a.pad_h - a.dil_h * (a.kh - 1) - 1) / a.stride_h + 1;
    p.wo = (a.w + 2 * a.pad_w - a.dil_w * (a.kw - 1) - 1) / a.stride_w + 1;
    require(a.h + 2 * a.pad_h > a.dil_h * (a.kh - 1) && a.w + 2 * a.pad_w > a.dil_w * (a.kw - 1),
            "filter larger than image");
    const bool pointwise = a.kh == 1 && a.kw == 1 && a.pad_h == 0 && a.pad_w == 0;
    if (pointwise) {  // read only the pixels that are used
        a.h = p.ho;
        a.w = p.wo;
        a.x_stride[2] *= a.stride_h;
        a.x_stride[3] *= a.stride_w;
        a.stride_h = a.stride_w = 1;
    }
    p.depthwise = is_depthwise(a.o, a.c / a.groups, a.groups);
    const int64_t groups = p.depthwise ? 1 : a.groups;
    p.image = Image::of(a, groups);
    const bool dense = a.x_stride[2] == a.w * p.image.pixel_bytes && a.x_stride[0] == a.h * a.x_stride[2];
    p.in_place = a.x_bytes != nullptr && dense && groups == 1 && a.pad_h == 0 && a.pad_w == 0 && !p.depthwise;
    p.y_pixel = a.to.out != nullptr ? round_up(a.o, 4) : a.o;
    p.o_per_group = a.o / groups;
    p.blocks = ceil_div(p.o_per_group, kLanes);
    const bool adjacent = groups == 1 && a.dil_w == 1;
    p.runs = adjacent ? a.kh : a.kh * a.kw;
    p.run_groups = p.image.group_bytes / 4 * (adjacent ? a.kw : 1);
    p.block_bytes = p.runs * p.run_groups * kGroupBytes;
    p.packed_bytes = p.block_bytes / 8 * a.bits;
    p.flat = pointwise && !p.depthwise;
    p.strip_pixels = p.flat ? kStripPixels : p.wo;
    return p;
}

// Where the runs of a window start, relative to its first pixel.
void fill_offsets(const Plan& p, int64_t* offsets) {
    for (int64_t i = 0; i < p.a.kh; ++i) {
        for (int64_t j = 0; j < p.runs / p.a.kh; ++j) {
            *offsets++ = i * p.a.dil_h * p.image.row_bytes + j * p.a.dil_w * p.image.pixel_bytes;
        }
    }
}

struct Buffers {
    const uint8_t* images;
    int64_t* offsets;
    RowTerms* terms;
    uint8_t* panels;  // of unpacked weights, one per thread
    int64_t panel_bytes;
    Quantizer to;
    int64_t first;  // element of the results that belongs to the first of the images

    float* y(const Plan& p, int64_t at) const { return p.a.to.out == nullptr ? p.a.y + first + at : nullptr; }
    uint8_t* bytes(const Plan& p, int64_t at) const {
        return p.a.to.out == nullptr ? nullptr : p.a.to.out + first + at;
    }
};

// Depthwise rows [begin, end) of the images in the buffer.
void depthwise_rows(const Plan& p, const Kernels& kernels, const Buffers& b, Range rows) {
    const Conv& a = p.a;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const uint8_t* x =
            b.images + row / p.ho * p.image.image_bytes + row % p.ho * a.stride_h * p.image.row_bytes;
        kernels.depthwise({x, a.stride_w * p.image.pixel_bytes, p.wo, a.kh, a.kw, a.dil_h * p.image.row_bytes,
                           a.dil_w * p.image.pixel_bytes, reinterpret_cast<const int8_t*>(a.weight),
                           round_up(a.c, kLanes), a.c, a.w_scale, a.w_sum, a.bias, *b.terms,
                           b.y(p, row * p.wo * p.y_pixel), b.bytes(p, row * p.wo * p.y_pixel), b.to, p.y_pixel});
    }
}

// The strip `i` of group `g` of the images in the buffer, from the output block on whose weights are at `w`.
Gemm dense_strip(const Plan& p, const Buffers& b, int64_t images, int64_t g, int64_t i, int64_t block,
                 const uint8_t* w) {
    const Conv& a = p.a;
    Gemm gemm{};
    const int64_t first = g * p.o_per_group + block * kLanes;
    if (p.flat) {
        const int64_t pixel = i * p.strip_pixels;
        gemm.x = b.images + pixel * p.image.pixel_bytes;
        gemm.rows = std::min(p.strip_pixels, images * p.ho * p.wo - pixel);
    } else {
        gemm.x = b.images + i / p.ho * p.image.image_bytes + i % p.ho * a.stride_h * p.image.row_bytes;
        gemm.rows = p.wo;
    }
    gemm.x += g * p.image.group_bytes;
    gemm.x_stride = a.stride_w * p.image.pixel_bytes;
    gemm.run_offsets = b.offsets;
    gemm.runs = p.runs;
    gemm.run_groups = p.run_groups;
    gemm.w = w;
    gemm.block_bytes = p.block_bytes;
    gemm.columns = p.o_per_group - block * kLanes;
    gemm.w_scale = a.w_scale + first;
    gemm.w_sum = a.w_sum + first;
    gemm.bias = a.bias != nullptr ? a.bias + first : nullptr;
    gemm.terms = b.terms;
    gemm.y = b.y(p, i * p.strip_pixels * p.y_pixel + first);
    gemm.y_stride = p.y_pixel;
    gemm.bytes = b.bytes(p, i * p.strip_pixels * p.y_pixel + first);
    gemm.to = b.to;
    return gemm;
}

int threads_for(const Plan& p, int64_t images) {
    const Conv& a = p.a;
    const double outputs = static_cast<double>(images * p.ho * p.wo * a.o);
    const double work = outputs * static_cast<double>(a.c / a.groups * a.kh * a.kw);
    return work <= kSerialWork ? 1 : a.threads;
}

Work work_of(const Plan& p, const Kernels& kernels, int64_t images) {
    const int64_t strips = p.flat ? ceil_div(images * p.ho * p.wo, p.strip_pixels) : images * p.ho;
    return {strips, p.blocks, p.block_bytes, kernels.gemm[0]};
}

// What a thread needs for unpacked weights.
int64_t panel_bytes(const Plan& p, const Kernels& kernels) {
    if (p.a.bits == 8 || p.depthwise) return 0;
    return std::min(p.blocks, slab_blocks(work_of(p, kernels, 1), kernels)) * p.block_bytes;
}

void multiply(const Plan& p, const Kernels& kernels, const Buffers& b, int64_t images) {
    const Conv& a = p.a;
    const int threads = threads_for(p, images);
    if (p.depthwise) {
        parallel_for(threads, [&](int index, int count) {
            depthwise_rows(p, kernels, b, share(images * p.ho, 1, index, count));
        });
        return;
    }
    const Work all = work_of(p, kernels, images);
    const UnpackBlocks unpack_blocks = a.bits == 8 ? nullptr : block_unpacker(a.isa, a.bits);
    const bool by_blocks = split_by_blocks(all, kernels, threads, images * p.image.image_bytes / a.groups);
    parallel_for(threads, [&](int index, int count) {
        for (int64_t g = 0; g < a.groups; ++g) {
            const uint8_t* w = a.weight + g * p.blocks * p.packed_bytes;
            if (unpack_blocks == nullptr) {
                const auto strip_at = [&](int64_t i) { return dense_strip(p, b, images, g, i, 0, w); };
                run_strips(kernels, all, by_blocks, strip_at, index, count);
                continue;
            }
            uint8_t* panel = b.panels + index * b.panel_bytes;
            const auto unpack = [&](int64_t begin, int64_t end) {
                unpack_blocks(w + begin * p.packed_bytes, p.block_bytes, end - begin, panel);
            };
            const auto strip_at = [&](int64_t i, int64_t begin) {
                return dense_strip(p, b, images, g, i, begin, panel);
            };
            run_panels(kernels, all, by_blocks, unpack, strip_at, index, count);
        }
    });
}

}  // namespace

void conv2d(const Conv& args) {
    check(args);
    const Kernels& kernels = bitwright::kernels(args.isa);
    const Plan p = make_plan(args);
    if (p.a.n == 0) return;
    size_product({p.a.n, p.ho, p.wo, p.a.o});
    const int32_t shift = p.a.range.qmin < 0 ? 128 : 0;
    const Quantizer quantizer = make_quantizer(p.a.scale, p.a.zero, p.a.range, shift);
    const int64_t chunk = std::max<int64_t>(1, std::min(p.a.n, kChunkBytes / p.image.image_bytes));
    // Depthwise reads 16 channels at a time.
    const int64_t image_bytes = p.in_place ? 0 : chunk * p.image.image_bytes + 64;
    const int64_t rows_bytes = size_product({p.a.threads, p.image.row_scratch});
    const int64_t panel = panel_bytes(p, kernels), panels = size_product({threads_for(p, chunk), panel});
    Scratch scratch(Scratch::bytes<uint8_t>(image_bytes) + Scratch::bytes<int64_t>(p.runs) +
                    Scratch::bytes<RowTerms>(1) + Scratch::bytes<uint8_t>(panels) + Scratch::bytes<uint8_t>(rows_bytes) +
                    Scratch::bytes<int64_t>(p.image.unit_pixels));
    uint8_t* images = scratch.take<uint8_t>(image_bytes);
    Buffers buffers{images, scratch.take<int64_t>(p.runs), scratch.take<RowTerms>(1), scratch.take<uint8_t>(panels),
                    panel, {}, 0};
    if (p.a.to.out != nullptr) buffers.to = bounded_quantizer(p.a.to);
    uint8_t* rows_scratch = scratch.take<uint8_t>(rows_bytes);
    int64_t* pixel_offsets = scratch.take<int64_t>(p.image.unit_pixels);
    fill_offsets(p, buffers.offsets);
    p.image.fill_offsets(pixel_offsets);
    *buffers.terms = {quantizer.scale, quantizer.offset - (p.depthwise ? 0 : kernels.byte_bias), 0};
    for (int64_t first = 0; first < p.a.n; first += chunk) {
        const int64_t count = std::min(chunk, p.a.n - first);
        buffers.first = first * p.ho * p.wo * p.y_pixel;
        if (p.in_place) {
            buffers.images = p.a.x_bytes + first * p.image.image_bytes;
        } else {
            parallel_for(threads_for(p, count), [&](int index, int team) {
                uint8_t* row = rows_scratch + index * p.image.row_scratch;
                p.image.fill(p.a, kernels, quantizer, first, count, images, row, pixel_offsets, index, team);
            });
        }
        multiply(p, kernels, buffers, count);
    }
}

void encode_images(int isa, const float* x, int64_t n, int64_t c, int64_t h, int64_t w, const int64_t (&x_stride)[4],
                   const Bytes& to, int threads) {
    size_product({n, c, h, w});
    require(threads >= 1, "threads must be positive");
    if (size_product({n, c, h, w}) == 0) return;
    require(x != nullptr && to.out != nullptr, "null pointer");
    const Kernels& kernels = bitwright::kernels(isa);
    const Quantizer quantizer = bounded_quantizer(to);
    Conv a{};
    a.x = x;
    a.n = n;
    a.c = c;
    a.h = h;
    a.w = w;
    for (int i = 0; i < 4; ++i) a.x_stride[i] = x_stride[i];
    const Image image = Image::of(a, 1);
    const int64_t rows_bytes = size_product({threads, image.row_scratch});
    Scratch scratch(Scratch::bytes<uint8_t>(rows_bytes) + Scratch::bytes<int64_t>(image.unit_pixels));
    uint8_t* rows_scratch = scratch.take<uint8_t>(rows_bytes);
    int64_t* offsets = scratch.take<int64_t>(image.unit_pixels);
    image.fill_offsets(offsets);
    parallel_for(n * c * h * w <= kSerialEncode ? 1 : threads, [&](int index, int team) {
        uint8_t* row = rows_scratch + index * image.row_scratch;
        image.fill(a, kernels, quantizer, 0, n, to.out, row, offsets, index, team);
    });
}

}  // namespace bitwright
