// A token's row of the embedding table, packed or dense.
#pragma once

#include "../plan/plan.h"
#include "float_types.h"
#include "kernels.h"

namespace q4metal::cpu {

// out [K], float32.
inline void embedding_row(const plan::Segment& table, int64_t id, float* out) {
  if (const auto* packed = std::get_if<PackedMatrix>(&table.matrix))
    return dequantize_row(*packed, id, DType::f32, out);
  const auto& dense = std::get<DenseMatrix>(table.matrix);
  with_type(dense.dtype, [&]<typename T>() {
    const T* row = static_cast<const T*>(dense.weight) + id * dense.in_features;
    for (int64_t k = 0; k < dense.in_features; ++k)
      out[k] = widen(row[k]);
  });
}

} // namespace q4metal::cpu
