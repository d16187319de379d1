// What the operators of torch_ops.cpp need of torch's tensors, through torch's stable ABI alone: checks, memory, results.
// What does not fit throws std::invalid_argument; what torch refuses (memory that it cannot give) std::runtime_error.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "ops.h"

namespace bitwright {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <class... T>
[[noreturn]] void refuse(const T&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// Runs an operator; what it throws for its arguments begins with its name.
template <class F>
Tensor named(const char* op, const F& run) {
    try {
        return run();
    } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string(op) + ": " + error.what());
    } catch (const std::overflow_error& error) {  // of the range of a dynamic quantizer
        throw std::overflow_error(std::string(op) + ": " + error.what());
    }
}

inline void succeed(AOTITorchError code) {
    if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

inline int narrow(int64_t value) {
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
        refuse(value, " is out of range");
    }
    return static_cast<int>(value);
}

inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::ostringstream out;
    for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "[" : ", ") << sizes[i];
    out << (sizes.size() == 0 ? "[]" : "]");
    return out.str();
}

inline Sizes sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline void check_floats(const Tensor& x, const char* name) {
    if (x.scalar_type() != ScalarType::Float) refuse(name, " must be float32, got ", toString(x.scalar_type()));
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// `count` elements of a type in one piece of memory.
inline bool fills(const Tensor& x, ScalarType type, int64_t count) {
    return x.scalar_type() == type && x.numel() == count && x.is_contiguous();
}

inline bool fills(const Maybe& x, ScalarType type, int64_t count) { return !x || fills(*x, type, count); }

// A float32 tensor of one of the given sizes, in one piece of memory.
inline Tensor parameter(const Tensor& x, std::initializer_list<int64_t> counts, const char* name) {
    check_floats(x, name);
    if (std::find(counts.begin(), counts.end(), x.numel()) == counts.end()) {
        std::ostringstream expected;
        for (int64_t count : counts) expected << (expected.tellp() > 0 ? " or " : "") << count;
        refuse(name, " has ", x.numel(), " values, expected ", expected.str());
    }
    return dense(x);
}

inline Maybe parameter(const Maybe& x, std::initializer_list<int64_t> counts, const char* name) {
    return x ? Maybe(parameter(*x, counts, name)) : Maybe();
}

inline void check_layout(const Tensor& weight, int64_t expected) {
    const int64_t found = weight.numel() * static_cast<int64_t>(weight.element_size());
    if (found != expected || !weight.is_contiguous()) {
        refuse("packed weights have ", found, " bytes, these shapes need ", expected, " contiguous bytes");
    }
}

template <class T>
const T* in(const Tensor& x) {
    return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* in(const Maybe& x) {
    return x ? in<T>(*x) : nullptr;
}

inline float* out(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Strides of dense memory whose axes vary from the last of `order`, slowest, to its first.
inline Sizes dense_strides(const Sizes& sizes, const Sizes& order) {
    Sizes strides(sizes.size());
    int64_t stride = 1;
    for (int64_t axis : order) {
        strides[static_cast<size_t>(axis)] = stride;
        stride *= std::max<int64_t>(sizes[static_cast<size_t>(axis)], 1);
    }
    return strides;
}

inline Tensor empty(const Sizes& sizes, bool channels_last = false) {
    int64_t bytes = sizeof(float);  // dense_strides must not overflow where torch would refuse
    for (int64_t size : sizes) bytes = size == 0 ? bytes : size_product({bytes, size});
    Sizes order{1, 3, 2, 0};
    if (!channels_last) {
        order.resize(sizes.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(order.size() - 1 - i);
    }
    const Sizes strides = dense_strides(sizes, order);
    AtenTensorHandle handle = nullptr;
    succeed(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                     aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// Whether images lie in memory with their channels beside each other, and in no other dense way.
inline bool is_channels_last(const Tensor& x) {
    if (x.is_contiguous() || x.dim() != 4) return false;
    const Sizes sizes = sizes_of(x);
    const Sizes strides = dense_strides(sizes, {1, 3, 2, 0});
    for (int64_t axis = 0; axis < 4; ++axis) {
        if (sizes[static_cast<size_t>(axis)] != 1 && x.stride(axis) != strides[static_cast<size_t>(axis)]) return false;
    }
    return true;
}

// A matrix of floats in memory that somebody else owns.
inline Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t stride) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {stride, 1};
    AtenTensorHandle handle = nullptr;
    succeed(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes, strides, 0,
                                               aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

}  // namespace bitwright
