// The matrix kernel for float activations and weights that are decoded by a table of 16 values, a template
// over an instruction set and the width of the codes. A tile is ROWS rows of activations times BLOCKS blocks
// of weights. One lane of a 64-byte unit holds the codes of one output row, so a shift brings the code of an
// input to the low bits of every lane, where the table is indexed by them alone: no masks. Codes of 8 bits are
// numbers and need no table. Layouts: dispatch.h.
//
// A single row is limited by the instructions spent per weight, so its sums are scaled once per scale group;
// several rows share each decoded weight, which is scaled at once and then equals the stored value exactly.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace bitwright {

template <class S, int ROWS, int BLOCKS>
struct DecodedTile {
    using F = typename S::F;
    const Decoded& job;
    const typename S::Table table;
    const float* x[ROWS];
    F total[BLOCKS][ROWS];
    F part[BLOCKS][ROWS];  // of the current scale group; unused for several rows
    F scale[BLOCKS];
    F zero[BLOCKS];

    BW_INLINE DecodedTile(const Decoded& d, int64_t row) : job(d), table(S::table(d.table)) {
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) x[r] = d.x + (row + r) * d.x_stride;
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            BW_UNROLL
            for (int r = 0; r < ROWS; ++r) total[b][r] = S::set(0.0f);
        }
    }

    BW_INLINE void begin_group(int64_t block, int64_t group) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            const int64_t at = ((block + b) * job.scale_groups + group) * kLanes;
            scale[b] = S::load(job.scales + at);
            zero[b] = job.zeros != nullptr ? S::load(job.zeros + at) : S::set(0.0f);
            if constexpr (ROWS == 1) part[b][0] = S::set(0.0f);
        }
    }

    // Input k of every lane, before zero and scale.
    BW_INLINE void input(F (&values)[BLOCKS], int k) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            F w = values[b];
            if constexpr (ROWS == 1) {
                part[b][0] = S::fma(w, S::set(x[0][k]), part[b][0]);
            } else {
                if (job.zeros != nullptr) w = S::sub(w, zero[b]);
                w = S::mul(w, scale[b]);
                BW_UNROLL
                for (int r = 0; r < ROWS; ++r) total[b][r] = S::fma(w, S::set(x[r][k]), total[b][r]);
            }
        }
    }

    BW_INLINE void end_group(int64_t row, int64_t group) {
        if constexpr (ROWS == 1) {
            const F sum = S::set(job.zeros != nullptr ? job.x_sums[row * job.scale_groups + group] : 0.0f);
            BW_UNROLL
            for (int b = 0; b < BLOCKS; ++b) {
                if (job.zeros != nullptr) part[b][0] = S::sub(part[b][0], S::mul(zero[b], sum));
                total[b][0] = S::fma(part[b][0], scale[b], total[b][0]);
            }
        }
    }

    BW_INLINE void advance(int64_t inputs) {
        BW_UNROLL
        for (int r = 0; r < ROWS; ++r) x[r] += inputs;
    }

    BW_INLINE void finish(int64_t row, int64_t block) {
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            const int64_t first = (block + b) * kLanes;
            const int64_t count = job.columns - first < kLanes ? job.columns - first : kLanes;
            BW_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                float lanes[kLanes];
                S::store(lanes, total[b][r]);
                float* y = job.y + (row + r) * job.y_stride + first;
                for (int64_t i = 0; i < count; ++i) {
                    y[i] = job.bias != nullptr ? lanes[i] + job.bias[first + i] : lanes[i];
                }
            }
        }
    }
};

// Inputs of one load of codes, and the bits of one that lie in it.
template <int BITS>
struct Load {
    static constexpr int kWidth = BITS == 3 ? 2 : BITS;
    static constexpr int kInputs = 32 / kWidth;
};

// The value of input K of a load. `high` has the third bit of 3-bit codes.
template <class S, int BITS, int K>
BW_INLINE typename S::F decoded_value(const typename S::Table& table, typename S::I low, typename S::I high) {
    if constexpr (BITS == 8) {
        return S::to_float(S::template signed_byte<K>(low));
    } else {
        const typename S::I moved = S::template shift_right<8 * (K % 4) + Load<BITS>::kWidth * (K / 4)>(low);
        if constexpr (BITS == 3) return S::template look_up<BITS>(table, S::template low_two<K>(moved, high));
        return S::template look_up<BITS>(table, moved);
    }
}

// Input K of a load and those after it, given to a tile or panel.
template <class S, int BITS, int K, int BLOCKS, class TILE>
BW_INLINE void decode_load(const typename S::I (&low)[BLOCKS], const typename S::I (&high)[BLOCKS], TILE& tile) {
    if constexpr (K < Load<BITS>::kInputs) {
        typename S::F values[BLOCKS];
        BW_UNROLL
        for (int b = 0; b < BLOCKS; ++b) values[b] = decoded_value<S, BITS, K>(tile.table, low[b], high[b]);
        tile.input(values, K);
        decode_load<S, BITS, K + 1>(low, high, tile);
    }
}

