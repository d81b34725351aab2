// Picks the kernel table once, at first use.
#include <cstdlib>
#include <string>
#include <vector>

#include "amx.h"
#include "cpu_features.h"
#include "kernels.h"

namespace q4metal::cpu {
namespace {

// Best first. Emulated tiles come last: they are for tests on CPUs without AMX.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  if (has_amx()) {
    static const KernelTable amx = amx_table(avx512_kernels);
    tables.push_back(&amx);
  }
  if (has_avx512())
    tables.push_back(&avx512_kernels);
  if (has_avx2())
    tables.push_back(&avx2_kernels);
#elif defined(__aarch64__)
  if (has_neon())
    tables.push_back(&neon_kernels);
#endif
  tables.push_back(&ref_kernels);
  if (!has_amx()) {
    static const KernelTable emulated = amx_emulated_table(*tables.front());
    tables.push_back(&emulated);
  }
  return tables;
}

const KernelTable& choose() {
  const auto tables = supported_tables();
  const char* forced = std::getenv("Q4METAL_CPU");
  if (forced == nullptr || *forced == '\0')
    return *tables.front();
  std::string names;
  for (const auto* table : tables) {
    if (std::string(table->name) == forced)
      return *table;
    names += std::string(names.empty() ? "" : ", ") + table->name;
  }
  throw UnknownKernels("Q4METAL_CPU=" + std::string(forced) +
                       " is not available here; this build and CPU have: " + names);
}

} // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose(); // a throw leaves it unset, the next call tries again
  return table;
}

} // namespace q4metal::cpu
