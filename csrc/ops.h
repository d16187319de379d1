// The operations the Python module offers. Pointers and sizes only; the Python side owns the tensors and
// checks their types. Every function throws std::invalid_argument for impossible arguments and std::bad_alloc
// when memory runs out.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace bitwright {

inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// The product of sizes; throws where one is negative or the result could not be a size in memory.
inline int64_t size_product(std::initializer_list<int64_t> sizes) {
    constexpr int64_t kLimit = int64_t{1} << 46;
    int64_t product = 1;
    for (int64_t size : sizes) {
        require(size >= 0, "negative size");
        require(size < kLimit && (size == 0 || product <= kLimit / size), "size too large");
        product *= size;
    }
    return product;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Integer codes of the activations. `zero_point` is integer-valued.
struct Range8 {
    int64_t qmin;
    int64_t qmax;
};

void check_range(const Range8& range);

// Throws unless zero is a small integer and `depth` products of centred codes with weights of at most
// `weight_limit` in magnitude fit in an int32 accumulator.
void check_zero_point(float zero, const Range8& range, int64_t depth, int64_t weight_limit);

// The quantizer whose bytes are code + shift, for a checked zero point.
Quantizer make_quantizer(float scale, float zero, const Range8& range, int32_t shift);

struct Linear {
    int isa;
    int bits;
    const float* x;  // [m, k]
    int64_t m, k, n;
    const float* scale;    // one, or one per row; unused when dynamic
    const float* zero;     // like scale, or null
    int64_t scale_stride;  // 0 or 1
    bool dynamic;          // symmetric, one scale per row from its largest magnitude
    Range8 range;
    const uint8_t* w;      // pack_linear
    const float* w_scale;  // [n]
    const int32_t* w_sum;  // [n], or null where activations are symmetric and fit what the kernel multiplies
    const float* bias;     // [n] or null
    float* y;              // [m, n]
    int threads;
    int64_t group_size;  // inputs that share a scale; then w_scale and w_sum are [ceil(n / 16)][k / group_size][16].
                         // 0: one scale per output
};

int64_t linear_layout_bytes(int64_t bits, int64_t n, int64_t k);
void pack_linear(const int8_t* codes, int64_t bits, int64_t n, int64_t k, uint8_t* out);
void linear(const Linear& args);

// The inverses of pack_linear and pack_decoded: unpack.cpp.
void unpack_linear(const uint8_t* in, int64_t bits, int64_t n, int64_t k, int8_t* codes);
void unpack_decoded(const uint8_t* in, int64_t bits, int64_t n, int64_t k, uint8_t* codes);

// Weights (table[code] - zero) * scale, at 8 bits (code - zero) * scale, against float activations.
struct DecodedLinear {
    int isa;
    int bits;  // 8, 4, 3 or 2
    const float* x;  // [m, k]
    int64_t m, k, n;
    int64_t group_size;   // inputs that share a scale; k or more for one scale per output row
    const uint8_t* w;     // pack_decoded
    const float* table;   // [16]
    const float* scales;  // [ceil(n / 16)][groups][16]
    const float* zeros;   // the same, or null
    const float* bias;    // [n] or null
    float* y;             // [m, n]
    int threads;
};

int64_t decoded_layout_bytes(int64_t bits, int64_t n, int64_t k);
void pack_decoded(const uint8_t* codes, int64_t bits, int64_t n, int64_t k, uint8_t* out);
void decoded_linear(const DecodedLinear& args);

// The float values of the blocks [begin, end) of 16 outputs: [inputs in whole units][16 * (end - begin)]. Of `args`,
// what belongs to rows is not read.
void decode_panel(const DecodedLinear& args, int64_t begin, int64_t end, float* out);

// Bytes in place of float32 results: the codes that a consumer's quantizer gives clamp(result, low, high), plus 128
// where codes are signed. Images of bytes are [n][h][w][channels rounded up to 4].
struct Bytes {
    uint8_t* out;  // null: results stay float32
    float scale, zero;
    Range8 range;
    float low, high;
};

// The bounds of `bytes` put into its quantizer: division is monotone.
Quantizer bounded_quantizer(const Bytes& bytes);

struct Conv {
    int isa;
    int bits;  // 8, 4, 3 or 2
    const float* x;
    int64_t n, c, h, w;
    int64_t x_stride[4];  // elements; channels or columns must be adjacent
    int64_t o, kh, kw;
    int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
    float scale, zero;
    Range8 range;
    const uint8_t* weight;  // pack_conv
    const float* w_scale;   // [o]
    const int32_t* w_sum;   // [o]
    const float* bias;      // [o] or null
    float* y;               // [n, ho, wo, o]
    int threads;
    const uint8_t* x_bytes;  // in place of x: its bytes by the same quantizer
    Bytes to;
};

int64_t conv_layout_bytes(int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw, int64_t groups);
void pack_conv(const int8_t* codes, int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw,
               int64_t groups, uint8_t* out);
void unpack_conv(const uint8_t* in, int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw,
                 int64_t groups, int8_t* codes);
void conv2d(const Conv& args);

// The bytes of images [n, c, h, w] with the strides of `x_stride`; `x` as in Conv.
void encode_images(int isa, const float* x, int64_t n, int64_t c, int64_t h, int64_t w, const int64_t (&x_stride)[4],
                   const Bytes& to, int threads);

// The largest byte of every window of images [n, h, w, c]; pixels outside never win.
struct Pool {
    const uint8_t* x;
    int64_t n, h, w, c, kh, kw, stride_h, stride_w, pad_h, pad_w;
    uint8_t* y;  // [n, ho, wo, c]
    int threads;
};

void max_pool(const Pool& args);

struct Addend {
    const float* x;
    float scale, zero;
    Range8 range;
    const uint8_t* bytes;  // in place of x
};

// Centred codes of x as float32 or bfloat16, whichever pointer is not null.
void centred_codes(int isa, const Addend& x, int64_t count, float* wide, uint16_t* narrow, int threads);

// Codes of symmetric weights and the sum of each row.
void weight_codes(int isa, const float* w, int64_t rows, int64_t columns, const float* scale, int64_t scale_stride,
                  const Range8& range, int8_t* codes, int32_t* sums, int threads);

// Integer codes cannot carry NaN on; who must see it asks first.
bool has_nan(const float* x, int64_t count, int threads);

struct StraightThrough {
    const float* wide;  // gradient to the values [rows, columns], or
    const uint16_t* narrow;  // the same in bfloat16
    const float* x;
    int64_t rows, columns;
    const float* scale;
    int64_t scale_stride;  // 0, or 1 for a scale per row
    float zero;
    Range8 range;
    bool learned;
    float* dx;
    float* sums;  // [3, rows]
    int threads;
};

void straight_through(int isa, const StraightThrough& args);

// Per channel of y [rows, channels]: sums of y - origin and of its square.
void moments(int isa, const float* y, int64_t rows, int64_t channels, const float* origin, double* sum,
             double* square, int threads);

// Sums as float32 in `out`, or as bytes.
void add(int isa, const Addend& a, const Addend& b, int64_t count, float* out, const Bytes& to, int threads);

}  // namespace bitwright
