// Packing, unpacking and MLX's quantizer, a row at a time. Numbers equal mlx.core on a CPU bit for
// bit (tests/oracle); the formulas are written out in torch_q4metal/reference.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "float_types.h"
#include "kernels.h"

namespace q4metal::cpu {
namespace {

// Eight codes are `bits` whole bytes. A read of eight bytes that would pass the end of the run is
// moved back inside it: 32 codes are at least eight bytes.
inline uint64_t eight_codes(const uint8_t* run, int bits, int eighth) {
  const int begin = eighth * bits, last = 4 * bits - 8;
  uint64_t stream;
  std::memcpy(&stream, run + std::min(begin, last), 8);
  return begin > last ? stream >> (8 * (begin - last)) : stream;
}

template <typename T>
void quantize_values(const T* values, int64_t in_features, int group_size, int bits,
                     uint32_t* weight, T* scales, T* biases) {
  const float levels = float((1 << bits) - 1);
  std::memset(weight, 0, row_bytes(in_features, bits));
  for (int64_t g = 0; g < in_features / group_size; ++g) {
    const T* group = values + g * group_size;
    float low = widen(group[0]), high = low;
    for (int i = 1; i < group_size; ++i) {
      low = std::min(low, widen(group[i]));
      high = std::max(high, widen(group[i]));
    }
    const bool low_dominates = std::fabs(low) > std::fabs(high);
    float scale = std::max((high - low) / levels, 1e-7f);
    scale = low_dominates ? scale : -scale;
    const float edge = low_dominates ? low : high;
    const float edge_code = std::nearbyint(edge / scale);
    float bias = 0;
    if (edge_code != 0) {
      scale = edge / edge_code;
      bias = edge;
    }
    scales[g] = narrow<T>(scale);
    biases[g] = narrow<T>(bias);
    for (int i = 0; i < group_size; ++i) {
      const float code = std::nearbyint((widen(group[i]) - bias) / scale);
      const uint64_t q = uint64_t(std::min(std::max(code, 0.0f), levels));
      const int64_t bit = (g * group_size + i) * bits;
      const uint64_t shifted = q << (bit & 31);
      weight[bit >> 5] |= uint32_t(shifted);
      if (shifted >> 32)
        weight[(bit >> 5) + 1] |= uint32_t(shifted >> 32);
    }
  }
}

// Rounds to S after the product and after the sum where the output has the scales' type.
template <typename S, typename T>
void dequantize_values(const PackedMatrix& w, int64_t row, T* out) {
  const uint8_t* packed = w.weight + row * w.row_stride();
  float codes[kCodesPerRun];
  for (int64_t k = 0; k < w.in_features; k += kCodesPerRun) {
    unpack_run(packed, w.bits, k, codes);
    const int64_t group = row * w.groups() + k / w.group_size;
    const float scale = widen_at(w.scales, w.scales_dtype, group);
    const float bias = widen_at(w.biases, w.scales_dtype, group);
    for (int i = 0; i < kCodesPerRun; ++i) {
      const float product = codes[i] * scale;
      out[k + i] = narrow<T>((std::is_same_v<S, T> ? rounded<S>(product) : product) + bias);
    }
  }
}

} // namespace

void unpack_run(const uint8_t* row, int bits, int64_t first, float* codes) {
  const uint8_t* run = row + first * bits / 8;
  const uint32_t mask = (1u << bits) - 1;
  for (int eighth = 0; eighth < 4; ++eighth) {
    const uint64_t stream = eight_codes(run, bits, eighth);
    for (int i = 0; i < 8; ++i)
      codes[eighth * 8 + i] = float(uint32_t(stream >> (i * bits)) & mask);
  }
}

void dequantize_row(const PackedMatrix& w, int64_t row, DType out_dtype, void* out) {
  with_type(w.scales_dtype, [&]<typename S>() {
    with_type(out_dtype, [&]<typename T>() { dequantize_values<S>(w, row, static_cast<T*>(out)); });
  });
}

void quantize_row(const void* values, DType dtype, int64_t in_features, int group_size, int bits,
                  uint32_t* weight, void* scales, void* biases) {
  with_type(dtype, [&]<typename T>() {
    quantize_values(static_cast<const T*>(values), in_features, group_size, bits, weight,
                    static_cast<T*>(scales), static_cast<T*>(biases));
  });
}

} // namespace q4metal::cpu
