// torch tensors in, Metal dispatches out: the MPS backend of torch.ops.q4metal. No Objective-C
// syntax here: the file compiles as C++ too, and the tests run it on Linux.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <initializer_list>
#include <limits>

#include "../checks.h"
#include "launch.h"
#include "pipelines.h"
#include "torch_dtype.h"

namespace q4metal::mps {
namespace {

uint32_t dimension(int64_t size, const char* what) {
  TORCH_CHECK_VALUE(size <= std::numeric_limits<int32_t>::max(), what, " is ", size,
                    "; Metal kernels take at most ", std::numeric_limits<int32_t>::max());
  return uint32_t(size);
}

// Contiguous and at a multiple of 16 bytes, which kernels load at a time; a slice may begin
// anywhere and is copied then.
at::Tensor aligned(const at::Tensor& t) {
  const auto dense = t.contiguous();
  return dense.storage_offset() * dense.element_size() % 16 == 0 ? dense : dense.clone();
}

struct PackedOperand {
  at::Tensor weight, scales, biases;
  DType scales_dtype; // of biases too
  uint32_t out_features, in_features;
  int bits, group_size;
};

PackedOperand operand(const PackedTensors& w) {
  // Checkpoints have scales and biases of one dtype, so this copies nothing there.
  const auto dtype = c10::promoteTypes(w.scales.scalar_type(), w.biases.scalar_type());
  const auto scales = w.scales.to(dtype).contiguous();
  return {w.weight.contiguous(),
          scales,
          w.biases.to(dtype).contiguous(),
          dtype_of(scales),
          dimension(w.out_features, "N"),
          dimension(w.in_features, "K"),
          w.bits,
          w.group_size};
}

// One dispatch on torch's current stream, in the encoder that torch's own operators share. Every
// check and allocation comes before the block: it runs on the stream's queue.
template <typename Args>
void run(const KernelKey& key, std::initializer_list<at::Tensor> buffers, const Args& args,
         const Launch& launch) {
  const auto function = pipeline(key);
  const uint64_t group[] = {launch.threads[0], launch.threads[1], launch.threads[2]};
  const uint64_t threads[] = {launch.total(0), launch.total(1), launch.total(2)};
  // Metal drops a dispatch of larger threadgroups without an error.
  const uint64_t wanted = group[0] * group[1] * group[2];
  TORCH_CHECK(function->getMaxThreadsPerThreadgroup() >= wanted, "the Metal kernel ",
              kernel_of(key).name, " needs threadgroups of ", wanted,
              " threads; on this GPU it may have ", function->getMaxThreadsPerThreadgroup());
  function->runCommandBlock([&] {
    function->startEncoding();
    unsigned index = 0;
    for (const auto& buffer : buffers)
      function->setArg(index++, buffer);
    function->setArg(index, args);
    function->dispatch(threads, group);
  });
}

at::Tensor matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                  const std::optional<at::Tensor>& biases, const std::optional<at::Tensor>& bias,
                  bool transpose, int64_t group_size, int64_t bits, c10::string_view mode,
                  c10::string_view precision) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  const Precision chosen = check_matmul(x, packed, bias, transpose, precision);
  const auto w = operand(packed);
  auto shape = x.sizes().vec();
  shape.back() = transpose ? packed.out_features : packed.in_features;
  const DType in = dtype_of(x);
  auto y = at::empty(shape, x.options().dtype(torch_dtype(result_dtype(in, w.scales_dtype))));
  if (y.numel() == 0)
    return y;
  const bool has_bias = bias.has_value() && bias->defined();
  if (x.numel() == 0)
    return has_bias ? y.copy_(*bias) : y.zero_();

