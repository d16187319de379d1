// y = x @ w^T for float x and codes of 8, 4, 3 or 2 bits that are decoded: packs the codes, pads the rows of x
// and deals blocks of weights, or rows, to the threads. Any m, k and n; layouts: dispatch.h.
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace bitwright {
namespace {

constexpr int64_t kSerialProducts = 1 << 17;
constexpr int64_t kResidentBytes = 256 << 10;  // weights that stay in the second-level cache while rows pass

// Inputs and bytes of one unit of codes.
int64_t unit_inputs(int64_t bits) { return bits == 3 ? 32 : 32 / bits; }
int64_t unit_bytes(int64_t bits) { return bits == 3 ? 3 * kGroupBytes : kGroupBytes; }

int64_t units_of(const DecodedLinear& a) { return ceil_div(a.k, unit_inputs(a.bits)); }

void check_bits(int64_t bits) {
    require(bits == 8 || (bits <= 4 && bits >= 2), "decoded weights have 8, 4, 3 or 2 bits");
}

void check(const DecodedLinear& a) {
    check_bits(a.bits);
    size_product({a.n, a.k});
    size_product({a.m, a.k});
    size_product({a.m, a.n});
    require(a.threads >= 1, "threads must be positive");
    require(a.group_size > 0 && (a.group_size >= a.k || a.k % a.group_size == 0), "groups must divide the inputs");
    require(a.group_size >= a.k || a.group_size % unit_inputs(a.bits) == 0, "groups must hold whole units of codes");
    const bool empty = a.m == 0 || a.n == 0;
    require(empty || (a.y != nullptr && a.table != nullptr && a.scales != nullptr), "null pointer");
    require(empty || a.k == 0 || (a.x != nullptr && a.w != nullptr), "null pointer");
}

int width_index(int bits) { return bits == 8 ? 0 : 5 - bits; }

Decoded job_of(const DecodedLinear& a) {
    const int64_t units = units_of(a);
    Decoded job{};
    job.x_stride = units * unit_inputs(a.bits);
    job.w = a.w;
    job.block_bytes = units * unit_bytes(a.bits);
    job.columns = a.n;
    job.scale_groups = a.k == 0 || a.group_size >= a.k ? 1 : a.k / a.group_size;
    job.group_units = units / job.scale_groups;
    job.table = a.table;
    job.scales = a.scales;
    job.zeros = a.zeros;
    job.bias = a.bias;
    job.y = a.y;
    job.y_stride = a.n;
    return job;
}

// A row of x at a stride of whole units, its padding 0.
void pad_row(const DecodedLinear& a, int64_t stride, float* out, int64_t row) {
    std::memcpy(out, a.x + row * a.k, static_cast<size_t>(a.k) * sizeof(float));
    std::memset(out + a.k, 0, static_cast<size_t>(stride - a.k) * sizeof(float));
}

// The sum of every scale group of a row.
void sum_row(const DecodedLinear& a, int64_t groups, float* sums, int64_t row) {
    const int64_t size = a.k / groups;
    for (int64_t group = 0; group < groups; ++group) {
        float sum = 0.0f;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) sum += a.x[row * a.k + i];
        sums[row * groups + group] = sum;
    }
}

void run_share(const Kernels& kernels, const DecodedLinear& a, const Decoded& job, int index, int team) {
    const int64_t blocks = ceil_div(a.n, kLanes);
    const bool by_blocks = imbalance(ceil_div(blocks, 4), team) <= imbalance(a.m, team);
    const Range rows = by_blocks ? Range{0, a.m} : share(a.m, 1, index, team);
    const Range mine = by_blocks ? share(blocks, 4, index, team) : Range{0, blocks};
    const int64_t fitting = kResidentBytes / (job.block_bytes > 0 ? job.block_bytes : 1);
    const int64_t slab = a.m == 1 ? blocks : round_up(fitting > 0 ? fitting : 1, 4);
    for (int64_t begin = mine.begin; begin < mine.end; begin += slab) {
        const int64_t end = begin + slab < mine.end ? begin + slab : mine.end;
        kernels.decoded[width_index(a.bits)](job, rows.begin, rows.end, begin, end);
    }
}

}  // namespace

