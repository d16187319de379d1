// Max pooling of images of bytes. Bytes are monotone in the values that they stand for, so the largest byte of a window
// is the byte of its largest value. First the rows of a window meet in one row, then its columns.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace bitwright {
namespace {

constexpr int64_t kSerialBytes = 1 << 16;

struct Taps {
    int64_t begin, end;  // of the window's pixels that lie inside
};

Taps inside(int64_t at, int64_t stride, int64_t pad, int64_t window, int64_t size) {
    const int64_t first = at * stride - pad;
    return {std::max<int64_t>(first, 0), std::min(first + window, size)};
}

void keep_larger(uint8_t* out, const uint8_t* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = std::max(out[i], x[i]);
}

}  // namespace

void max_pool(const Pool& p) {
    size_product({p.n, p.h, p.w, p.c});
    require(p.h > 0 && p.w > 0 && p.c > 0 && p.kh > 0 && p.kw > 0, "empty image or window");
    require(p.stride_h > 0 && p.stride_w > 0 && p.threads >= 1, "stride and threads must be positive");
    require(p.pad_h >= 0 && p.pad_w >= 0 && p.pad_h * 2 <= p.kh && p.pad_w * 2 <= p.kw,
            "padding must be at most half of the window");
    require(p.h + 2 * p.pad_h >= p.kh && p.w + 2 * p.pad_w >= p.kw, "window larger than image");
    require(p.n == 0 || (p.x != nullptr && p.y != nullptr), "null pointer");
    const int64_t ho = (p.h + 2 * p.pad_h - p.kh) / p.stride_h + 1, wo = (p.w + 2 * p.pad_w - p.kw) / p.stride_w + 1;
    const int64_t row_bytes = p.w * p.c;
    Scratch scratch(Scratch::bytes<uint8_t>(size_product({p.threads, row_bytes})));
    uint8_t* rows = scratch.take<uint8_t>(p.threads * row_bytes);
    parallel_for(p.n * p.h * row_bytes <= kSerialBytes ? 1 : p.threads, [&](int index, int team) {
        uint8_t* row = rows + index * row_bytes;
        const Range mine = share(p.n * ho, 1, index, team);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const uint8_t* image = p.x + at / ho * p.h * row_bytes;
            const Taps y = inside(at % ho, p.stride_h, p.pad_h, p.kh, p.h);
            std::memcpy(row, image + y.begin * row_bytes, static_cast<size_t>(row_bytes));
            for (int64_t i = y.begin + 1; i < y.end; ++i) keep_larger(row, image + i * row_bytes, row_bytes);
            uint8_t* out = p.y + at * wo * p.c;
            for (int64_t j = 0; j < wo; ++j, out += p.c) {
                const Taps x = inside(j, p.stride_w, p.pad_w, p.kw, p.w);
                std::memcpy(out, row + x.begin * p.c, static_cast<size_t>(p.c));
                for (int64_t i = x.begin + 1; i < x.end; ++i) keep_larger(out, row + i * p.c, p.c);
            }
        }
    });
}

}  // namespace bitwright