  const auto rows_in = aligned(x);
  const auto added = has_bias ? bias->contiguous() : w.scales;
  const int32_t bias_dtype = has_bias ? int32_t(dtype_of(added)) : kNoVector;
  const int64_t rows = x.numel() / x.size(-1);
  const auto buffers = {w.weight, w.scales, w.biases, added, rows_in, y};
  if (transpose && rows <= kMaxMatvecRows) {
    run(matvec_key(in, w.scales_dtype, w.bits, w.group_size, int(rows)), buffers,
        MatvecArgs{w.in_features, w.out_features, bias_dtype}, matvec_launch(w.out_features));
  } else {
    run(matmul_key(in, w.scales_dtype, w.bits, w.group_size, rows, transpose,
                   chosen == Precision::exact),
        buffers, MatmulArgs{dimension(rows, "rows"), w.in_features, w.out_features, bias_dtype},
        matmul_launch(rows, shape.back()));
  }
  return y;
}

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                  const std::optional<at::Tensor>& biases, const std::optional<at::Tensor>& bias,
                  int64_t group_size, int64_t bits, c10::string_view mode,
                  c10::string_view precision) {
  check_matvec(x);
  return matmul(x, weight, scales, biases, bias, true, group_size, bits, mode, precision);
}

// Rows of W: those that ids [rows] name, or all of them without ids.
at::Tensor expand(const PackedOperand& w, std::optional<at::ScalarType> dtype,
                  const std::optional<at::Tensor>& ids) {
  const auto rows = dimension(ids ? ids->numel() : w.out_features, "rows");
  auto out = at::empty({rows, w.in_features},
                       w.scales.options().dtype(dtype.value_or(w.scales.scalar_type())));
  if (out.numel() == 0)
    return out;
  const auto make_key = ids ? embedding_key : dequantize_key;
  const uint32_t id_bytes = ids ? uint32_t(ids->element_size()) : 0;
  run(make_key(w.scales_dtype, dtype_of(out), w.bits, w.group_size),
      {w.weight, w.scales, w.biases, ids.value_or(w.weight), out},
      ExpandArgs{rows, w.in_features, w.out_features, id_bytes},
      expand_launch(rows, w.in_features));
  return out;
}

// An id outside the table gives a row of NaN: to raise an error the GPU would have to be waited
// for.
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& weight, const at::Tensor& scales,
                     const std::optional<at::Tensor>& biases, int64_t group_size, int64_t bits,
                     c10::string_view mode, std::optional<at::ScalarType> dtype) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  check_ids(ids, packed);
  check_output_dtype(dtype);
  auto shape = ids.sizes().vec();
  shape.push_back(packed.in_features);
  return expand(operand(packed), dtype, ids.contiguous()).view(shape);
}

at::Tensor dequantize(const at::Tensor& weight, const at::Tensor& scales,
                      const std::optional<at::Tensor>& biases, int64_t group_size, int64_t bits,
                      c10::string_view mode, std::optional<at::ScalarType> dtype) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  check_output_dtype(dtype);
  return expand(operand(packed), dtype, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(const at::Tensor& w, int64_t group_size,
                                                        int64_t bits, c10::string_view mode) {
  check_quantize(w, group_size, bits, mode);
  const int64_t rows = w.size(0), columns = w.size(1), groups = columns / group_size;
  auto weight = at::empty({rows, row_words(columns, bits)}, w.options().dtype(at::kInt));
  auto scales = at::empty({rows, groups}, w.options());
  auto biases = at::empty({rows, groups}, w.options());
  if (rows * groups > 0)
    run(quantize_key(dtype_of(w), int(bits), int(group_size)), {aligned(w), weight, scales, biases},
        QuantizeArgs{dimension(rows * groups, "the number of groups")},
        quantize_launch(rows * groups));
  return {weight, scales, biases};
}

// (kernels, seconds that each took to compile) so far.
std::tuple<std::vector<std::string>, std::vector<double>> metal_compile_log() {
  std::tuple<std::vector<std::string>, std::vector<double>> result;
  for (const auto& entry : compile_log()) {
    std::get<0>(result).push_back(entry.kernels);
    std::get<1>(result).push_back(entry.seconds);
  }
  return result;
}

} // namespace
} // namespace q4metal::mps

TORCH_LIBRARY_IMPL(q4metal, MPS, m) {
  m.impl("matmul", &q4metal::mps::matmul);
  m.impl("matvec", &q4metal::mps::matvec);
  m.impl("embedding", &q4metal::mps::embedding);
  m.impl("dequantize", &q4metal::mps::dequantize);
  m.impl("quantize", &q4metal::mps::quantize);
}

TORCH_LIBRARY_FRAGMENT(q4metal, m) {
  m.def("metal_compile_log() -> (str[], float[])", &q4metal::mps::metal_compile_log);
}