int64_t decoded_layout_bytes(int64_t bits, int64_t n, int64_t k) {
    check_bits(bits);
    size_product({n, k});
    return ceil_div(n, kLanes) * ceil_div(k, unit_inputs(bits)) * unit_bytes(bits);
}

void pack_decoded(const uint8_t* codes, int64_t bits, int64_t n, int64_t k, uint8_t* out) {
    const int64_t total = decoded_layout_bytes(bits, n, k);
    if (total == 0) return;
    require(codes != nullptr && out != nullptr, "null pointer");
    std::memset(out, 0, static_cast<size_t>(total));
    const int64_t block_bytes = total / ceil_div(n, kLanes);
    const int64_t inputs = unit_inputs(bits);
    const int64_t width = bits == 3 ? 2 : bits;
    const int64_t load = 32 / width;  // inputs of one load of codes
    for (int64_t row = 0; row < n; ++row) {
        uint8_t* lane = out + row / kLanes * block_bytes + row % kLanes * 4;
        for (int64_t i = 0; i < k; ++i) {
            const int code = codes[row * k + i];
            require(code < 1 << bits, "a weight code does not fit in its bits");
            uint8_t* unit = lane + i / inputs * unit_bytes(bits);
            const int64_t at = i % inputs;
            uint8_t& low = unit[at / load * kGroupBytes + at % 4];
            low = static_cast<uint8_t>(low | (code & ((1 << width) - 1)) << (at % load / 4 * width));
            if (bits == 3) {
                uint8_t& high = unit[2 * kGroupBytes + at / 8];
                high = static_cast<uint8_t>(high | (code >> 2) << (at % 8));
            }
        }
    }
}

void decoded_linear(const DecodedLinear& a) {
    check(a);
    const Kernels& kernels = bitwright::kernels(a.isa);
    if (a.m == 0 || a.n == 0) return;
    Decoded job = job_of(a);
    const bool padded = job.x_stride != a.k;
    const bool summed = a.zeros != nullptr && a.m == 1;  // only a single row is scaled after its sum
    Scratch scratch(Scratch::bytes<float>(padded ? a.m * job.x_stride : 0) +
                    Scratch::bytes<float>(summed ? a.m * job.scale_groups : 0));
    float* rows = scratch.take<float>(padded ? a.m * job.x_stride : 0);
    float* sums = scratch.take<float>(summed ? a.m * job.scale_groups : 0);
    job.x = padded ? rows : a.x;
    job.x_sums = sums;
    for (int64_t row = 0; row < a.m; ++row) {
        if (padded) pad_row(a, job.x_stride, rows + row * job.x_stride, row);
        if (summed) sum_row(a, job.scale_groups, sums, row);
    }
    const double products = static_cast<double>(a.m) * static_cast<double>(a.n) * static_cast<double>(a.k);
    const int threads = products <= kSerialProducts ? 1 : a.threads;
    parallel_for(threads, [&](int index, int team) { run_share(kernels, a, job, index, team); });
}

void decode_panel(const DecodedLinear& a, int64_t begin, int64_t end, float* out) {
    check_bits(a.bits);
    size_product({a.n, a.k});
    const int64_t units = units_of(a);
    require(a.k > 0 && a.group_size > 0 && (a.group_size >= a.k || a.k % a.group_size == 0), "groups must divide the inputs");
    require(a.group_size >= a.k || a.group_size % unit_inputs(a.bits) == 0, "groups must hold whole units of codes");
    require(begin >= 0 && begin <= end && end <= ceil_div(a.n, kLanes), "no such blocks of outputs");
    require(units == 0 || (a.w != nullptr && a.table != nullptr && a.scales != nullptr && out != nullptr), "null pointer");
    const Kernels& kernels = bitwright::kernels(a.isa);
    const Decoded job = job_of(a);
    const int64_t stride = (end - begin) * kLanes;
    parallel_for(a.threads, [&](int index, int team) {
        const Range mine = share(end - begin, 1, index, team);
        kernels.decode[width_index(a.bits)](job, begin + mine.begin, begin + mine.end, out - begin * kLanes, stride);
    });
}

}  // namespace bitwright