template <class S, int BITS, int ROWS, int BLOCKS>
void decoded_tile(const Decoded& d, int64_t row, int64_t block) {
    // A unit is one load of codes. At 3 bits two loads of the lower bits are followed by one of the upper bits.
    constexpr int kLoads = BITS == 3 ? 2 : 1;
    constexpr int64_t kBytes = BITS == 3 ? 3 * kGroupBytes : kGroupBytes;
    DecodedTile<S, ROWS, BLOCKS> tile(d, row);
    const uint8_t* w = d.w + block * d.block_bytes;
    for (int64_t group = 0; group < d.scale_groups; ++group) {
        tile.begin_group(block, group);
        for (int64_t left = d.group_units; left > 0; --left) {
            typename S::I low[BLOCKS], high[BLOCKS];
            BW_UNROLL
            for (int load = 0; load < kLoads; ++load) {
                BW_UNROLL
                for (int b = 0; b < BLOCKS; ++b) {
                    const uint8_t* at = w + b * d.block_bytes;
                    low[b] = S::load_codes(at + load * kGroupBytes);
                    high[b] = BITS == 3 ? S::load_codes(at + 2 * kGroupBytes) : low[b];
                    if (BITS == 3 && load == 1) high[b] = S::template shift_right<16>(high[b]);
                    if (ROWS == 1) BW_PREFETCH(at + load * kGroupBytes + kAheadBytes);
                }
                decode_load<S, BITS, 0>(low, high, tile);
                tile.advance(Load<BITS>::kInputs);
            }
            w += kBytes;
        }
        tile.end_group(row, group);
    }
    tile.finish(row, block);
}

// Whether the table counts up by 1, as that of an integer format does: an instruction set may then convert codes of 4
// bits and add the first value in place of looking them up (S::kConsecutive, S::Consecutive), with the same values.
static BW_INLINE bool consecutive(const float* table) {
    for (int i = 1; i < 16; ++i) {
        if (table[i] != table[0] + static_cast<float>(i)) return false;
    }
    return true;
}

// Values of one block for the matrix product of another library: [inputs][16] at a distance of `stride`.
template <class S>
struct DecodedPanel {
    const typename S::Table table;
    float* out;
    const int64_t stride;
    typename S::F scale, zero;

    BW_INLINE void input(typename S::F (&values)[1], int k) {
        S::store(out + k * stride, S::mul(S::sub(values[0], zero), scale));
    }
};

template <class S, int BITS>
void decode_panel(const Decoded& d, int64_t begin, int64_t end, float* out, int64_t stride) {
    if constexpr (BITS == 4 && S::kConsecutive) {
        if (consecutive(d.table)) return decode_panel<typename S::Consecutive, BITS>(d, begin, end, out, stride);
    }
    constexpr int kLoads = BITS == 3 ? 2 : 1;
    constexpr int64_t kBytes = BITS == 3 ? 3 * kGroupBytes : kGroupBytes;
    for (int64_t block = begin; block < end; ++block) {
        DecodedPanel<S> panel{S::table(d.table), out + block * kLanes, stride, S::set(0.0f), S::set(0.0f)};
        const uint8_t* w = d.w + block * d.block_bytes;
        for (int64_t unit = 0; unit < d.scale_groups * d.group_units; ++unit, w += kBytes) {
            if (unit % d.group_units == 0) {
                const int64_t at = (block * d.scale_groups + unit / d.group_units) * kLanes;
                panel.scale = S::load(d.scales + at);
                if (d.zeros != nullptr) panel.zero = S::load(d.zeros + at);
            }
            BW_UNROLL
            for (int load = 0; load < kLoads; ++load) {
                const typename S::I low[1] = {S::load_codes(w + load * kGroupBytes)};
                typename S::I high[1] = {BITS == 3 ? S::load_codes(w + 2 * kGroupBytes) : low[0]};
                if (BITS == 3 && load == 1) high[0] = S::template shift_right<16>(high[0]);
                decode_load<S, BITS, 0>(low, high, panel);
                panel.out += Load<BITS>::kInputs * stride;
            }
        }
    }
}

template <class S, int BITS, int BLOCKS, int ROWS>
BW_INLINE void decoded_tile_of(const Decoded& d, int64_t row, int64_t rows, int64_t block) {
    if (rows == ROWS) {
        decoded_tile<S, BITS, ROWS, BLOCKS>(d, row, block);
    } else if constexpr (ROWS > 1) {
        decoded_tile_of<S, BITS, BLOCKS, ROWS - 1>(d, row, rows, block);
    }
}

// Rows [row_begin, row_end) against blocks [begin, end).
template <class S, int BITS>
void decoded_run(const Decoded& d, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    if constexpr (BITS == 4 && S::kConsecutive) {
        if (consecutive(d.table)) return decoded_run<typename S::Consecutive, BITS>(d, row_begin, row_end, begin, end);
    }
    const int64_t count = row_end - row_begin;
    const int64_t tiles = (count + S::kDecodedRows - 1) / S::kDecodedRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = row_begin + count * t / tiles;
        const int64_t rows = row_begin + count * (t + 1) / tiles - row;
        int64_t block = begin;
        if (rows == 1) {
            for (; block + S::kSingleBlocks <= end; block += S::kSingleBlocks) {
                decoded_tile<S, BITS, 1, S::kSingleBlocks>(d, row, block);
            }
        }
        for (; block < end; ++block) decoded_tile_of<S, BITS, 1, S::kDecodedRows>(d, row, rows, block);
    }
}

}  // namespace bitwright
