// torch tensors in, the kernel table's raw pointers out: the CPU backend of torch.ops.q4metal.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../checks.h"
#include "kernels.h"
#include "threads.h"

namespace q4metal::cpu {
namespace {

DType dtype_of(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf       ? DType::f16
         : t.scalar_type() == at::kBFloat16 ? DType::bf16
                                            : DType::f32;
}

// Holds the tensors that a PackedMatrix points into.
struct PackedOperand {
  at::Tensor weight, scales, biases;
  PackedMatrix matrix;
};

PackedOperand operand(const PackedTensors& w) {
  // Checkpoints have scales and biases of one dtype, so this copies nothing there.
  const auto dtype = at::promote_types(w.scales.scalar_type(), w.biases.scalar_type());
  PackedOperand p{
      w.weight.contiguous(), w.scales.to(dtype).contiguous(), w.biases.to(dtype).contiguous(), {}};
  p.matrix = {static_cast<const uint8_t*>(p.weight.const_data_ptr()),
              p.scales.const_data_ptr(),
              p.biases.const_data_ptr(),
              dtype_of(p.scales),
              w.out_features,
              w.in_features,
              w.group_size,
              w.bits};
  return p;
}

// Output features a thread takes at a time. 64 rows of K=4096 are 144 KB, long enough a stream for
// the prefetcher; small matrices are cut finer so that each thread has several pieces.
int64_t piece_size(int64_t total, int threads) {
  return std::clamp<int64_t>(total / (4 * threads) / 4 * 4, 4, 64);
}

// Weights under which waking a thread costs more than it gains (about 2 us of work).
constexpr int64_t kSerialWork = 16384;

int thread_count(const PackedMatrix& w, int64_t rows) {
  return w.out_features * w.in_features * rows < kSerialWork ? 1 : at::get_num_threads();
}

// Memory from torch's allocator, aligned to 64 bytes.
struct Scratch {
  at::Tensor bytes;
  std::byte* data;

  explicit Scratch(size_t size) : bytes(at::empty({int64_t(size + 64)}, at::kByte)) {
    const auto address = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
    data = reinterpret_cast<std::byte*>((address + 63) / 64 * 64);
  }
};

void run_matvec(const MatvecKernel& kernel, const PackedMatrix& w, const float* x, int64_t rows,
                float* y) {
  const Scratch scratch(kernel.prepared_bytes(w, rows));
  std::byte* prepared = scratch.data;
  kernel.prepare(w, x, rows, prepared);
  const int threads = thread_count(w, rows);
  parallel_pieces(
      threads, w.out_features, piece_size(w.out_features, threads),
      [&](int64_t begin, int64_t end) { kernel.run(w, prepared, rows, y, begin, end); });
}

void run_gemm(const GemmKernel& kernel, const PackedMatrix& w, const float* x, int64_t rows,
              float* y) {
  const Scratch scratch(kernel.prepared_bytes(w, rows));
  std::byte* prepared = scratch.data;
  const int threads = thread_count(w, rows);
  parallel_pieces(threads, rows, kRowStep, [&](int64_t first, int64_t last) {
    kernel.prepare(w, x, rows, first, last, prepared);
  });
  parallel_pieces(threads, w.out_features, kernel.piece(w, rows), [&](int64_t begin, int64_t end) {
    kernel.run(w, x, prepared, rows, y, begin, end);
  });
}

at::Tensor matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                  const std::optional<at::Tensor>& biases, const std::optional<at::Tensor>& bias,
                  bool transpose, int64_t group_size, int64_t bits, c10::string_view mode,
                  c10::string_view precision) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  const Precision chosen = check_matmul(x, packed, bias, transpose, precision);
  const auto w = operand(packed);
  const auto result_dtype = at::promote_types(x.scalar_type(), w.scales.scalar_type());
  auto shape = x.sizes().vec();
  shape.back() = transpose ? packed.out_features : packed.in_features;

