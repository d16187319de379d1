// Random cases for the kernels, buffers of exactly the size that they may touch, and comparisons that stop the
// program at the first difference. Deterministic: the same cases on every machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops.h"

namespace bitwright::test {

// splitmix64
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next();
    int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1)); }
    bool one_in(int64_t n) { return between(1, n) == 1; }
    float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(next() >> 40) / 16777216.0f); }

private:
    uint64_t state_;
};

// `count` elements behind up to three that nobody uses, so that vectors start anywhere; an address sanitizer sees
// what is read or written behind the last.
template <class T>
class Buffer {
public:
    Buffer(int64_t count, Random& random) : skipped_(random.between(0, 3)) {
        memory_.reserve(static_cast<size_t>(skipped_ + count) + (count == 0 ? 1 : 0));  // an address even for nothing
        memory_.resize(static_cast<size_t>(skipped_ + count));
    }
    T* data() { return memory_.data() + skipped_; }
    const T* data() const { return memory_.data() + skipped_; }
    int64_t size() const { return static_cast<int64_t>(memory_.size()) - skipped_; }
    T& operator[](int64_t i) { return data()[i]; }
    const T& operator[](int64_t i) const { return data()[i]; }

private:
    int64_t skipped_;
    std::vector<T> memory_;
};

// How activations are encoded; `wide` also allows zero points outside of the range.
struct Encoding {
    Range8 range;
    float scale;
    float zero;
};
Encoding random_encoding(Random& random, bool wide);

// Mostly ordinary numbers for a scale; some lie between two codes, some are special (NaN and infinities on request).
Buffer<float> activations(Random& random, int64_t count, float scale, bool special);
Buffer<float> numbers(Random& random, int64_t count, float low, float high);

struct InstructionSet {
    int number;
    const char* name;
};
const std::vector<InstructionSet>& instruction_sets();  // of this machine, portable first

// Both stop the program with a message. Equal means: the same bits, or both NaN.
void expect(bool holds, const std::string& what);
void expect_equal(const Buffer<float>& found, const Buffer<float>& wanted, const std::string& what);

template <class T>
void expect_same(const Buffer<T>& found, const Buffer<T>& wanted, const std::string& what) {
    expect(found.size() == wanted.size(), what + ": sizes differ");
    for (int64_t i = 0; i < found.size(); ++i) {
        if (found[i] == wanted[i]) continue;
        expect(false, what + ": element " + std::to_string(i) + " is " + std::to_string(found[i]) + ", not " +
                          std::to_string(wanted[i]));
    }
}

// One test each; `cases` random cases.
void test_linear(int64_t cases);
void test_grouped(int64_t cases);
void test_decoded(int64_t cases);
void test_panels(int64_t cases);
void test_conv(int64_t cases);
void test_add(int64_t cases);
void test_pool(int64_t cases);
void test_codes(int64_t cases);
void test_straight_through(int64_t cases);
void test_moments(int64_t cases);
void test_refusals();

}  // namespace bitwright::test
