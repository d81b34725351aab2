// One check per operator, used by every backend. Each failure is one sentence that says what was
// given and what fits. Nothing here touches data.
#pragma once

#include <ATen/core/Tensor.h>

#include "layout.h"
#include "precision.h"

namespace q4metal {

// A packed matrix whose tensors agree with each other.
struct PackedTensors {
  at::Tensor weight; // [N, K * bits / 32]
  at::Tensor scales; // [N, K / group_size]
  at::Tensor biases; // as scales
  int64_t out_features;
  int64_t in_features;
  int group_size;
  int bits;
};

inline void check_mode(c10::string_view mode) {
  TORCH_CHECK_VALUE(mode == "affine", "mode='", mode,
                    "' is not built; the mode that is built is 'affine'");
}

inline Precision check_precision(c10::string_view precision) {
  const auto found = precision_named({precision.data(), precision.size()});
  TORCH_CHECK_VALUE(found.has_value(), "precision='", precision,
                    "' is unknown; use 'fast', 'exact' or 'int8'");
  return *found;
}

inline void check_float(const at::Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name,
                    " has dtype ", type, "; it must be float32, float16 or bfloat16");
}

inline void check_format(int64_t group_size, int64_t bits, c10::string_view mode) {
  check_mode(mode);
  TORCH_CHECK_VALUE(is_supported_bits(bits), "bits=", bits,
                    " is not supported; use 2, 3, 4, 5, 6 or 8");
  TORCH_CHECK_VALUE(is_supported_group_size(group_size), "group_size=", group_size,
                    " is not supported; use 32, 64 or 128");
}

inline PackedTensors check_packed(const at::Tensor& weight, const at::Tensor& scales,
                                  const std::optional<at::Tensor>& biases, int64_t group_size,
                                  int64_t bits, c10::string_view mode) {
  check_format(group_size, bits, mode);
  TORCH_CHECK_VALUE(biases.has_value() && biases->defined(),
                    "biases is missing; mode='affine' needs it");
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kUInt32 || weight.scalar_type() == at::kInt,
                    "weight has dtype ", weight.scalar_type(),
                    "; packed weights must be uint32 or int32");
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has shape ", weight.sizes(),
                    "; it must be [N, K * bits / 32]");
  TORCH_CHECK_VALUE(scales.dim() == 2, "scales has shape ", scales.sizes(),
                    "; it must be [N, K / group_size]");
  check_float(scales, "scales");
  check_float(*biases, "biases");
  const int64_t in_features = scales.size(1) * group_size;
  TORCH_CHECK_VALUE(
      weight.size(0) == scales.size(0) && weight.size(1) == row_words(in_features, bits),
      "weight has shape ", weight.sizes(), " and scales ", scales.sizes(), "; with bits=", bits,
      " and group_size=", group_size, " these scales need a weight of [", scales.size(0), ", ",
      row_words(in_features, bits), "]");
  TORCH_CHECK_VALUE(biases->sizes() == scales.sizes(), "biases has shape ", biases->sizes(),
                    "; it must have the shape of scales, ", scales.sizes());
  TORCH_CHECK_VALUE(weight.device() == scales.device() && weight.device() == biases->device(),
                    "weight is on ", weight.device(), ", scales on ", scales.device(),
                    " and biases on ", biases->device(), "; all must be on one device");
  return {weight, scales, *biases, weight.size(0), in_features, int(group_size), int(bits)};
}

inline void check_same_device(const at::Tensor& t, const char* name, const PackedTensors& w) {
  TORCH_CHECK_VALUE(t.device() == w.weight.device(), name, " is on ", t.device(), " and weight on ",
                    w.weight.device(), "; both must be on one device");
}

// Checks x and bias against W; the reduced dimension is K, or N where transpose is false.
inline Precision check_matmul(const at::Tensor& x, const PackedTensors& w,
                              const std::optional<at::Tensor>& bias, bool transpose,
                              c10::string_view precision) {
  const Precision chosen = check_precision(precision);
  check_float(x, "x");
  check_same_device(x, "x", w);
  const int64_t reduced = transpose ? w.in_features : w.out_features;
  const int64_t produced = transpose ? w.out_features : w.in_features;
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == reduced, "x has shape ", x.sizes(),
                    "; its last dimension must be ", reduced, " for a packed matrix of [",
                    w.out_features, ", ", w.in_features,
                    "] with transpose=", transpose ? "True" : "False");
  if (bias.has_value() && bias->defined()) {
    check_float(*bias, "bias");
    check_same_device(*bias, "bias", w);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == produced, "bias has shape ",
                      bias->sizes(), "; it must be [", produced, "]");
  }
  return chosen;
}

inline void check_matvec(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 1, "x has shape ", x.sizes(),
                    "; matvec takes [K], use matmul for more rows");
}

inline void check_ids(const at::Tensor& ids, const PackedTensors& w) {
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
                    "ids has dtype ", ids.scalar_type(), "; it must be int64 or int32");
  check_same_device(ids, "ids", w);
}

inline void check_quantize(const at::Tensor& w, int64_t group_size, int64_t bits,
                           c10::string_view mode) {
  check_format(group_size, bits, mode);
  check_float(w, "w");
  TORCH_CHECK_VALUE(w.dim() == 2, "w has shape ", w.sizes(), "; it must be [N, K]");
  TORCH_CHECK_VALUE(w.size(1) % group_size == 0, "w has shape ", w.sizes(), "; K=", w.size(1),
                    " must be a multiple of group_size=", group_size);
}

inline void check_output_dtype(std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!dtype || *dtype == at::kFloat || *dtype == at::kHalf ||
                        *dtype == at::kBFloat16,
                    "dtype ", *dtype, " is not supported; use float32, float16 or bfloat16");
}

} // namespace q4metal
