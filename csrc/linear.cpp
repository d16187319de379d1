// y = quantize(x) @ w^T, for 8-, 4-, 3- and 2-bit weights with a scale per output, or per group of inputs: packs the
// weights, quantizes the rows of x to bytes and runs the matrix kernel. Any m, k and n. Long inputs are cut into chunks of rows so that the quantized
// copy stays near the cores and the working memory stays bounded. Layouts: dispatch.h.
#include <cfloat>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "strips.h"

namespace bitwright {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;
constexpr int64_t kStripRows = 96;            // rows that are dealt to a thread at once
constexpr int64_t kSerialQuantize = 1 << 14;  // inputs that one thread quantizes before another has woken up

// Inputs and bytes of the smallest run of packed codes that can be read by itself.
int64_t unit_inputs(int64_t bits) { return bits == 3 ? 32 : 4 * (8 / bits); }
int64_t unit_bytes(int64_t bits) { return bits == 3 ? 3 * kGroupBytes : kGroupBytes; }

int64_t scale_groups(const Linear& a) { return a.group_size == 0 ? 0 : a.k / a.group_size; }

void check_matrix(int64_t bits, int64_t n, int64_t k) {
    require(bits == 8 || (bits <= 4 && bits >= 2), "weights are packed with 8, 4, 3 or 2 bits");
    size_product({n, k});
}

void check(const Linear& a) {
    check_matrix(a.bits, a.n, a.k);
    size_product({a.m, a.k});
    size_product({a.m, a.n});
    check_range(a.range);
    require(a.threads >= 1, "threads must be positive");
    require(a.group_size >= 0 && (a.group_size == 0 || a.k % a.group_size == 0), "groups must divide the inputs");
    require(a.group_size % unit_inputs(a.bits) == 0, "groups must hold whole units of codes");
    require(a.scale_stride == 0 || a.scale_stride == 1, "scale stride must be 0 or 1");
    require(a.dynamic || a.scale != nullptr || a.m == 0, "a static quantizer needs a scale");
    require(!a.dynamic || (a.zero == nullptr && a.range.qmax > 0), "a dynamic quantizer is symmetric");
    require(a.m == 0 || a.n == 0 || (a.y != nullptr && a.w_scale != nullptr), "null pointer");
    require(a.m == 0 || a.n == 0 || a.k == 0 || (a.x != nullptr && a.w != nullptr), "null pointer");
}

// Whether both operands are signed bytes, see dispatch.h.
bool signed_eight(const Linear& a) { return a.bits == 8 && a.group_size > 0 && a.range.qmax <= 127; }

// The byte of code 0 relative to the code, see dispatch.h.
int32_t byte_shift(const Linear& a) {
    if (a.bits == 8 && !signed_eight(a)) return a.range.qmin < 0 ? 128 : 0;
    return a.range.qmax > 127 ? -128 : 0;
}

// What the kernel takes off each byte, and adds to each code of the weights.
int32_t bias_of(const Linear& a, const Kernels& kernels) {
    return a.bits == 8 && !signed_eight(a) ? kernels.byte_bias : 0;
}
uint32_t half_of(const Linear& a, const Kernels& kernels) {
    if (a.bits < 8) return 1u << (a.bits - 1);
    return signed_eight(a) ? static_cast<uint32_t>(kernels.signed_half) : 0;
}

// Which kernel of `Kernels`.
int width_index(const Linear& a) { return a.bits < 8 ? 5 - a.bits : signed_eight(a) ? 4 : 0; }

Quantizer row_quantizer(const Linear& a, const Kernels& kernels, int64_t row) {
    float scale;
    float zero = 0.0f;
    if (a.dynamic) {
        scale = kernels.absmax(a.x + row * a.k, a.k) / static_cast<float>(a.range.qmax);
        scale = scale > FLT_EPSILON ? scale : FLT_EPSILON;
    } else {
        scale = a.scale[row * a.scale_stride];
        if (a.zero != nullptr) zero = a.zero[row * a.scale_stride];
    }
    return make_quantizer(scale, zero, a.range, byte_shift(a));
}

// All checks that depend on values come before threads start: nothing may throw inside a team.
void check_rows(const Linear& a) {
    const int64_t limit = int64_t{1} << (a.bits - 1);
    const int64_t rows = a.dynamic || a.scale_stride == 0 ? 1 : a.m;
    for (int64_t row = 0; row < rows; ++row) {
        const float zero = a.zero != nullptr ? a.zero[row] : 0.0f;
        check_zero_point(zero, a.range, a.group_size == 0 ? a.k : a.group_size, limit);
    }
}

// The quantized rows of a chunk.
struct Rows {
    uint8_t* bytes;
    int64_t stride;
    RowTerms* terms;
    int32_t* constants;  // [scale_groups][constants_stride]
    int64_t constants_stride;
};

void quantize_row(const Linear& a, const Kernels& kernels, const Rows& rows, int64_t first, int64_t i) {
    const Quantizer quantizer = row_quantizer(a, kernels, first + i);
    uint8_t* bytes = rows.bytes + i * rows.stride;
    const float* x = a.x + (first + i) * a.k;
    const uint32_t half = half_of(a, kernels);
    std::memset(bytes + a.k, 0, static_cast<size_t>(rows.stride - a.k));
    rows.terms[i] = {quantizer.scale, quantizer.offset - bias_of(a, kernels), 0};
    for (int64_t group = 0; group < scale_groups(a); ++group) {
        const int64_t begin = group * a.group_size;
        const int32_t sum = kernels.quantize(x + begin, a.group_size, quantizer, bytes + begin);
        rows.constants[group * rows.constants_stride + i] = static_cast<int32_t>(0u - half * static_cast<uint32_t>(sum));
    }
    if (a.group_size > 0) return;
    const int32_t sum = kernels.quantize(x, a.k, quantizer, bytes);
    rows.terms[i].constant = static_cast<int32_t>(half * static_cast<uint32_t>(sum));
}

// A row with NaN or an infinity has no range to take a scale from.
void check_scales(const Rows& rows, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (rows.terms[i].scale <= FLT_MAX) continue;
        throw std::overflow_error("row " + std::to_string(first + i) + " of x has no dynamic scale: it holds NaN or an "
                                  "infinity; clean the data first");
    }
}

