#include <algorithm>
#include <limits>

#include "checks.h"

namespace q4metal::cpu::tests {
namespace {

// Root of the sum of squared errors over that of squares.
double relative_error(const float* got, const double* wanted, int64_t count) {
  double errors = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    errors += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    squares += wanted[i] * wanted[i];
  }
  return std::sqrt(errors / squares);
}

constexpr double kBound = 1e-6;
constexpr double kFastBound = 2e-5; // of attention with factors of 16 bits: 2^-16 and a little more

Floats normal(int64_t count, Random& random) {
  Floats x = floats(count);
  for (int64_t i = 0; i < count; ++i)
    x[i] = float(random.normal());
  return x;
}

std::string sized(const char* what, int64_t size) {
  return std::string(what) + " of " + std::to_string(size);
}

void check_norm(const VectorKernels& kernels, int64_t size, Random& random, Report& report) {
  const Floats x = normal(size, random), gamma = normal(size, random);
  Floats out = floats(size);
  constexpr float kEps = 1e-5f;
  const float inverse = kernels.norm_gamma(x.get(), gamma.get(), size, kEps, out.get());
  std::vector<double> wanted(size);
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) {
    squares += double(x[i]) * x[i];
    wanted[i] = double(x[i]) * gamma[i];
  }
  const double wanted_inverse = 1 / std::sqrt(squares / double(size) + kEps);
  report.check(std::fabs(inverse / wanted_inverse - 1) <= kBound &&
                   relative_error(out.get(), wanted.data(), size) <= kBound,
               sized("norm_gamma", size));
}

void check_rope(const VectorKernels& kernels, int64_t dim, Random& random, Report& report) {
  Floats head = normal(dim, random);
  const Floats cos = normal(dim, random), sin = normal(dim, random);
  std::vector<double> wanted(dim);
  for (int64_t i = 0; i < dim; ++i)
    wanted[i] = double(head[i]) * cos[i] + double(head[(i + dim / 2) % dim]) * sin[i];
  kernels.rope(head.get(), cos.get(), sin.get(), dim, head.get());
  report.check(relative_error(head.get(), wanted.data(), dim) <= kBound, sized("rope", dim));
}

void check_swiglu(const VectorKernels& kernels, int64_t size, Random& random, Report& report) {
  Floats gate = normal(size, random);
  const Floats up = normal(size, random);
  for (int64_t i = 0; i < size; ++i)
    gate[i] *= i % 5 == 0 ? 40.0f : 3.0f; // far into both ends of the sigmoid
  std::vector<double> wanted(size);
  for (int64_t i = 0; i < size; ++i)
    wanted[i] = gate[i] / (1 + std::exp(-double(gate[i]))) * up[i];
  kernels.swiglu(gate.get(), up.get(), size, gate.get());
  report.check(relative_error(gate.get(), wanted.data(), size) <= kBound, sized("swiglu", size));
}

void check_sum_exp(const VectorKernels& kernels, int64_t size, Random& random, Report& report) {
  for (const float temperature : {1.0f, 0.7f, 0.05f}) {
    const Floats x = normal(size, random);
    const float most = *std::max_element(x.get(), x.get() + size);
    double wanted = 0;
    for (int64_t i = 0; i < size; ++i)
      wanted += std::exp((double(x[i]) - most) / temperature);
    const float got = kernels.sum_exp(x.get(), size, most, temperature);
    // Of the quotient's rounding e^x makes as much more as it is large.
    report.check(std::fabs(got / wanted - 1) <= 1e-5, sized("sum_exp", size));
  }
}

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

// `values` rounded to `dtype`, the values of which are written back.
Bytes narrowed(float* values, int64_t count, DType dtype) {
  Bytes bytes(count * size_of(dtype), 0);
  for (int64_t i = 0; i < count; ++i) {
    store_narrowed(values[i], dtype, bytes.data() + i * size_of(dtype));
    values[i] = widen_at(bytes.data(), dtype, i);
  }
  return bytes;
}

void check_narrow(const VectorKernels& kernels, DType dtype, int64_t size, Random& random,
                  Report& report) {
  Floats x = normal(size, random);
  for (int64_t i = 0; i < size; ++i) // subnormal and too large for either dtype, too
    x[i] = i % 11 == 5 ? std::numeric_limits<float>::infinity()
                       : std::ldexp(x[i], int(i * 37 % 290) - 150);
  Bytes got(size * size_of(dtype), 0);
  kernels.narrow(x.get(), size, dtype, got.data());
  const Bytes wanted = narrowed(x.get(), size, dtype);
  report.check(std::memcmp(got.data(), wanted.data(), size * size_of(dtype)) == 0,
               sized("narrow", size));

  x[size - 1] = std::numeric_limits<float>::quiet_NaN();
  kernels.narrow(x.get(), size, dtype, got.data());
  report.check(std::isnan(widen_at(got.data(), dtype, size - 1)), sized("narrow NaN", size));
}

