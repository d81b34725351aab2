// The kernels on tile registers, on AMX.
#include "amx.h"

// From here on everything compiles for AVX-512, as in avx2.h.
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2"))),   \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2")
#endif

#define Q4_AMX_TILES 1
#define Q4_AMX_AVX512 1
#include "amx_table.h"

namespace q4metal::cpu {

KernelTable amx_table(const KernelTable& base) { return with_tiles(base, "amx"); }

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