// `count` rows from row `begin` of the chunk that starts at row `first` of x.
Gemm strip(const Linear& a, const Rows& rows, int64_t first, int64_t begin, int64_t count,
           const int64_t* run_offset) {
    Gemm gemm{};
    gemm.x = rows.bytes + begin * rows.stride;
    gemm.x_stride = rows.stride;
    gemm.rows = count;
    gemm.run_offsets = run_offset;
    gemm.runs = 1;
    const int64_t units = ceil_div(a.k, unit_inputs(a.bits));
    gemm.run_groups = a.group_size == 0 ? units : a.group_size / unit_inputs(a.bits);
    gemm.w = a.w;
    gemm.block_bytes = units * unit_bytes(a.bits);
    gemm.columns = a.n;
    gemm.w_scale = a.w_scale;
    gemm.w_sum = a.w_sum;
    gemm.bias = a.bias;
    gemm.terms = rows.terms + begin;
    gemm.terms_stride = 1;
    gemm.y = a.y + (first + begin) * a.n;
    gemm.y_stride = a.n;
    gemm.scale_groups = scale_groups(a);
    gemm.constants = rows.constants + begin;
    gemm.constants_stride = rows.constants_stride;
    gemm.one_zero = a.dynamic || a.scale_stride == 0;
    gemm.shifted = a.w_sum != nullptr && (!gemm.one_zero || gemm.terms->zero != 0);
    return gemm;
}

void run_chunk(const Linear& a, const Kernels& kernels, const Rows& rows, int64_t first, int64_t count) {
    const double work = static_cast<double>(count) * static_cast<double>(a.n * a.k);
    const int threads = work <= kSerialWork ? 1 : a.threads;
    parallel_for(count * a.k <= kSerialQuantize ? 1 : threads, [&](int index, int team) {
        const Range mine = share(count, 1, index, team);
        for (int64_t i = mine.begin; i < mine.end; ++i) quantize_row(a, kernels, rows, first, i);
    });
    if (a.dynamic) check_scales(rows, first, count);
    const int64_t run_offset = 0;
    const auto strip_at = [&](int64_t i) {
        const int64_t begin = i * kStripRows;
        return strip(a, rows, first, begin, std::min(kStripRows, count - begin), &run_offset);
    };
    const auto run = a.group_size > 0 ? kernels.grouped[width_index(a)] : kernels.gemm[width_index(a)];
    const Work all{ceil_div(count, kStripRows), ceil_div(a.n, kLanes), strip_at(0).block_bytes, run};
    const bool by_blocks = split_by_blocks(all, kernels, threads, count * a.k);
    parallel_for(threads,
                 [&](int index, int team) { run_strips(kernels, all, by_blocks, strip_at, index, team); });
}

