// How a product is computed.
#pragma once

#include <optional>
#include <string_view>

namespace q4metal {

enum class Precision {
  exact, // float32 throughout; relative rms error about 5e-7
  fast,  // 16-bit activations in the matvec (5e-5); the fastest GEMM below 3e-3
  int8,  // 8-bit activations (1e-2)
};

constexpr int kPrecisions = 3;

constexpr const char* name_of(Precision precision) {
  return precision == Precision::exact ? "exact" : precision == Precision::fast ? "fast" : "int8";
}

constexpr std::optional<Precision> precision_named(std::string_view name) {
  for (auto p : {Precision::exact, Precision::fast, Precision::int8})
    if (name == name_of(p))
      return p;
  return std::nullopt;
}

} // namespace q4metal