void check_scale_and_add(const VectorKernels& kernels, int64_t size, Random& random,
                         Report& report) {
  const Floats x = normal(size, random);
  Floats got = normal(size, random), wanted = floats(size);
  for (int64_t i = 0; i < size; ++i)
    wanted[i] = got[i] * 0.3f + x[i];
  kernels.scale(got.get(), 0.3f, size);
  kernels.add(x.get(), size, got.get());
  report.check(same_bits(got.get(), wanted.get(), size), sized("scale and add", size));
}

void check_dense(const VectorKernels& kernels, DType dtype, int64_t columns, Random& random,
                 Report& report) {
  constexpr int64_t kFeatures = 7, kRows = 3;
  Floats w = normal(kFeatures * columns, random);
  const Floats x = normal(kRows * columns, random);
  const Bytes weight = narrowed(w.get(), kFeatures * columns, dtype);
  std::vector<double> wanted(kRows * kFeatures);
  for (int64_t m = 0; m < kRows; ++m)
    for (int64_t n = 0; n < kFeatures; ++n)
      for (int64_t k = 0; k < columns; ++k)
        wanted[m * kFeatures + n] += double(x[m * columns + k]) * w[n * columns + k];
  const DenseMatrix matrix{weight.data(), dtype, kFeatures, columns};
  Floats y = floats(kRows * kFeatures), pieces = floats(kRows * kFeatures);
  kernels.dense_matvec(matrix, x.get(), kRows, y.get(), 0, kFeatures);
  kernels.dense_matvec(matrix, x.get(), kRows, pieces.get(), 3, kFeatures);
  kernels.dense_matvec(matrix, x.get(), kRows, pieces.get(), 0, 3);
  const std::string name = sized("dense_matvec", columns);
  report.check(relative_error(y.get(), wanted.data(), kRows * kFeatures) <= kBound, name);
  report.check(same_bits(y.get(), pieces.get(), kRows * kFeatures), name + " in pieces");
  Floats alone = floats(kFeatures);
  kernels.dense_matvec(matrix, x.get() + 2 * columns, 1, alone.get(), 0, kFeatures);
  report.check(same_bits(y.get() + 2 * kFeatures, alone.get(), kFeatures), name + ", one row");
}

// Keys and values of one KV head in blocks, as the cache has them. Positions of the last block that
// nothing was written to hold NaN.
struct Context {
  std::vector<Bytes> keys, values;
  std::vector<Floats> wide_keys, wide_values; // what they hold

  Context(DType dtype, int64_t positions, int64_t dim, Random& random) {
    constexpr int64_t kBlock = AttentionSplit::kBlockPositions;
    for (int64_t first = 0; first < positions; first += kBlock) {
      for (auto* to : {&wide_keys, &wide_values}) {
        to->push_back(normal(kBlock * dim, random));
        const int64_t written = std::min(kBlock, positions - first);
        std::fill(to->back().get() + written * dim, to->back().get() + kBlock * dim,
                  std::numeric_limits<float>::quiet_NaN());
      }
      keys.push_back(narrowed(wide_keys.back().get(), kBlock * dim, dtype));
      values.push_back(narrowed(wide_values.back().get(), kBlock * dim, dtype));
    }
  }

  // Softmax attention of one query to the first `positions`, added to `out` [dim].
  void attend(const float* query, int64_t positions, int64_t dim, double scale, double* out) const {
    constexpr int64_t kBlock = AttentionSplit::kBlockPositions;
    std::vector<double> weights(positions);
    double total = 0;
    for (int64_t p = 0; p < positions; ++p) {
      double score = 0;
      for (int64_t i = 0; i < dim; ++i)
        score += double(query[i]) * wide_keys[p / kBlock][p % kBlock * dim + i];
      total += weights[p] = std::exp(score * scale);
    }
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t i = 0; i < dim; ++i)
        out[i] += weights[p] / total * wide_values[p / kBlock][p % kBlock * dim + i];
  }

  static const void* key_block(const void* context, int64_t block) {
    return static_cast<const Context*>(context)->keys[block].data();
  }
  static const void* value_block(const void* context, int64_t block) {
    return static_cast<const Context*>(context)->values[block].data();
  }
};

struct AttentionShape {
  DType dtype;
  int64_t queries, dim, positions;
  int splits;
};

