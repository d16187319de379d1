// What the drivers (linear.cpp, conv.cpp, elementwise.cpp) and the instruction sets share: plain
// structs and one table of function pointers per instruction set. No templates and no inline functions here:
// a header that is compiled with different -m flags must not emit shared code, or the linker could keep the
// AVX-512 copy for every machine.
//
// Packed weights (the same bytes for every instruction set)
//   A block is 16 consecutive output rows. Inside a block k advances in steps of 4: one step is 16 rows x 4
//   consecutive k, row-major, so 64 bytes hold the codes of lane r at bytes 4r..4r+3. Blocks follow each
//   other, each `block_bytes` long.
//     8 bit: 64 bytes = one step; signed codes w.
//     4 bit: 64 bytes = two steps; unsigned w + 8, low nibble = even step, high nibble = odd step.
//     2 bit: 64 bytes = four steps; unsigned w + 2, bits 2s..2s+1 of a byte belong to step s.
//     3 bit: 192 bytes = eight steps; unsigned w + 4, two times four steps of the lower 2 bits, then bit s of a
//            byte is the third bit of step s.
//   64 bytes are called a group: 4, 8 or 16 inputs. Rows are padded to 16 and k to whole groups; the
//   padding holds the code 0. Convolutions: see conv.cpp.
//   For float activations ("decoded") the same, with indices of a table in place of w + 8 and w + 2 (8 bit:
//   signed codes), and
//     3 bit: 192 bytes = 32 inputs: two groups of the lower 2 bits, then the third bits; that of input i is
//            bit i of the lane.
//
// Quantized activations are bytes
//   8 bit weights: code + (qmin < 0 ? 128 : 0), unsigned. Signed weights times unsigned activations need no
//   row sums, and padding weights (0) make any padding activation harmless. An instruction set that multiplies
//   signed bytes only takes `byte_bias` = 128 off each byte as it reads it; `zero` below is that much smaller.
//   4 and 2 bit weights: code - (qmax > 127 ? 128 : 0), signed, padded with 0. Here the weights are the
//   unsigned side, which saves their sign extension, and the row term carries 8 (or 2) times the row's sum.
//   8 bit weights with a scale per group and activations that fit a signed byte: code, signed. So symmetric
//   activations have no zero, and the weights need no sums. An instruction set that multiplies unsigned by signed
//   bytes adds `signed_half` = 128 to each weight as it reads it, and the row term takes that much of the row's sum.
//   Either way, modulo 2^32 and with the terms of `RowTerms`:
//     sum_k (code - z) * w  =  dot - constant - zero * w_sum
#pragma once

#include <cstdint>

