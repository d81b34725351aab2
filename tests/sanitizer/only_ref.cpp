// In the place of csrc/cpu/dispatch.cpp: the portable kernels alone, which compile in seconds.
#include "../../csrc/cpu/kernels.h"

namespace q4metal::cpu {

const KernelTable& kernels() { return ref_kernels; }

} // namespace q4metal::cpu
