// e^x on compiler vectors of any width.
#pragma once

#include <cstring>

#include "kernels.h"

namespace q4metal::cpu {
namespace {

// e^x for x <= 0 or moderate x, relative error below 2e-7: 2^n times a polynomial on [-ln2/2,
// ln2/2]. IntVec: as many int32; multiply_add(a, b, c): a * b + c, rounded once or twice.
template <typename Vec, typename IntVec, typename MultiplyAdd>
Q4_INLINE Vec exponential(Vec x, const MultiplyAdd& multiply_add) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shift = Vec{} + 12582912.0f; // 1.5 * 2^23: the sum's low bits are n
  const Vec shifted = multiply_add(x, Vec{} + 1.44269504f, shift);
  const Vec n = shifted - shift;
  // ln 2 in two parts
  const Vec r = multiply_add(n, Vec{} + 2.12194440e-4f, multiply_add(n, Vec{} - 0.693359375f, x));
  Vec p = Vec{} + 1.9875691500e-4f;
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(p, r, Vec{} + c);
  p = multiply_add(p * r, r, r) + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4b400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

} // namespace
} // namespace q4metal::cpu
