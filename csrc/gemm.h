// The matrix kernel, a template over an instruction set and the width of the weights. A tile is ROWS
// activation rows times BLOCKS weight blocks kept in registers over the whole k axis; each weight load serves
// all rows of the tile and each broadcast of 4 activation bytes serves all blocks. Layouts: dispatch.h. Any
// number of rows and of output columns is allowed; activations must be readable up to the end of their last
// group.
#pragma once

#include "dispatch.h"
#include "products.h"
#include "quantize.h"
#include "simd.h"

namespace bitwright {

// Results become bytes only where all rows share their terms.
//
// Terms of one row met with the constants of one block.
template <class S>
struct RowVectors {
    typename S::I shift;
    typename S::F scale;
};

// Column constants of one block. Loads of a block that is cut by the end of the matrix go through a padded
// copy.
template <class S>
struct Columns {
    typename S::F scale;
    typename S::F bias;
    typename S::I sum;
    int64_t count;

    BW_INLINE Columns(const float* w_scale, const int32_t* w_sum, const float* w_bias, int64_t first,
                      int64_t columns) {
        count = columns - first < kLanes ? columns - first : kLanes;
        if (count == kLanes) {
            scale = S::load(w_scale + first);
            sum = w_sum != nullptr ? S::load_int(w_sum + first) : S::set_int(0);
            bias = w_bias != nullptr ? S::load(w_bias + first) : S::set(0.0f);
            return;
        }
        float scales[kLanes] = {};
        float biases[kLanes] = {};
        int32_t sums[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) {
            scales[i] = w_scale[first + i];
            sums[i] = w_sum != nullptr ? w_sum[first + i] : 0;
            biases[i] = w_bias != nullptr ? w_bias[first + i] : 0.0f;
        }
        scale = S::load(scales);
        sum = S::load_int(sums);
        bias = S::load(biases);
    }

    BW_INLINE RowVectors<S> meet(const RowTerms& terms) const {
        return {S::add_int(S::set_int(terms.constant), S::mul_int(S::set_int(terms.zero), sum)),
                S::mul(S::set(terms.scale), scale)};
    }

    // Undo the offsets, scale, add the bias: one rounding per operation.
    BW_INLINE typename S::F value(typename S::I dot, const RowVectors<S>& row, bool has_bias) const {
        const typename S::F scaled = S::mul(S::to_float(S::sub_int(dot, row.shift)), row.scale);
        return has_bias ? S::add(scaled, bias) : scaled;
    }

    BW_INLINE void finish(typename S::I dot, const RowVectors<S>& row, bool has_bias, float* y) const {
        const typename S::F result = value(dot, row, has_bias);
        if (count == kLanes) {
            S::store(y, result);
        } else {
            float lanes[kLanes];
            S::store(lanes, result);
            for (int64_t i = 0; i < count; ++i) y[i] = lanes[i];
        }
    }

    BW_INLINE void finish_bytes(typename S::I dot, const RowVectors<S>& row, bool has_bias, const Quantize<S>& to,
                                uint8_t* bytes) const {
        const typename S::I codes = to.code(value(dot, row, has_bias));
        if (count == kLanes) {
            S::store_bytes(bytes, codes);
        } else {
            uint8_t lanes[kLanes];
            S::store_bytes(lanes, codes);
            for (int64_t i = 0; i < count; ++i) bytes[i] = lanes[i];
        }
    }
};

template <class S, int BITS, int ROWS, int BLOCKS>
void tile(const Gemm& g, int64_t row, int64_t block, Ahead ahead) {
    typename S::I acc[BLOCKS][ROWS];
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[b][r] = S::set_int(0);
    }
    const int64_t stride = g.x_stride;
    const int64_t block_bytes = g.block_bytes;
    const uint8_t* w = g.w + block * block_bytes;
    for (int64_t run = 0; run < g.runs; ++run) {
        RowPointers<ROWS> x(g.x + row * stride + g.run_offsets[run], stride);
        int64_t left = paired_units<S, BITS>(w, block_bytes, x, stride, acc, g.run_groups, ahead);
        for (; left > 0; --left) {
            unit_products<S, BITS, ROWS, BLOCKS>(w, block_bytes, x, stride, acc, ahead);
            x.advance(Unit<BITS>::kInputs);
            w += Unit<BITS>::kBytes;
        }
    }
    exchange_pairs<S>(acc);
    BW_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
        const int64_t first = (block + b) * kLanes;
        const Columns<S> columns(g.w_scale, g.w_sum, g.bias, first, g.columns);
        RowVectors<S> vectors = columns.meet(g.terms[row * g.terms_stride]);
        if (g.bytes != nullptr) {
            const Quantize<S> to(g.to);
            BW_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                columns.finish_bytes(acc[b][r], vectors, g.bias != nullptr, to, g.bytes + (row + r) * g.y_stride + first);
            }
            continue;
        }
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            if (r > 0 && g.terms_stride != 0) vectors = columns.meet(g.terms[row + r]);
            columns.finish(acc[b][r], vectors, g.bias != nullptr, g.y + (row + r) * g.y_stride + first);
        }
    }
}

