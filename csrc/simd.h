// Macros for the files that are compiled once per instruction set. Those files keep every function in a template over a type of
// an unnamed namespace (or static): code built with -mavx512* must never be merged with code of another file. For the same
// reason they use no standard library templates.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define BW_INLINE inline __attribute__((always_inline))
#define BW_NOINLINE __attribute__((noinline))
#elif defined(_MSC_VER)
#define BW_INLINE __forceinline
#define BW_NOINLINE __declspec(noinline)
#else
#define BW_INLINE inline
#define BW_NOINLINE
#endif

#if defined(__clang__)
#define BW_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define BW_UNROLL _Pragma("GCC unroll 16")
#else
#define BW_UNROLL
#endif

// Hides where a pointer came from, so that loops keep it in a register of its own.
#if defined(__GNUC__) || defined(__clang__)
#define BW_OPAQUE(pointer) __asm__("" : "+r"(pointer))
#else
#define BW_OPAQUE(pointer) (void)0
#endif