namespace bitwright {

constexpr int64_t kLanes = 16;       // output rows of a block, lanes of every logical vector
constexpr int64_t kGroupBytes = 64;  // one load of weights
constexpr int kSignedEight = 9;      // stands for 8 bit weights against signed activations
constexpr int64_t kAheadBytes = 1024;  // how far ahead of a single row its weights are requested

// byte = int(rint(clamp(x / scale, low, high))) + offset, with low = qmin - z and high = qmax - z. This
// equals the definition clamp(rint(x / scale) + z, qmin, qmax): rounding is monotone and the bounds are
// integers. `inverse` is 1 / scale where the quotient may be found by multiplications (see quantize.h), else 0.
struct Quantizer {
    float scale;
    float low;
    float high;
    int32_t offset;
    float inverse;
};

// y = float(dot - constant - zero * w_sum) * (scale * w_scale) + bias
struct RowTerms {
    float scale;
    int32_t zero;
    int32_t constant;
};

// A strip: `rows` rows of activations at a constant distance, times blocks of packed weights. The k axis may
// be cut into `runs` of equal length whose positions relative to the row are listed (a convolution reads its
// window in place).
struct Gemm {
    const uint8_t* x;
    int64_t x_stride;
    int64_t rows;
    const int64_t* run_offsets;
    int64_t runs;
    int64_t run_groups;  // weight groups per run
    const uint8_t* w;
    int64_t block_bytes;
    int64_t columns;  // outputs that exist (the last block may be padding)
    const float* w_scale;
    const int32_t* w_sum;  // or null where no row has a zero
    const float* bias;     // or null
    const RowTerms* terms;
    int64_t terms_stride;  // 0: one entry for all rows
    float* y;
    int64_t y_stride;
    uint8_t* bytes;  // where results become bytes: then y is not written
    Quantizer to;
    // Only where scales belong to groups of inputs; then w_scale and w_sum are [blocks][scale_groups][16], there is
    // one run, and `run_groups` counts the units (loads, at 3 bits 192 bytes) of one scale group.
    int64_t scale_groups;
    const int32_t* constants;  // [scale_groups][constants_stride]: minus the constant of `terms`, per row
    int64_t constants_stride;
    bool shifted;   // some row may have a zero
    bool one_zero;  // all rows have that of the first
};

// The blocks [begin, end) that a strip meets. Those up to next_end come next: this strip, number `part` of
// `parts`, requests its share of them, so that memory works while the cores compute.
struct Span {
    int64_t begin, end;
    int64_t next_end;
    int64_t part, parts;
};

// Up to 16 channels of an image, read at `channel_stride` and written as interleaved bytes per pixel, in
// whole words of 4 channels.
struct Planes {
    const float* source;
    int64_t channel_stride;
    int64_t pixel_stride;
    int64_t channels;
    int64_t pixels;
    const int64_t* offsets;  // of each pixel in the destination
    uint8_t* destination;
};

// One row of output pixels of a depthwise convolution. Weights are [kh * kw][w_stride] with w_stride =
// channels rounded up to 16; activations must be readable for 16 bytes from any channel.
struct Depthwise {
    const uint8_t* x;
    int64_t x_stride;
    int64_t pixels;
    int64_t kh, kw;
    int64_t row_step, column_step;  // bytes between the taps of a window
    const int8_t* w;
    int64_t w_stride;
    int64_t channels;
    const float* w_scale;
    const int32_t* w_sum;
    const float* bias;  // or null
    RowTerms terms;
    float* y;
    uint8_t* bytes;  // likewise
    Quantizer to;
    int64_t y_stride;
};

// One side of a sum: floats, or bytes of the same quantizer, whose offset is that of the bytes.
struct Side {
    const float* x;
    const uint8_t* bytes;
    Quantizer quantizer;
};

struct Sum {
    Side a, b;
    int64_t count;
    float* y;
    uint8_t* bytes;  // where results become bytes
    Quantizer to;
};

// A piece of a gradient that goes through a quantizer: `wide` or `narrow` (bfloat16) holds the gradient to the
// values; dx may be the same memory as `wide`. `sums`: times rint(v) - v inside, and where clipped below and
// above, for v = x / scale; written when `learned`, which also lets v itself decide what is clipped.
struct Gradient {
    const float* wide;
    const uint16_t* narrow;
    const float* x;
    int64_t count;
    Quantizer quantizer;
    bool learned;
    float* dx;
    double* sums;
};

// y = x @ w^T + bias for float x: w = (table[code] - zero) * scale, at 8 bits (code - zero) * scale, with one per output row and scale group
// of `group_units` units (one, or at 3 bits three loads of codes). Rows of x are padded with 0 to whole units.
struct Decoded {
    const float* x;
    int64_t x_stride;
    const float* x_sums;  // [rows][scale_groups], where there are zeros
    const uint8_t* w;
    int64_t block_bytes;
    int64_t columns;
    int64_t scale_groups;
    int64_t group_units;
    const float* table;   // 16 values; tables of fewer are repeated
    const float* scales;  // [blocks][scale_groups][16]
    const float* zeros;   // the same, or null
    const float* bias;    // or null
    float* y;
    int64_t y_stride;
};

struct Kernels {
    float (*absmax)(const float* x, int64_t count);  // infinity where an element is not finite
    // Returns the sum of the bytes read as signed numbers before truncation.
    int32_t (*quantize)(const float* x, int64_t count, const Quantizer& quantizer, uint8_t* out);
    void (*quantize_planes)(const Planes& planes, const Quantizer& quantizer);
    void (*gemm[4])(const Gemm& gemm, const Span& span);     // for 8, 4, 3 and 2 bit weights
    void (*grouped[5])(const Gemm& gemm, const Span& span);  // with a scale per group; the fifth for kSignedEight
    // Rows and blocks from, to; for 8, 4, 3 and 2 bit codes.
    void (*decoded[4])(const Decoded& job, int64_t row, int64_t row_end, int64_t block, int64_t block_end);
    // Values of the blocks from, to, at out[input * stride + 16 * block + lane]; likewise.
    void (*decode[4])(const Decoded& job, int64_t block, int64_t block_end, float* out, int64_t stride);
    void (*depthwise)(const Depthwise& job);
    void (*add)(const Sum& sum);
    void (*centred_codes)(const float* x, int64_t count, const Quantizer& quantizer, float* wide, uint16_t* narrow);
    void (*straight_through)(const Gradient& gradient);
    void (*moments)(const float* y, int64_t rows, int64_t channels, const float* origin, double* sum,
                    double* square);
    int64_t tile_rows;  // what the matrix kernel takes at once
    int64_t tile_blocks;
    int32_t byte_bias;    // what the matrix kernels take off activations for 8-bit weights
    int32_t signed_half;  // what they add to the weights of kSignedEight
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_i8mm_kernels();

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512Vnni = 2, kNeonDotprod = 3, kNeonI8mm = 4 };

bool has_avx2();
bool has_avx512_vnni();
bool has_neon_dotprod();
bool has_neon_i8mm();

// The table of an instruction set; throws std::invalid_argument where this build or this machine lacks it.
const Kernels& kernels(int isa);

}  // namespace bitwright