// The kind of tile for weights with one scale per output; grouped.h has another.
struct PerOutput {
    template <class S, int BITS, int ROWS, int BLOCKS>
    static BW_INLINE void run(const Gemm& g, int64_t row, int64_t block, Ahead ahead) {
        tile<S, BITS, ROWS, BLOCKS>(g, row, block, ahead);
    }
};

// The tile for a run-time number of rows in 1..ROWS.
template <class S, class TILE, int BITS, int BLOCKS, int ROWS>
BW_INLINE void tile_of(const Gemm& g, int64_t row, int64_t rows, int64_t block, Ahead ahead) {
    if (rows == ROWS) {
        TILE::template run<S, BITS, ROWS, BLOCKS>(g, row, block, ahead);
    } else if constexpr (ROWS > 1) {
        tile_of<S, TILE, BITS, BLOCKS, ROWS - 1>(g, row, rows, block, ahead);
    }
}

// All rows of a strip against a span of blocks. Rows are dealt evenly to the tiles: 14 rows are 7 + 7, not
// 12 + 2.
template <class S, class TILE, int BITS>
void gemm_strip(const Gemm& g, const Span& span) {
    const Ahead nothing{g.w, 0};
    const int64_t tiles = (g.rows + S::kTileRows - 1) / S::kTileRows;
    const int64_t shares = tiles * span.parts;  // of the weights that come next
    const int64_t tile_bytes = S::kTileBlocks * g.block_bytes;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = g.rows * t / tiles;
        const int64_t rows = g.rows * (t + 1) / tiles - row;
        int64_t block = span.begin;
        // Few rows have few accumulators: more blocks at a time hide the latency of the sums.
        if (rows <= S::kNarrowRows) {
            for (; block + S::kNarrowBlocks <= span.end; block += S::kNarrowBlocks) {
                tile_of<S, TILE, BITS, S::kNarrowBlocks, S::kNarrowRows>(g, row, rows, block, nothing);
            }
        }
        for (; block + S::kTileBlocks <= span.end; block += S::kTileBlocks) {
            const int64_t next = block + (span.end - span.begin);
            Ahead ahead = nothing;
            if (next + S::kTileBlocks <= span.next_end) {
                const int64_t begin = tile_bytes * (span.part * tiles + t) / shares;
                ahead = {g.w + next * g.block_bytes + begin, S::kTileBlocks * kGroupBytes / shares + 1};
            }
            tile_of<S, TILE, BITS, S::kTileBlocks, S::kTileRows>(g, row, rows, block, ahead);
        }
        for (; block < span.end; ++block) tile_of<S, TILE, BITS, 1, S::kTileRows>(g, row, rows, block, nothing);
    }
}

// Depthwise: 16 channels are the lanes. Several pixels share each load of the weights. Not inlined, with the
// taps in two loops: otherwise GCC 12 keeps the first zeros alive and copies every accumulator in every
// round.
template <class S, int PIXELS>
BW_NOINLINE void depthwise_pixels(const Depthwise& d, int64_t pixel, int64_t channel,
                                  const Columns<S>& columns, const RowVectors<S>& vectors, const Quantize<S>& to) {
    typename S::I acc[PIXELS];
    BW_UNROLL
    for (int p = 0; p < PIXELS; ++p) acc[p] = S::set_int(0);
    const int64_t stride = d.x_stride;
    const int8_t* w = d.w + channel;
    for (int64_t i = 0; i < d.kh; ++i) {
        const uint8_t* x = d.x + pixel * stride + channel + i * d.row_step;
        for (int64_t left = d.kw; left > 0; --left) {
            const typename S::I weight = S::load_s8(w);
            BW_UNROLL
            for (int p = 0; p < PIXELS; ++p) {
                acc[p] = S::mul_add(acc[p], S::load_u8(x + p * stride), weight);
            }
            x += d.column_step;
            w += d.w_stride;
        }
    }
    BW_UNROLL
    for (int p = 0; p < PIXELS; ++p) {
        const int64_t at = (pixel + p) * d.y_stride + channel;
        if (d.bytes == nullptr) {
            columns.finish(acc[p], vectors, d.bias != nullptr, d.y + at);
        } else {
            columns.finish_bytes(acc[p], vectors, d.bias != nullptr, to, d.bytes + at);
        }
    }
}

template <class S>
void depthwise_row(const Depthwise& d) {
    const Quantize<S> to(d.to);
    for (int64_t channel = 0; channel < d.channels; channel += kLanes) {
        const Columns<S> columns(d.w_scale, d.w_sum, d.bias, channel, d.channels);
        const RowVectors<S> vectors = columns.meet(d.terms);
        int64_t pixel = 0;
        for (; pixel + S::kPixels <= d.pixels; pixel += S::kPixels) {
            depthwise_pixels<S, S::kPixels>(d, pixel, channel, columns, vectors, to);
        }
        for (; pixel < d.pixels; ++pixel) depthwise_pixels<S, 1>(d, pixel, channel, columns, vectors, to);
    }
}

}  // namespace bitwright
