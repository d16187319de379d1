// Builds the table of one instruction set from the templates. Included once by each isa_*.cpp, after its
// struct of primitives.
#pragma once

#include "decoded.h"
#include "dispatch.h"
#include "gemm.h"
#include "grouped.h"
#include "quantize.h"
#include "train.h"

namespace bitwright {

template <class S>
const Kernels* table() {
    static const Kernels kernels = {
        absmax_run<S>,      quantize_run<S>,
        quantize_planes<S>, {gemm_strip<S, PerOutput, 8>, gemm_strip<S, PerOutput, 4>, gemm_strip<S, PerOutput, 3>, gemm_strip<S, PerOutput, 2>},
        {gemm_strip<S, Grouped, 8>, gemm_strip<S, Grouped, 4>, gemm_strip<S, Grouped, 3>, gemm_strip<S, Grouped, 2>,
         gemm_strip<S, Grouped, kSignedEight>},
        {decoded_run<S, 8>, decoded_run<S, 4>, decoded_run<S, 3>, decoded_run<S, 2>},
        {decode_panel<S, 8>, decode_panel<S, 4>, decode_panel<S, 3>, decode_panel<S, 2>},
        depthwise_row<S>,   add_run<S>,
        centred_codes<S>,   straight_through<S>, moments_run<S>,
        S::kTileRows,       S::kTileBlocks,     S::kByteBias,
        S::kSignedHalf,
    };
    return &kernels;
}

}  // namespace bitwright
