// The line of the .metal text behind an address in this shared object.
#pragma once

#include <cstdint>
#include <string>

namespace msl {

// " at q4.metal:12", or "" where it can't be told. Asks binutils' addr2line; takes about 10 ms.
std::string source_line(uint64_t pc);

} // namespace msl
