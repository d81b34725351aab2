// Picks the kernel table once, at first use.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace q4metal::cpu {
namespace {

// Best first.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    tables.push_back(&avx2_kernels);
#endif
  tables.push_back(&ref_kernels);
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
  throw std::invalid_argument("Q4METAL_CPU=" + std::string(forced) +
                              " is not available here; this build and CPU have: " + names);
}

} // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose(); // a throw leaves it unset, the next call tries again
  return table;
}

} // namespace q4metal::cpu
