// float16 and bfloat16 as bits, for kernels that know no torch: widening, and rounding half to
// even.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../matrix.h"

namespace q4metal::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls body.operator()<T>(), T being the type of `dtype`.
template <typename Body> void with_type(DType dtype, const Body& body) {
  switch (dtype) {
  case DType::f32:
    return body.template operator()<float>();
  case DType::f16:
    return body.template operator()<Half>();
  case DType::bf16:
    return body.template operator()<BFloat16>();
  }
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // Shifted into place the exponent is 112 short; a multiplication also makes subnormals right.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t finite = std::bit_cast<uint32_t>(scaled);
  const uint32_t special = (magnitude << 13) | 0x7f800000; // infinity and NaN keep their payload
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00 ? special : finite));
}

// Element `index` of an array of any float type. The array may begin at any address: in files that
// MLX wrote, three of four packed tensors are not aligned to their elements.
inline float widen_at(const void* values, DType dtype, int64_t index) {
  const auto* at = static_cast<const std::byte*>(values) + index * size_of(dtype);
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == DType::f16 ? widen(Half{bits}) : widen(BFloat16{bits});
}

template <typename T> T narrow(float value);

template <> inline float narrow<float>(float value) { return value; }

template <> inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value)
    return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <> inline Half narrow<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000)
    return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) // rounds to 65520 or more
    return {uint16_t(sign | 0x7c00)};
  if (magnitude <
      0x38800000) { // subnormal: let the addition of 0.5 do the rounding, in steps of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}

// Rounds to T and back.
template <typename T> float rounded(float value) { return widen(narrow<T>(value)); }

} // namespace q4metal::cpu
