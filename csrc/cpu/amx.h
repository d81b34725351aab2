// Kernels on tile registers: matvecs of 6 to 8 rows (amx_rows.h) and the GEMM (amx_gemm.h). The
// same source is compiled for AMX and, with tiles emulated in C++, for any CPU.
#pragma once

#include "kernels.h"

namespace q4metal::cpu {

// `base` with the kernels on tiles in place of its own. `base` must be the same at every call:
// fewer rows go to its kernels.
KernelTable amx_table(const KernelTable& base);
KernelTable amx_emulated_table(const KernelTable& base);

} // namespace q4metal::cpu
