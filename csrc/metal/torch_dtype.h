// DType and torch's dtypes, one into the other.
#pragma once

#include <ATen/core/Tensor.h>

#include "../matrix.h"

namespace q4metal::mps {

inline DType dtype_of(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf       ? DType::f16
         : t.scalar_type() == at::kBFloat16 ? DType::bf16
                                            : DType::f32;
}

inline at::ScalarType torch_dtype(DType dtype) {
  return dtype == DType::f16 ? at::kHalf : dtype == DType::bf16 ? at::kBFloat16 : at::kFloat;
}

} // namespace q4metal::mps
