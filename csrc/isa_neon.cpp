// 64-bit Arm with the dot product instructions.
#include "neon.h"

namespace bitwright {

const Kernels* neon_kernels() { return table<Neon>(); }

}  // namespace bitwright
