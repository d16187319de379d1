// Quantizes images to NHWC bytes from either memory format. Adjacent channels are one long run per row (per
// pixel where the rows have gaps). Adjacent columns go up to 16 channels at a time, 16 pixels per vector:
// small planes as one sequence of pixels in pieces that keep the destination in the L1 cache, large ones row
// by row. Any sizes and strides are allowed; strides where neither is adjacent are only slower. Images that are bytes
// already are copied.
#include "conv_input.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace bitwright {
namespace {

constexpr int64_t kFlatPixels = 4096;
constexpr int64_t kPiece = 64;  // pixels of a flat plane handled before the next channels

}  // namespace

Image Image::of(const Conv& a, int64_t groups) {
    Image image{};
    image.groups = groups;
    image.channels = a.c / groups;
    image.group_bytes = round_up(image.channels, 4);
    image.pixel_bytes = image.group_bytes * groups;
    image.row_bytes = size_product({image.pixel_bytes, a.w + 2 * a.pad_w});
    image.image_bytes = size_product({image.row_bytes, a.h + 2 * a.pad_h});
    image.channels_adjacent = a.x_stride[1] == 1 && a.c > 1;
    const bool dense = a.x_stride[2] == a.w * a.x_stride[3];
    image.flat_planes = !image.channels_adjacent && dense && a.h * a.w <= kFlatPixels;
    image.unit_pixels = image.flat_planes ? a.h * a.w : a.w;
    image.row_scratch =
        image.channels_adjacent && image.group_bytes != image.channels ? round_up(a.w * a.c, 64) : 0;
    image.width_ = a.w;
    return image;
}

void Image::fill_offsets(int64_t* offsets) const {
    for (int64_t i = 0, row = 0; i < unit_pixels; row += row_bytes) {
        for (int64_t column = 0; column < width_; ++column) offsets[i++] = row + column * pixel_bytes;
    }
}

void Image::borders(const Conv& a, uint8_t fill, uint8_t* image, int64_t row_begin, int64_t row_end) const {
    const int64_t side = a.pad_w * pixel_bytes;
    for (int64_t row = row_begin; row < row_end; ++row) {
        uint8_t* out = image + row * row_bytes;
        if (row < a.pad_h || row >= a.pad_h + a.h) {
            std::memset(out, fill, static_cast<size_t>(row_bytes));
        } else if (side > 0) {
            std::memset(out, fill, static_cast<size_t>(side));
            std::memset(out + row_bytes - side, fill, static_cast<size_t>(side));
        }
    }
}

void Image::channels_last_row(const Conv& a, const Kernels& kernels, const Quantizer& quantizer,
                              const float* x, uint8_t* out, uint8_t* scratch) const {
    const bool packed = group_bytes == channels;
    uint8_t* bytes = packed ? out : scratch;
    if (a.x_stride[3] == a.c) {
        kernels.quantize(x, a.w * a.c, quantizer, bytes);
    } else {
        for (int64_t i = 0; i < a.w; ++i)
            kernels.quantize(x + i * a.x_stride[3], a.c, quantizer, bytes + i * a.c);
    }
    if (packed) return;
    for (int64_t i = 0; i < a.w * groups; ++i) {
        std::memset(out + (i + 1) * group_bytes - 4, 0, 4);
        std::memcpy(out + i * group_bytes, bytes + i * channels, static_cast<size_t>(channels));
    }
}

void Image::bytes_row(const Conv& a, const uint8_t* x, uint8_t* out) const {
    if (groups == 1 && a.x_stride[3] == pixel_bytes) {
        std::memcpy(out, x, static_cast<size_t>(a.w * pixel_bytes));
        return;
    }
    for (int64_t i = 0; i < a.w; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* group = out + (i * groups + g) * group_bytes;
            std::memset(group + group_bytes - 4, 0, 4);
            std::memcpy(group, x + i * a.x_stride[3] + g * channels, static_cast<size_t>(channels));
        }
    }
}

void Image::planes(const Conv& a, const Kernels& kernels, const Quantizer& quantizer, const float* x,
                   int64_t pixel_stride, int64_t pixels, uint8_t* out, const int64_t* offsets) const {
    const int64_t step = a.x_stride[1];
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t c = 0; c < channels; c += kLanes) {
            const Planes planes{x + (g * channels + c) * step,  step,   pixel_stride,
                                std::min(kLanes, channels - c), pixels, offsets,
                                out + g * group_bytes + c};
            kernels.quantize_planes(planes, quantizer);
        }
    }
}

void Image::fill(const Conv& a, const Kernels& kernels, const Quantizer& quantizer, int64_t first, int64_t images,
                 uint8_t* out, uint8_t* row_scratch_bytes, const int64_t* offsets, int index, int count) const {
    const uint8_t fill = static_cast<uint8_t>(quantizer.offset);
    const int64_t border = a.pad_h * row_bytes + a.pad_w * pixel_bytes;
    const int64_t padded = a.h + 2 * a.pad_h;
    const Range mine = share(images * padded, 1, index, count);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        borders(a, fill, out + row / padded * image_bytes, row % padded, row % padded + 1);
    }
    if (flat_planes && a.x_bytes == nullptr) {
        const int64_t pieces = ceil_div(a.h * a.w, kPiece);
        const Range part = share(images * pieces, 1, index, count);
        for (int64_t i = part.begin; i < part.end; ++i) {
            const int64_t pixel = i % pieces * kPiece;
            const float* x = a.x + (first + i / pieces) * a.x_stride[0] + pixel * a.x_stride[3];
            planes(a, kernels, quantizer, x, a.x_stride[3], std::min(kPiece, a.h * a.w - pixel),
                   out + i / pieces * image_bytes + border, offsets + pixel);
        }
        return;
    }
    const Range part = share(images * a.h, 1, index, count);
    for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t at = (first + i / a.h) * a.x_stride[0] + i % a.h * a.x_stride[2];
        uint8_t* row = out + i / a.h * image_bytes + border + i % a.h * row_bytes;
        if (a.x_bytes != nullptr) {
            bytes_row(a, a.x_bytes + at, row);
        } else if (channels_adjacent) {
            channels_last_row(a, kernels, quantizer, a.x + at, row, row_scratch_bytes);
        } else {
            planes(a, kernels, quantizer, a.x + at, a.x_stride[3], a.w, row, offsets);
        }
    }
}

}  // namespace bitwright
