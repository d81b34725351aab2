// Operands for kernels in heap blocks of exactly their size, so that AddressSanitizer sees every
// read or write past an end; packed arrays begin at odd addresses, as they may in mapped files.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>

#include "../../csrc/cpu/float_types.h"
#include "../../csrc/cpu/kernels.h"

namespace q4metal::cpu::tests {

// Numbers that do not depend on the standard library, whose distributions differ.
class Random {
public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  uint32_t bits() { return uint32_t(engine_()); }
  int below(int limit) { return int(bits() % uint32_t(limit)); }
  double uniform() { return (bits() + 0.5) / 4294967296.0; }
  double normal() {
    return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform());
  }

private:
  std::mt19937 engine_;
};

// `size` bytes that begin `offset` after the start of their block and end with it.
class Bytes {
public:
  Bytes(size_t size, size_t offset) : block_(new uint8_t[offset + size]), offset_(offset) {}
  uint8_t* data() const { return block_.get() + offset_; }

private:
  std::unique_ptr<uint8_t[]> block_;
  size_t offset_;
};

using Floats = std::unique_ptr<float[]>;

inline Floats floats(int64_t count) { return Floats(new float[count]); }

// What `prepare` writes to: aligned to 64 bytes, filled with NaN of every type.
class Prepared {
public:
  explicit Prepared(size_t size) {
    void* at = nullptr;
    if (posix_memalign(&at, 64, size) != 0)
      std::abort();
    std::memset(at, 0xff, size);
    data_.reset(static_cast<std::byte*>(at));
  }
  std::byte* data() const { return data_.get(); }

private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

inline void store_narrowed(float value, DType dtype, uint8_t* to) {
  const Half half = narrow<Half>(value);
  const BFloat16 bfloat = narrow<BFloat16>(value);
  const void* from = dtype == DType::f32   ? static_cast<const void*>(&value)
                     : dtype == DType::f16 ? static_cast<const void*>(&half)
                                           : static_cast<const void*>(&bfloat);
  std::memcpy(to, from, size_of(dtype));
}

struct Shape {
  int bits, group_size;
  DType scales_dtype;
  int64_t in_features, out_features;
};

inline std::string name_of(const Shape& s) {
  static const char* const kDTypes[] = {"f32", "f16", "bf16"};
  return "bits " + std::to_string(s.bits) + " group " + std::to_string(s.group_size) + " " +
         kDTypes[int(s.scales_dtype)] + " K " + std::to_string(s.in_features) + " N " +
         std::to_string(s.out_features);
}

// A packed matrix and the same in float64.
class Operand {
public:
  // Random codes. Scales of both signs, as MLX's quantizer gives them; values about -1 to 1.
  Operand(const Shape& shape, Random& random, size_t offset = 1) : Operand(shape, offset) {
    for (int64_t i = 0; i < shape.out_features * matrix.row_stride(); ++i)
      weight_.data()[i] = uint8_t(random.bits() >> 11);
    const double step = 2.0 / (1 << shape.bits);
    for (int64_t g = 0; g < matrix.out_features * matrix.groups(); ++g) {
      const double scale = step * (0.5 + random.uniform()) * (random.below(2) ? 1 : -1);
      const double centre = (1 << shape.bits) * (0.35 + 0.3 * random.uniform());
      set_group(g, float(scale), float(-scale * centre));
    }
    widen_all();
  }

  // Every code the largest, no biases: sums as large as they get.
  struct Largest {};
  Operand(const Shape& shape, Largest, size_t offset = 1) : Operand(shape, offset) {
    std::memset(weight_.data(), 0xff, shape.out_features * matrix.row_stride());
    for (int64_t g = 0; g < matrix.out_features * matrix.groups(); ++g)
      set_group(g, 0.25f, 0.0f);
    widen_all();
  }

  PackedMatrix matrix;
  std::unique_ptr<double[]> dense; // [N, K]

private:
  Operand(const Shape& s, size_t offset)
      : weight_(s.out_features * row_bytes(s.in_features, s.bits), offset),
        scales_(s.out_features * (s.in_features / s.group_size) * size_of(s.scales_dtype), offset),
        biases_(s.out_features * (s.in_features / s.group_size) * size_of(s.scales_dtype), offset) {
    matrix = {weight_.data(), scales_.data(), biases_.data(), s.scales_dtype,
              s.out_features, s.in_features,  s.group_size,   s.bits};
  }

  void set_group(int64_t index, float scale, float bias) {
    const int64_t size = size_of(matrix.scales_dtype);
    store_narrowed(scale, matrix.scales_dtype, scales_.data() + index * size);
    store_narrowed(bias, matrix.scales_dtype, biases_.data() + index * size);
  }

  void widen_all() {
    dense.reset(new double[matrix.out_features * matrix.in_features]);
    double* out = dense.get();
    for (int64_t n = 0; n < matrix.out_features; ++n)
      for (int64_t k = 0; k < matrix.in_features; ++k) {
        const int64_t bit = k * matrix.bits;
        const uint8_t* at = matrix.weight + n * matrix.row_stride() + bit / 8;
        const bool crosses = bit % 8 + matrix.bits > 8;
        const int pair = at[0] | (crosses ? at[1] << 8 : 0);
        const int code = pair >> (bit % 8) & ((1 << matrix.bits) - 1);
        const int64_t group = n * matrix.groups() + k / matrix.group_size;
        *out++ = code * double(widen_at(matrix.scales, matrix.scales_dtype, group)) +
                 double(widen_at(matrix.biases, matrix.scales_dtype, group));
      }
  }

  Bytes weight_, scales_, biases_;
};

// Activations: normal, a few of them 50 times as large.
inline Floats activations(int64_t count, Random& random) {
  Floats x = floats(count);
  for (int64_t i = 0; i < count; ++i)
    x[i] = float(random.normal() * (random.below(100) == 0 ? 50 : 1));
  return x;
}

} // namespace q4metal::cpu::tests
