// Runs a function on a team of threads. The team is the OpenMP runtime that torch has already loaded, found
// by name at run time: linking a second runtime would start a second pool of threads that fights torch's.
// Without one the call is serial. The function gets (index, count) with the real size of the team, which may
// be smaller than asked; it must not throw and must not let its results depend on the split.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bitwright {

void run_team(int threads, void (*fn)(void* context, int index, int count), void* context);

template <class F>
void parallel_for(int threads, F&& fn) {
    if (threads <= 1) {
        fn(0, 1);
        return;
    }
    using Fn = std::remove_reference_t<F>;
    run_team(
        threads, [](void* context, int index, int count) { (*static_cast<Fn*>(context))(index, count); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

// The part [begin, end) of `total` that member `index` of `count` takes, in whole multiples of `unit`.
struct Range {
    int64_t begin;
    int64_t end;
};

inline Range share(int64_t total, int64_t unit, int index, int count) {
    const int64_t units = (total + unit - 1) / unit;
    const int64_t begin = units * index / count * unit;
    const int64_t end = units * (index + 1) / count * unit;
    return {begin < total ? begin : total, end < total ? end : total};
}

// Work of the busiest of `threads` members over the mean, 1 = perfectly even.
inline double imbalance(int64_t units, int threads) {
    if (units <= 0) return threads;
    const int64_t busiest = (units + threads - 1) / threads;
    return static_cast<double>(busiest * threads) / static_cast<double>(units);
}

}  // namespace bitwright