// Unsigned codes of 3 bits: two times four steps of their lower 2 bits, then the third bits. Padding is code -4:
// its products are never stored.
void pack_three(const int8_t* codes, int64_t n, int64_t k, uint8_t* out) {
    const int64_t block_bytes = ceil_div(k, unit_inputs(3)) * unit_bytes(3);
    std::memset(out, 0, static_cast<size_t>(ceil_div(n, kLanes) * block_bytes));
    for (int64_t row = 0; row < n; ++row) {
        uint8_t* lane = out + row / kLanes * block_bytes + row % kLanes * 4;
        for (int64_t i = 0; i < k; ++i) {
            const int code = codes[row * k + i] + 4;
            require(code >= 0 && code < 8, "a weight code does not fit in its bits");
            uint8_t* unit = lane + i / unit_inputs(3) * unit_bytes(3) + i % 4;
            const int64_t step = i % unit_inputs(3) / 4;
            uint8_t& low = unit[step / 4 * kGroupBytes];
            low = static_cast<uint8_t>(low | (code & 3) << (2 * (step % 4)));
            uint8_t& third = unit[2 * kGroupBytes];
            third = static_cast<uint8_t>(third | (code >> 2) << step);
        }
    }
}

}  // namespace

int64_t linear_layout_bytes(int64_t bits, int64_t n, int64_t k) {
    check_matrix(bits, n, k);
    return ceil_div(n, kLanes) * ceil_div(k, unit_inputs(bits)) * unit_bytes(bits);
}

void pack_linear(const int8_t* codes, int64_t bits, int64_t n, int64_t k, uint8_t* out) {
    const int64_t total = linear_layout_bytes(bits, n, k);
    if (total == 0) return;
    require(codes != nullptr && out != nullptr, "null pointer");
    if (bits == 3) return pack_three(codes, n, k, out);
    const int64_t groups = ceil_div(k, unit_inputs(bits));
    const int half = 1 << (bits - 1);
    const int offset = bits == 8 ? 0 : half;
    uint8_t fill = 0;  // the code 0 in every field of a byte
    for (int64_t shift = 0; shift < 8; shift += bits) fill = static_cast<uint8_t>(fill | offset << shift);
    std::memset(out, fill, static_cast<size_t>(total));
    const int mask = (1 << bits) - 1;
    for (int64_t row = 0; row < n; ++row) {
        uint8_t* block = out + row / kLanes * groups * kGroupBytes + row % kLanes * 4;
        if (bits == 8) {  // whole steps are copied: training packs its weights in every forward
            for (int64_t i = 0; i < k; i += 4) {
                const size_t bytes = static_cast<size_t>(std::min<int64_t>(4, k - i));
                std::memcpy(block + i / 4 * kGroupBytes, codes + row * k + i, bytes);
            }
            continue;
        }
        for (int64_t i = 0; i < k; ++i) {
            const int code = codes[row * k + i];
            require(code >= -half && code < half, "a weight code does not fit in its bits");
            const int64_t step = i / 4 % (8 / bits);
            uint8_t& byte = block[i / unit_inputs(bits) * kGroupBytes + i % 4];
            const int cleared = byte & ~(mask << (step * bits));
            byte = static_cast<uint8_t>(cleared | ((code + offset) & mask) << (step * bits));
        }
    }
}

void linear(const Linear& a) {
    check(a);
    const Kernels& kernels = bitwright::kernels(a.isa);
    if (a.m == 0 || a.n == 0) return;
    const bool centred = a.zero == nullptr && byte_shift(a) == bias_of(a, kernels);
    require(a.w_sum != nullptr || centred, "activations with a zero point or an offset need the sums of the weights");
    check_rows(a);
    const int64_t width = round_up(a.k, unit_inputs(a.bits));
    // One cache line more than needed: rows at a power of two would share one set of the L1 cache.
    const int64_t stride = round_up(width, 64) + 64;
    const int64_t fitting = round_up(kChunkBytes / stride, kStripRows);
    const int64_t chunk = std::min(a.m, std::max(kStripRows, fitting));
    const int64_t constants = chunk * scale_groups(a);
    Scratch scratch(Scratch::bytes<uint8_t>(chunk * stride) + Scratch::bytes<RowTerms>(chunk) +
                    Scratch::bytes<int32_t>(constants));
    const Rows rows{scratch.take<uint8_t>(chunk * stride), stride, scratch.take<RowTerms>(chunk),
                    scratch.take<int32_t>(constants), chunk};
    for (int64_t first = 0; first < a.m; first += chunk) {
        run_chunk(a, kernels, rows, first, std::min(chunk, a.m - first));
    }
}

}  // namespace bitwright
