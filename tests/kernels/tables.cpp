#include "tables.h"

#include "../../csrc/cpu/amx.h"
#include "../../csrc/cpu/cpu_features.h"

namespace q4metal::cpu::tests {

std::vector<LinkedTable> linked_tables() {
  std::vector<LinkedTable> tables{{&ref_kernels, true, false}};
  const KernelTable* best = &ref_kernels;
#if defined(__x86_64__)
  tables.push_back({&avx2_kernels, has_avx2(), false});
  tables.push_back({&avx512_kernels, has_avx512(), false});
  if (has_amx()) { // its very making needs AVX-512
    static const KernelTable amx = amx_table(avx512_kernels);
    tables.push_back({&amx, true, false});
  }
  if (has_avx2())
    best = &avx2_kernels;
#elif defined(__aarch64__)
  tables.push_back({&neon_kernels, has_neon(), false});
  if (has_neon())
    best = &neon_kernels;
#endif
  static const KernelTable emulated = amx_emulated_table(*best);
  tables.push_back({&emulated, true, true});
  return tables;
}

} // namespace q4metal::cpu::tests
