// Macros for the files that are compiled once per instruction set. Those files keep every function in a
// template over a type of an unnamed namespace (or static): code built with -mavx512* must never be merged
// with code of another file. For the same reason they use no standard library templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)  // with its checks, inlined and unrolled code would take minutes to compile
#define BW_INLINE inline
#define BW_NOINLINE
#elif defined(__GNUC__) || defined(__clang__)
#define BW_INLINE inline __attribute__((always_inline))
#define BW_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define BW_INLINE __forceinline
#define BW_NOINLINE __declspec(noinline)
#else
#define BW_INLINE inline
#define BW_NOINLINE
#endif

#if defined(__SANITIZE_ADDRESS__)
#define BW_UNROLL
#elif defined(__clang__)
#define BW_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define BW_UNROLL _Pragma("GCC unroll 16")
#else
#define BW_UNROLL
#endif

// BW_PIN makes the compiler hold a vector in one register at that point.
#if defined(__GNUC__) && defined(__x86_64__)
#define BW_PIN(vector) __asm__("" : "+v"(vector))
#else
#define BW_PIN(vector) (void)0
#endif

// BW_OPAQUE hides where a pointer came from, so that loops keep it in a register of its own; BW_FORGET makes the
// compiler read memory again; BW_PREFETCH requests a line for the second-level cache.
#if defined(__GNUC__) || defined(__clang__)
#define BW_OPAQUE(pointer) __asm__("" : "+r"(pointer))
#define BW_FORGET __asm__("" ::: "memory")
#define BW_PREFETCH(pointer) __builtin_prefetch(pointer, 0, 2)
#else
#define BW_OPAQUE(pointer) (void)0
#define BW_FORGET (void)0
#define BW_PREFETCH(pointer) (void)0
#endif