  const auto rows_in = x.to(at::kFloat).reshape({-1, x.size(-1)}).contiguous();
  const int64_t rows = x.size(-1) == 0 ? 0 : rows_in.size(0);
  auto y = at::empty({rows, shape.back()}, x.options().dtype(at::kFloat));
  if (rows > 0) {
    const auto& table = kernels();
    const auto* in = rows_in.const_data_ptr<float>();
    auto* out = y.mutable_data_ptr<float>();
    if (!transpose) {
      const int threads = thread_count(w.matrix, rows);
      // Few wide pieces: each walks all rows of W.
      const int64_t steps = (packed.in_features + kColumnStep - 1) / kColumnStep;
      const int64_t piece = std::clamp<int64_t>(steps / threads, 1, 4) * kColumnStep;
      parallel_pieces(threads, packed.in_features, piece, [&](int64_t begin, int64_t end) {
        table.gemm_transposed(w.matrix, in, rows, out, begin, end);
      });
    } else if (rows <= kMaxMatvecRows) {
      run_matvec(table.matvec(chosen), w.matrix, in, rows, out);
    } else {
      run_gemm(table.gemm(chosen), w.matrix, in, rows, out);
    }
    if (bias.has_value() && bias->defined())
      y.add_(bias->to(at::kFloat));
  }
  return y.to(result_dtype).view(shape);
}

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scales,
                  const std::optional<at::Tensor>& biases, const std::optional<at::Tensor>& bias,
                  int64_t group_size, int64_t bits, c10::string_view mode,
                  c10::string_view precision) {
  check_matvec(x);
  return matmul(x, weight, scales, biases, bias, true, group_size, bits, mode, precision);
}

at::Tensor dequantize_rows(const PackedOperand& w, std::optional<at::ScalarType> dtype,
                           const int64_t* ids, int64_t count) {
  auto out = at::empty({count, w.matrix.in_features},
                       w.scales.options().dtype(dtype.value_or(w.scales.scalar_type())));
  const DType out_dtype = dtype_of(out);
  auto* data = static_cast<std::byte*>(out.mutable_data_ptr());
  const int64_t stride = w.matrix.in_features * out.element_size();
  const int threads = count * w.matrix.in_features < kSerialWork ? 1 : at::get_num_threads();
  parallel_pieces(threads, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dequantize_row(w.matrix, ids == nullptr ? i : ids[i], out_dtype, data + i * stride);
  });
  return out;
}

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& weight, const at::Tensor& scales,
                     const std::optional<at::Tensor>& biases, int64_t group_size, int64_t bits,
                     c10::string_view mode, std::optional<at::ScalarType> dtype) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  check_ids(ids, packed);
  check_output_dtype(dtype);
  const auto w = operand(packed);
  const auto rows = ids.to(at::kLong).contiguous();
  const auto* values = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i)
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < packed.out_features, "ids holds ", values[i],
                      "; the embedding has rows 0 to ", packed.out_features - 1);
  auto shape = ids.sizes().vec();
  shape.push_back(packed.in_features);
  return dequantize_rows(w, dtype, values, rows.numel()).view(shape);
}

at::Tensor dequantize(const at::Tensor& weight, const at::Tensor& scales,
                      const std::optional<at::Tensor>& biases, int64_t group_size, int64_t bits,
                      c10::string_view mode, std::optional<at::ScalarType> dtype) {
  const auto packed = check_packed(weight, scales, biases, group_size, bits, mode);
  check_output_dtype(dtype);
  return dequantize_rows(operand(packed), dtype, nullptr, packed.out_features);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(const at::Tensor& w, int64_t group_size,
                                                        int64_t bits, c10::string_view mode) {
  check_quantize(w, group_size, bits, mode);
  const auto dense = w.contiguous();
  const int64_t rows = dense.size(0), columns = dense.size(1), groups = columns / group_size;
  auto weight = at::empty({rows, row_words(columns, bits)}, w.options().dtype(at::kInt));
  auto scales = at::empty({rows, groups}, w.options());
  auto biases = at::empty({rows, groups}, w.options());
  const auto* in = static_cast<const std::byte*>(dense.const_data_ptr());
  auto* words = reinterpret_cast<uint32_t*>(weight.mutable_data_ptr<int32_t>());
  auto* scale = static_cast<std::byte*>(scales.mutable_data_ptr());
  auto* bias = static_cast<std::byte*>(biases.mutable_data_ptr());
  const int64_t size = dense.element_size();
  const int threads = rows * columns < kSerialWork ? 1 : at::get_num_threads();
  parallel_pieces(threads, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      quantize_row(in + r * columns * size, dtype_of(dense), columns, int(group_size), int(bits),
                   words + r * row_words(columns, bits), scale + r * groups * size,
                   bias + r * groups * size);
  });
  return {weight, scales, biases};
}

} // namespace
} // namespace q4metal::cpu

TORCH_LIBRARY_IMPL(q4metal, CPU, m) {
  m.impl("matmul", &q4metal::cpu::matmul);
  m.impl("matvec", &q4metal::cpu::matvec);
  m.impl("embedding", &q4metal::cpu::embedding);
  m.impl("dequantize", &q4metal::cpu::dequantize);
  m.impl("quantize", &q4metal::cpu::quantize);
}
