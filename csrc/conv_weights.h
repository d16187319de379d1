// Weights of convolutions: what is held, and how it becomes the 8-bit blocks that the matrix kernels read.
//
// Packed weights
//   dense: per group the 8-bit linear layout of dispatch.h, k in the order (kh, kw, c) with c padded to 4. At 4, 3 and
//   2 bits each block of bytes is cut into 8 equal parts, and their codes (two's complement) share bytes:
//     4 bit: 4 parts of bytes. Part p has the low nibbles of part p, and as high nibbles those of part p + 4.
//     2 bit: 2 parts of bytes. Bits 2q..2q+1 of part p are those of part p + 2q.
//     3 bit: the lower two bits as at 2 bits, then one more part: bit p of its bytes is the third bit of part p.
//   So unpacking is a shift and a mask of whole vectors, and needs no padding.
//   depthwise (one channel per group, o == groups): [kh * kw][channels rounded up to 16] signed bytes at every width.
#pragma once

#include <cstdint>

namespace bitwright {

inline bool is_depthwise(int64_t o, int64_t c_per_group, int64_t groups) { return c_per_group == 1 && o == groups; }

void check_filter_bits(int64_t bits);

// Blocks that take `block_bytes` each as bytes.
using UnpackBlocks = void (*)(const uint8_t* in, int64_t block_bytes, int64_t blocks, uint8_t* out);

// For 4, 3 or 2 bits on an instruction set that this machine has.
UnpackBlocks block_unpacker(int isa, int bits);

}  // namespace bitwright
