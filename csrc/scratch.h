// Working memory of one call: a single 64-byte aligned block of the calling thread, kept between calls so
// that a forward pass does not pay page faults for every layer. Everything a call needs (also the buffers of
// its team) is carved from it before threads start, so running out of memory is an exception of the caller.
// Oversized blocks are returned when the call ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)  // each piece is an allocation of its own to the address sanitizer
#include <sanitizer/asan_interface.h>
#define BW_HIDE(begin, bytes) ASAN_POISON_MEMORY_REGION(begin, bytes)
#define BW_SHOW(begin, bytes) ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#else
#define BW_HIDE(begin, bytes) (void)0
#define BW_SHOW(begin, bytes) (void)0
#endif

namespace bitwright {

class Scratch {
public:
    explicit Scratch(size_t bytes) : memory_(held()) {
        if (memory_.size < bytes) {
            memory_.release();
            memory_.data = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64}));
            memory_.size = bytes;
        }
        BW_HIDE(memory_.data, memory_.size);
    }
    ~Scratch() {
        if (memory_.size > kKeep) memory_.release();
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next `count` elements, starting on a cache line.
    template <class T>
    T* take(int64_t count) {
        uint8_t* begin = memory_.data + used_;
        used_ += bytes<T>(count);
        BW_SHOW(begin, static_cast<size_t>(count) * sizeof(T));
        return reinterpret_cast<T*>(begin);
    }

    // What `take` consumes; callers add these up for the constructor.
    template <class T>
    static size_t bytes(int64_t count) {
        return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + kGap;
    }

private:
    struct Memory {
        uint8_t* data = nullptr;
        size_t size = 0;
        void release() {
            BW_SHOW(data, size);
            ::operator delete(data, std::align_val_t{64});
            data = nullptr;
            size = 0;
        }
        ~Memory() { release(); }
    };
    static constexpr size_t kKeep = size_t{64} << 20;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kGap = 64;  // hidden
#else
    static constexpr size_t kGap = 0;
#endif

    static Memory& held() {
        thread_local Memory memory;
        return memory;
    }

    Memory& memory_;
    size_t used_ = 0;
};

}  // namespace bitwright