void check_attention(const VectorKernels& kernels, const AttentionShape& s, Random& random,
                     Report& report) {
  constexpr int64_t kBlock = AttentionSplit::kBlockPositions;
  const int64_t blocks = (s.positions + kBlock - 1) / kBlock, dim = s.dim;
  const Context context(s.dtype, s.positions, dim, random);
  const Floats query = normal(s.queries * dim, random);
  const float scale = 1.5f / std::sqrt(float(dim));
  std::vector<double> wanted(s.queries * dim);
  for (int64_t q = 0; q < s.queries; ++q)
    context.attend(query.get() + q * dim, s.positions, dim, scale, wanted.data() + q * dim);

  const int64_t stride = s.queries * (dim + 2);
  Floats partial = floats(s.splits * stride);
  const int64_t per_split = (blocks + s.splits - 1) / s.splits * kBlock;
  int splits = 0;
  for (int64_t begin = 0; begin < s.positions; begin += per_split, ++splits)
    kernels.attention_split({query.get(), s.queries, dim, begin,
                             std::min(begin + per_split, s.positions), scale, s.dtype, &context,
                             Context::key_block, Context::value_block,
                             partial.get() + splits * stride});
  Floats out = floats(s.queries * dim);
  for (int64_t q = 0; q < s.queries; ++q)
    kernels.attention_combine(partial.get() + q * (dim + 2), splits, stride, dim,
                              out.get() + q * dim);
  const double error = relative_error(out.get(), wanted.data(), s.queries * dim);
  report.check(error <= 2 * kBound, "attention of " + std::to_string(s.positions) +
                                        " positions, dim " + std::to_string(dim) + ": error " +
                                        number(error));
}

// Rows of a prompt that begin at position `first`: against float64, and a row alone.
void check_prompt_attention(void (*attend)(const AttentionRows&), double bound, DType dtype,
                            int64_t first, int64_t rows, int64_t heads, int64_t dim, Random& random,
                            Report& report) {
  const int64_t stride = (heads + 1) * dim, positions = first + rows; // a head of another KV head
  const Context context(dtype, positions, dim, random);
  const Floats queries = normal(rows * stride, random);
  const float scale = 1.5f / std::sqrt(float(dim));
  const auto run = [&](int64_t from, int64_t count) {
    Floats x = floats(count * stride - dim);
    std::copy_n(queries.get() + from * stride, count * stride - dim, x.get());
    Floats scratch = floats(AttentionRows::scratch_floats(count, heads, dim));
    attend({x.get(), stride, count, heads, dim, first + from, scale, dtype, &context,
            Context::key_block, Context::value_block, scratch.get()});
    return x;
  };
  const Floats got = run(0, rows);
  std::vector<double> wanted(got.get(), got.get() + rows * stride - dim);
  bool untouched = true;
  for (int64_t m = 0; m < rows; ++m) {
    std::fill_n(&wanted[m * stride], heads * dim, 0.0);
    for (int64_t h = 0; h < heads; ++h)
      context.attend(queries.get() + m * stride + h * dim, first + m + 1, dim, scale,
                     &wanted[m * stride + h * dim]);
    for (int64_t i = heads * dim; m + 1 < rows && i < stride; ++i)
      untouched &= got[m * stride + i] == queries[m * stride + i];
  }
  const std::string name = "attention of " + std::to_string(rows) + " rows from " +
                           std::to_string(first) + ", dim " + std::to_string(dim);
  const double error = relative_error(got.get(), wanted.data(), rows * stride - dim);
  report.check(error <= bound, name + ": error " + number(error));
  report.check(untouched, name + ": writes to another head");
  const Floats alone = run(rows - 1, 1);
  report.check(same_bits(alone.get(), got.get() + (rows - 1) * stride, heads * dim),
               name + ": the last alone differs");
}

} // namespace

void check_vector_kernels(const KernelTable& table, Report& report) {
  const VectorKernels& kernels = table.vector;
  Random random(3);
  for (const int64_t size : {1, 7, 8, 31, 33, 64, 576, 896}) {
    check_norm(kernels, size, random, report);
    check_swiglu(kernels, size, random, report);
    check_sum_exp(kernels, size, random, report);
    check_scale_and_add(kernels, size, random, report);
    for (const DType dtype : kDTypes) {
      check_narrow(kernels, dtype, size, random, report);
      check_dense(kernels, dtype, size, random, report);
    }
  }
  for (const int64_t dim : {2, 64, 80, 128})
    check_rope(kernels, dim, random, report);
  for (const DType dtype : kDTypes)
    for (const int64_t positions : {1, 31, 32, 33, 100})
      for (const int64_t dim : {64, 80, 128})
        check_attention(kernels,
                        {dtype, 1 + int64_t(random.below(7)), dim, positions, 1 + random.below(3)},
                        random, report);
  for (const DType dtype : kDTypes)
    for (const int64_t first : {0, 31, 64})
      for (const int64_t dim : {64, 80, 128}) {
        const int64_t rows = 1 + random.below(40), heads = 1 + random.below(7);
        check_prompt_attention(kernels.attention_rows, 2 * kBound, dtype, first, rows, heads, dim,
                               random, report);
        check_prompt_attention(kernels.fast_attention_rows, kFastBound, dtype, first, rows, heads,
                               dim, random, report);
      }
  ++report.cases;
}

} // namespace q4metal::cpu::tests
