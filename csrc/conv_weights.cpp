// Packs weights of convolutions, gives their codes back, and unpacks them to the bytes that kernels read.
#include "conv_weights.h"

#include <cstring>

#include "ops.h"
#include "simd.h"

#if defined(BITWRIGHT_X86)
#define BW_TARGET(features) __attribute__((target(features)))
#endif

namespace bitwright {
namespace {

// Bits of a code that lie together; also the number of parts that they take.
constexpr int64_t plane_bits(int64_t bits) { return bits == 3 ? 2 : bits; }

constexpr uint64_t repeated(uint64_t byte) { return 0x0101010101010101u * byte; }

BW_INLINE uint64_t load_eight(const uint8_t* from) {
    uint64_t value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

template <int BITS>
BW_INLINE void unpack_block(const uint8_t* in, int64_t part_bytes, uint8_t* out) {
    constexpr int kPlane = static_cast<int>(plane_bits(BITS));
    constexpr uint64_t kMask = repeated((1 << kPlane) - 1), kHalf = repeated(1 << (BITS - 1)), kTop = repeated(0x80);
    const uint8_t* third = in + kPlane * part_bytes;
    for (int part = 0; part < 8; ++part, out += part_bytes) {
        const uint8_t* low = in + part % kPlane * part_bytes;
        const int shift = part / kPlane * kPlane;
        for (int64_t i = 0; i < part_bytes; i += 8) {
            uint64_t codes = load_eight(low + i) >> shift & kMask;
            if constexpr (BITS == 3) codes |= (load_eight(third + i) >> part & repeated(1)) << 2;
            codes = ((codes ^ (kTop | kHalf)) - kHalf) ^ kTop;  // extends the sign, no byte borrows from the next
            std::memcpy(out + i, &codes, sizeof(codes));
        }
    }
}

template <int BITS>
BW_INLINE void unpack_all(const uint8_t* in, int64_t block_bytes, int64_t blocks, uint8_t* out) {
    for (int64_t block = 0; block < blocks; ++block) {
        unpack_block<BITS>(in + block * (block_bytes / 8 * BITS), block_bytes / 8, out + block * block_bytes);
    }
}

template <int BITS>
void unpack_portable(const uint8_t* in, int64_t block_bytes, int64_t blocks, uint8_t* out) {
    unpack_all<BITS>(in, block_bytes, blocks, out);
}

#if defined(BITWRIGHT_X86)
template <int BITS>
BW_TARGET("avx2")
void unpack_avx2(const uint8_t* in, int64_t block_bytes, int64_t blocks, uint8_t* out) {
    unpack_all<BITS>(in, block_bytes, blocks, out);
}

template <int BITS>
BW_TARGET("avx512f,avx512bw")
void unpack_avx512(const uint8_t* in, int64_t block_bytes, int64_t blocks, uint8_t* out) {
    unpack_all<BITS>(in, block_bytes, blocks, out);
}
#endif

template <int BITS>
UnpackBlocks unpacker_of(Isa isa) {
#if defined(BITWRIGHT_X86)
    if (isa == Isa::kAvx512Vnni) return unpack_avx512<BITS>;
    if (isa == Isa::kAvx2) return unpack_avx2<BITS>;
#endif
    (void)isa;
    return unpack_portable<BITS>;
}

struct Filters {
    int64_t bits, o, c_per_group, kh, kw, groups;
};

// Calls visit(index of a code, its place in the layout of bytes).
template <class Visit>
void each_code(const Filters& f, const Visit& visit) {
    const bool depthwise = is_depthwise(f.o, f.c_per_group, f.groups);
    const int64_t taps = f.kh * f.kw, steps = ceil_div(f.c_per_group, 4), per_group = f.o / f.groups;
    for (int64_t row = 0; row < f.o; ++row) {
        const int64_t in_group = row % per_group;
        const int64_t block = row / per_group * ceil_div(per_group, kLanes) + in_group / kLanes;
        for (int64_t c = 0; c < f.c_per_group; ++c) {
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t load = (block * taps + tap) * steps + c / 4;
                const int64_t dense = load * kGroupBytes + in_group % kLanes * 4 + c % 4;
                visit((row * f.c_per_group + c) * taps + tap, depthwise ? tap * round_up(f.o, kLanes) + row : dense);
            }
        }
    }
}

// Where the code is whose byte would be number `at`: the byte and the shift of its lower bits, at 3 bits of the third.
struct Place {
    int64_t low, low_shift, third, third_shift;
};

Place place_of(const Filters& f, int64_t at) {
    const int64_t part_bytes = f.kh * f.kw * ceil_div(f.c_per_group, 4) * kGroupBytes / 8;
    const int64_t part = at / part_bytes % 8, plane = plane_bits(f.bits);
    const int64_t first = at / part_bytes / 8 * part_bytes * f.bits + at % part_bytes;
    return {first + part % plane * part_bytes, part / plane * plane, first + plane * part_bytes, part};
}

// Whether a code is a byte of its own.
bool as_bytes(const Filters& f) { return f.bits == 8 || is_depthwise(f.o, f.c_per_group, f.groups); }

}  // namespace

void check_filter_bits(int64_t bits) {
    require(bits == 8 || (bits <= 4 && bits >= 2), "filters are packed with 8, 4, 3 or 2 bits");
}

UnpackBlocks block_unpacker(int isa, int bits) {
    const Isa set = static_cast<Isa>(isa);
    return bits == 4 ? unpacker_of<4>(set) : bits == 3 ? unpacker_of<3>(set) : unpacker_of<2>(set);
}

int64_t conv_layout_bytes(int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw, int64_t groups) {
    check_filter_bits(bits);
    size_product({o, c_per_group, kh, kw, 64});
    require(groups > 0 && o % groups == 0, "outputs do not divide into the groups");
    if (is_depthwise(o, c_per_group, groups)) return kh * kw * round_up(o, kLanes);
    return groups * ceil_div(o / groups, kLanes) * kh * kw * ceil_div(c_per_group, 4) * (kGroupBytes / 8 * bits);
}

void pack_conv(const int8_t* codes, int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw,
               int64_t groups, uint8_t* out) {
    const int64_t total = conv_layout_bytes(bits, o, c_per_group, kh, kw, groups);
    if (total == 0) return;
    require(codes != nullptr && out != nullptr, "null pointer");
    std::memset(out, 0, static_cast<size_t>(total));
    const Filters filters{bits, o, c_per_group, kh, kw, groups};
    const int half = 1 << (bits - 1), mask = (1 << plane_bits(bits)) - 1;
    const bool bytes = as_bytes(filters);
    each_code(filters, [&](int64_t index, int64_t at) {
        const int code = codes[index];
        require(code >= -half && code < half, "a weight code does not fit in its bits");
        if (bytes) {
            out[at] = static_cast<uint8_t>(code);
            return;
        }
        const Place place = place_of(filters, at);
        out[place.low] = static_cast<uint8_t>(out[place.low] | (code & mask) << place.low_shift);
        if (bits != 3) return;
        out[place.third] = static_cast<uint8_t>(out[place.third] | (code >> 2 & 1) << place.third_shift);
    });
}

void unpack_conv(const uint8_t* in, int64_t bits, int64_t o, int64_t c_per_group, int64_t kh, int64_t kw,
                 int64_t groups, int8_t* codes) {
    if (conv_layout_bytes(bits, o, c_per_group, kh, kw, groups) == 0) return;
    require(in != nullptr && codes != nullptr, "null pointer");
    const Filters filters{bits, o, c_per_group, kh, kw, groups};
    const int half = 1 << (bits - 1), mask = (1 << plane_bits(bits)) - 1;
    const bool bytes = as_bytes(filters);
    each_code(filters, [&](int64_t index, int64_t at) {
        if (bytes) {
            codes[index] = static_cast<int8_t>(in[at]);
            return;
        }
        const Place place = place_of(filters, at);
        int code = in[place.low] >> place.low_shift & mask;
        if (bits == 3) code |= (in[place.third] >> place.third_shift & 1) << 2;
        codes[index] = static_cast<int8_t>((code ^ half) - half);
    });
}

}  // namespace bitwright
