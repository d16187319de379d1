// Chooses the table of kernels for the instruction set the caller names. What the machine has is asked of the
// CPU (and, through the compiler's helper, of the operating system, which must save the wide registers); what
// this build has is BITWRIGHT_X86 or BITWRIGHT_ARM.
#include "dispatch.h"

#include <stdexcept>
#include <string>

#if defined(BITWRIGHT_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(BITWRIGHT_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bitwright {

#if defined(BITWRIGHT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

bool has_avx512_vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avx512_vnni() { return false; }
#endif

#if defined(BITWRIGHT_ARM) && defined(__ARM_FEATURE_DOTPROD)
bool has_neon_dotprod() { return true; }  // the whole program needs it, as on every Mac
#elif defined(BITWRIGHT_ARM) && defined(__linux__)
bool has_neon_dotprod() {
    constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kDotProduct) != 0;
}
#else
bool has_neon_dotprod() { return false; }
#endif

#if defined(BITWRIGHT_ARM) && defined(__ARM_FEATURE_MATMUL_INT8)
bool has_neon_i8mm() { return true; }
#elif defined(BITWRIGHT_ARM) && defined(__linux__)
bool has_neon_i8mm() {
    constexpr unsigned long kByteMatrices = 1ul << 13;  // HWCAP2_I8MM
    return has_neon_dotprod() && (getauxval(AT_HWCAP2) & kByteMatrices) != 0;
}
#elif defined(BITWRIGHT_ARM) && defined(__APPLE__)
bool has_neon_i8mm() {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found != 0;
}
#else
bool has_neon_i8mm() { return false; }
#endif

const Kernels& kernels(int isa) {
    if (isa == static_cast<int>(Isa::kPortable)) return *portable_kernels();
#if defined(BITWRIGHT_X86)
    if (isa == static_cast<int>(Isa::kAvx2) && has_avx2()) return *avx2_kernels();
    if (isa == static_cast<int>(Isa::kAvx512Vnni) && has_avx512_vnni()) return *avx512_kernels();
#endif
#if defined(BITWRIGHT_ARM)
    if (isa == static_cast<int>(Isa::kNeonDotprod) && has_neon_dotprod()) return *neon_kernels();
    if (isa == static_cast<int>(Isa::kNeonI8mm) && has_neon_i8mm()) return *neon_i8mm_kernels();
#endif
    throw std::invalid_argument("instruction set " + std::to_string(isa) +
                                " is not available on this machine");
}

}  // namespace bitwright
