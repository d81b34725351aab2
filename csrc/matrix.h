// Matrices in memory as raw pointers: what kernels and plans are told of a tensor.
#pragma once

#include <cstdint>

#include "layout.h"

namespace q4metal {

enum class DType { f32, f16, bf16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A packed matrix W [N, K], rows and groups contiguous (layout.h). All three arrays may begin at
// any address, as they do in mapped files: kernels read them with unaligned loads.
struct PackedMatrix {
  const uint8_t* weight; // little-endian words
  const void* scales;
  const void* biases;
  DType scales_dtype; // of scales and of biases
  int64_t out_features;
  int64_t in_features;
  int group_size;
  int bits;

  int64_t groups() const { return in_features / group_size; }
  int64_t row_stride() const { return row_bytes(in_features, bits); }
  int64_t bytes() const {
    return out_features * (row_stride() + 2 * groups() * size_of(scales_dtype));
  }
};

// A matrix W [N, K] that was left dense.
struct DenseMatrix {
  const void* weight;
  DType dtype;
  int64_t out_features;
  int64_t in_features;

  int64_t bytes() const { return out_features * in_features * size_of(dtype); }
};

} // namespace q4metal
