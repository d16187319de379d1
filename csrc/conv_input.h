// The quantized input of a convolution: an NHWC byte image whose border holds the code of 0. A pixel is
// `groups` times `group_bytes` bytes, group_bytes being the channels of a group rounded up to 4; the bytes in
// between meet weights that are 0.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "ops.h"

namespace bitwright {

struct Image {
    int64_t groups, channels;  // of each group
    int64_t group_bytes, pixel_bytes, row_bytes, image_bytes;
    bool channels_adjacent;  // else columns may be adjacent
    bool flat_planes;        // all pixels of a small channel in one go
    int64_t unit_pixels;     // entries of the table of pixel offsets
    int64_t row_scratch;     // bytes each thread needs

    static Image of(const Conv& a, int64_t groups);

    // Destination of each pixel of a plane (or of a row), relative to the first.
    void fill_offsets(int64_t* offsets) const;

    // The share of member `index` of `count` in filling in `images` images from number `first` on.
    void fill(const Conv& a, const Kernels& kernels, const Quantizer& quantizer, int64_t first, int64_t images,
              uint8_t* out, uint8_t* row_scratch_bytes, const int64_t* offsets, int index, int count) const;

private:
    int64_t width_;  // of the source

    void borders(const Conv& a, uint8_t fill, uint8_t* image, int64_t row_begin, int64_t row_end) const;
    void channels_last_row(const Conv& a, const Kernels& kernels, const Quantizer& quantizer, const float* x,
                           uint8_t* out, uint8_t* scratch) const;
    void bytes_row(const Conv& a, const uint8_t* x, uint8_t* out) const;
    void planes(const Conv& a, const Kernels& kernels, const Quantizer& quantizer, const float* x,
                int64_t pixel_stride, int64_t pixels, uint8_t* out, const int64_t* offsets) const;
};

}  // namespace bitwright
