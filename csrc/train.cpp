// What a training step needs beside the shipped kernels: codes of activations for the backward products, codes
// and sums of weight rows, the straight-through gradient with the sums that a learned range needs, and the
// moments of a channels-last output. Work is cut into chunks of a fixed size whose partial sums are added in
// order, so no result depends on the number of threads.
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace bitwright {
namespace {

constexpr int64_t kChunk = 8192;
constexpr int64_t kRowsPerChunk = 512;

template <class F>
void for_chunks(int64_t chunks, int threads, F&& fn) {
    parallel_for(chunks < 4 ? 1 : threads, [&](int index, int team) {
        const Range mine = share(chunks, 1, index, team);
        for (int64_t chunk = mine.begin; chunk < mine.end; ++chunk) fn(chunk);
    });
}

int64_t length(int64_t total, int64_t begin, int64_t size) {
    return total - begin < size ? total - begin : size;
}

}  // namespace

void centred_codes(int isa, const Addend& x, int64_t count, float* wide, uint16_t* narrow, int threads) {
    require(count >= 0 && threads >= 1, "negative size");
    check_range(x.range);
    check_zero_point(x.zero, x.range, 1, 1);
    const Kernels& kernels = bitwright::kernels(isa);
    const Quantizer quantizer = make_quantizer(x.scale, x.zero, x.range, 0);
    for_chunks(ceil_div(count, kChunk), threads, [&](int64_t chunk) {
        const int64_t begin = chunk * kChunk;
        kernels.centred_codes(x.x + begin, length(count, begin, kChunk), quantizer,
                              wide == nullptr ? nullptr : wide + begin, narrow == nullptr ? nullptr : narrow + begin);
    });
}

void weight_codes(int isa, const float* w, int64_t rows, int64_t columns, const float* scale, int64_t scale_stride,
                  const Range8& range, int8_t* codes, int32_t* sums, int threads) {
    size_product({rows, columns});
    require(threads >= 1 && range.qmin >= -128 && range.qmax <= 127 && range.qmin < range.qmax,
            "weight codes must lie in [-128, 127]");
    const Kernels& kernels = bitwright::kernels(isa);
    for_chunks(rows, threads, [&](int64_t row) {
        const Quantizer quantizer = make_quantizer(scale[row * scale_stride], 0.0f, range, 0);
        sums[row] = kernels.quantize(w + row * columns, columns, quantizer,
                                     reinterpret_cast<uint8_t*>(codes + row * columns));
    });
}

bool has_nan(const float* x, int64_t count, int threads) {
    require(count >= 0 && threads >= 1, "negative size");
    const int64_t chunks = ceil_div(count, kChunk);
    std::vector<int32_t> found(static_cast<size_t>(chunks));
    for_chunks(chunks, threads, [&](int64_t chunk) {
        const float* part = x + chunk * kChunk;
        const int64_t length_here = length(count, chunk * kChunk, kChunk);
        int32_t bad = 0;
        for (int64_t i = 0; i < length_here; ++i) bad |= part[i] != part[i] ? 1 : 0;
        found[static_cast<size_t>(chunk)] = bad;
    });
    for (int32_t bad : found) {
        if (bad != 0) return true;
    }
    return false;
}

void straight_through(int isa, const StraightThrough& args) {
    size_product({args.rows, args.columns});
    require(args.threads >= 1, "negative size");
    check_range(args.range);
    check_zero_point(args.zero, args.range, 1, 1);
    const Kernels& kernels = bitwright::kernels(isa);
    const int64_t per_row = ceil_div(args.columns, kChunk);
    std::vector<double> partial(static_cast<size_t>(args.rows * per_row * 3));
    for_chunks(args.rows * per_row, args.threads, [&](int64_t chunk) {
        const int64_t row = chunk / per_row;
        const int64_t begin = chunk % per_row * kChunk;
        const int64_t at = row * args.columns + begin;
        const Quantizer quantizer =
            make_quantizer(args.scale[row * args.scale_stride], args.zero, args.range, 0);
        kernels.straight_through({args.wide == nullptr ? nullptr : args.wide + at,
                                  args.narrow == nullptr ? nullptr : args.narrow + at, args.x + at,
                                  length(args.columns, begin, kChunk), quantizer, args.learned, args.dx + at,
                                  partial.data() + chunk * 3});
    });
    for (int64_t row = 0; row < args.rows; ++row) {
        double sums[3] = {};
        for (int64_t chunk = row * per_row; chunk < (row + 1) * per_row; ++chunk) {
            for (int j = 0; j < 3; ++j) sums[j] += partial[static_cast<size_t>(chunk * 3 + j)];
        }
        for (int j = 0; j < 3; ++j) args.sums[j * args.rows + row] = static_cast<float>(sums[j]);
    }
}

void moments(int isa, const float* y, int64_t rows, int64_t channels, const float* origin, double* sum,
             double* square, int threads) {
    size_product({rows, channels});
    require(threads >= 1, "negative size");
    const Kernels& kernels = bitwright::kernels(isa);
    const int64_t chunks = ceil_div(rows, kRowsPerChunk);
    std::vector<double> partial(static_cast<size_t>(chunks * channels * 2));
    for_chunks(chunks, threads, [&](int64_t chunk) {
        double* mine = partial.data() + chunk * channels * 2;
        const int64_t begin = chunk * kRowsPerChunk;
        kernels.moments(y + begin * channels, length(rows, begin, kRowsPerChunk), channels, origin, mine,
                        mine + channels);
    });
    for (int64_t c = 0; c < channels; ++c) {
        sum[c] = square[c] = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            sum[c] += partial[static_cast<size_t>(chunk * channels * 2 + c)];
            square[c] += partial[static_cast<size_t>((chunk * 2 + 1) * channels + c)];
        }
    }
}

}  // namespace bitwright
