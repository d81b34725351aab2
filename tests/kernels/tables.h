// The kernel tables that this program was built with (build.sh finds them in csrc/cpu).
#pragma once

#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace q4metal::cpu::tests {

struct LinkedTable {
  const KernelTable* table;
  bool supported; // by this CPU
  bool emulated;  // portable code in place of the instructions
};

std::vector<LinkedTable> linked_tables();

} // namespace q4metal::cpu::tests
