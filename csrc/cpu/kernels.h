// The table of CPU kernels: raw pointers, no torch. One file per instruction set fills in a table
// (ref.cpp, avx2.cpp); dispatch.cpp picks one at run time. Kernels read packed weights in place and
// work on a range of rows or columns; threads.h shares ranges out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "../matrix.h"
#include "../precision.h"

// For the pieces of inner loops: left to itself the compiler called some of them (and vectors of 32
// bytes passed between functions have an ABI that depends on the target).
#define Q4_INLINE inline __attribute__((always_inline))

namespace q4metal::cpu {

// A product of 1 to kMaxMatvecRows rows of x with W^T. `prepare` puts x into the order that suits
// the instruction set, once per call; `run` then computes output features [begin, end) for all
// rows.
struct MatvecKernel {
  // Bytes that `prepare` writes for `rows` rows.
  size_t (*prepared_bytes)(const PackedMatrix& w, int64_t rows);
  // x [rows, K], contiguous. `prepared` is aligned to 64 bytes.
  void (*prepare)(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared);
  // y [rows, N]. A row's result does not depend on `rows`.
  void (*run)(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
              int64_t begin, int64_t end);
};

constexpr int64_t kMaxMatvecRows = 8;

// Output features of a GEMM: whole tiles of every instruction set, and 512 rows of them are 128 KB,
// which stay in the L2 cache for what follows the product.
constexpr int64_t kGemmPiece = 64;

// A product of any number of rows of x with W^T, in the same two steps.
struct GemmKernel {
  // Bytes that `prepare` writes for `rows` rows; may be 0.
  size_t (*prepared_bytes)(const PackedMatrix& w, int64_t rows);
  // Prepares rows [first, last) of x [rows, K]. Disjoint ranges may be prepared on several threads;
  // first is a multiple of kRowStep, and so is last unless it is `rows`.
  void (*prepare)(const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
                  std::byte* prepared);
  // y[:, begin:end); y [rows, N]. A row does not depend on `rows`, nor a column on begin and end.
  void (*run)(const PackedMatrix& w, const float* x, const std::byte* prepared, int64_t rows,
              float* y, int64_t begin, int64_t end);
  // Output features that a thread should take at a time.
  int64_t (*piece)(const PackedMatrix& w, int64_t rows) = [](const PackedMatrix&, int64_t) {
    return kGemmPiece;
  };
};

constexpr int64_t kRowStep = 32;

// One stretch of the context for the query heads that share a KV head.
struct AttentionSplit {
  static constexpr int kBlockPositions = 32;

  const float* query; // [queries, head_dim]
  int64_t queries;
  int64_t head_dim;
  int64_t begin, end; // positions; begin is the first of a block
  float scale;
  DType dtype; // of keys and values
  const void* context;
  const void* (*key_block)(const void* context, int64_t block); // [32, head_dim] of this KV head
  const void* (*value_block)(const void* context, int64_t block);
  float* out; // [queries, head_dim + 2]: weighted values, maximum, sum
};

// Consecutive rows of a prompt for the query heads that share a KV head. Every row attends to all
// positions up to its own.
struct AttentionRows {
  float* queries; // [rows, heads, head_dim], rows `stride` floats apart; the results replace them
  int64_t stride;
  int64_t rows, heads, head_dim;
  int64_t first; // position of the first row
  float scale;
  DType dtype; // of keys and values
  const void* context;
  const void* (*key_block)(const void* context, int64_t block);
  const void* (*value_block)(const void* context, int64_t block);
  float* scratch; // scratch_floats(...)

  static constexpr int64_t kMostLanes = 32; // queries that go together on any machine

  static int64_t scratch_floats(int64_t rows, int64_t heads, int64_t head_dim) {
    const int64_t queries = (rows * heads + kMostLanes - 1) / kMostLanes * kMostLanes;
    constexpr int64_t kAlignment = 16; // a kernel may begin on the next cache line
    return 2 * AttentionSplit::kBlockPositions * head_dim + queries * (2 * head_dim + 2) +
           kAlignment;
  }
};

// What a decode plan computes beside packed matrices (vector_kernels.h), float32.
struct VectorKernels {
  // out = gamma * x; returns 1 / sqrt(mean(x^2) + eps).
  float (*norm_gamma)(const float* x, const float* gamma, int64_t n, float eps, float* out);
  // x *= factor; out += x.
  void (*scale)(float* x, float factor, int64_t n);
  void (*add)(const float* x, int64_t n, float* out);
  // Rotates a head; cos and signed sin have `dim` values. `out` may be `head`.
  void (*rope)(const float* head, const float* cos, const float* sin, int64_t dim, float* out);
  // out = silu(gate) * up. `out` may be `gate`.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // The sum of e^((x - most) / temperature); no x is above `most`.
  float (*sum_exp)(const float* x, int64_t n, float most, float temperature);
  // Rounds to `dtype`.
  void (*narrow)(const float* x, int64_t n, DType dtype, void* out);
  // y[:, begin:end) = x W[begin:end, :]^T of a dense matrix; y [rows, N].
  void (*dense_matvec)(const DenseMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                       int64_t end);
  void (*attention_split)(const AttentionSplit& split);
  void (*attention_rows)(const AttentionRows& rows);
  // The same for fast and int8: factors may be rounded to 16 bits.
  void (*fast_attention_rows)(const AttentionRows& rows);
  // Joins partial results `stride` floats apart, in their order, to out [dim].
  void (*attention_combine)(const float* partial, int64_t splits, int64_t stride, int64_t dim,
                            float* out);
};

struct KernelTable {
  const char* name;                    // the value of Q4METAL_CPU
  MatvecKernel matvec_of[kPrecisions]; // indexed by Precision
  GemmKernel gemm_of[kPrecisions];
  // y[:, begin:end) = x W[:, begin:end); x [rows, N], y [rows, K]. begin and end are multiples of
  // kColumnStep, or end is K.
  void (*gemm_transposed)(const PackedMatrix& w, const float* x, int64_t rows, float* y,
                          int64_t begin, int64_t end);
  VectorKernels vector;

  const MatvecKernel& matvec(Precision p) const { return matvec_of[int(p)]; }
  const GemmKernel& gemm(Precision p) const { return gemm_of[int(p)]; }
};

constexpr int64_t kColumnStep = 128; // whole groups of every size

// The portable table, and those that this build has. A table is only for a CPU that supports it.
extern const KernelTable ref_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels;
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
#endif

// One sentence: Q4METAL_CPU names kernels that are not there. InstructionSetError in Python.
struct UnknownKernels : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The table in use: Q4METAL_CPU if it is set, else the best that the CPU supports. Throws
// UnknownKernels.
const KernelTable& kernels();

// Codes [first, first + 32) of a row as floats; first is a multiple of 32.
void unpack_run(const uint8_t* row, int bits, int64_t first, float* codes);

// Rows [begin, end) of W as `out` (contiguous, K columns), rounded as MLX's CPU backend rounds:
// where `out_dtype` is the scales' dtype, the product and the sum are each rounded to it; else in
// float32 and rounded once.
void dequantize_row(const PackedMatrix& w, int64_t row, DType out_dtype, void* out);

// One row of K values of `dtype` to packed words, scales and biases, with MLX's numbers.
void quantize_row(const void* values, DType dtype, int64_t in_features, int group_size, int bits,
                  uint32_t* weight, void* scales, void* biases);

} // namespace q4metal::cpu
