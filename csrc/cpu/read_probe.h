// How fast this machine reads memory: the limit that decoding is measured against.
#pragma once

#include <cstddef>
#include <vector>

namespace q4metal::cpu {

// Reads a buffer of `bytes` sequentially, each of `threads` its own part, `repeats` times after a
// first pass; returns the seconds of each pass. `prefetch`: 4 KB ahead by instruction, which helps
// some processors and hinders others. Throws std::bad_alloc.
std::vector<double> read_probe(size_t bytes, int threads, int repeats, bool prefetch);

} // namespace q4metal::cpu
