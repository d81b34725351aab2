#include <algorithm>
#include <functional>

#include "checks.h"

namespace q4metal::cpu::tests {
namespace {

constexpr Precision kAll[] = {Precision::exact, Precision::fast, Precision::int8};

// Relative rms errors that each precision promises.
double matvec_bound(Precision p) {
  return p == Precision::exact ? 1e-6 : p == Precision::fast ? 1e-4 : 3e-2;
}
double gemm_bound(Precision p) {
  return p == Precision::exact ? 1e-6 : p == Precision::fast ? 3e-3 : 3e-2;
}

// An rms over few results scatters: three standard deviations of it.
double scatter(int64_t results) { return 1 + 3 / std::sqrt(2.0 * double(results)); }

// Where the order of split.h is kept, a block that is not finite makes its row NaN; elsewhere
// infinity may stay infinity.
bool gives_nan(Precision p, bool matvec) { return matvec && p != Precision::exact; }

// A product with W^T in float64 and the scale of its errors.
struct Wanted {
  std::unique_ptr<double[]> y; // [rows, N]
  double magnitude = 0;        // sum of squares that random signs would give y

  Wanted(const Operand& w, const float* x, int64_t rows)
      : y(new double[rows * w.matrix.out_features]) {
    const int64_t columns = w.matrix.in_features;
    double results = 0;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < w.matrix.out_features; ++n) {
        const double* row = w.dense.get() + n * columns;
        double sum = 0, squares = 0;
        for (int64_t k = 0; k < columns; ++k) {
          const double product = double(x[m * columns + k]) * row[k];
          sum += product;
          squares += product * product;
        }
        y[m * w.matrix.out_features + n] = sum;
        results += sum * sum;
        magnitude += squares;
      }
    // One result may happen to be near zero, so its own size says little about its error.
    magnitude = std::max(magnitude, results);
  }

  double error_of(const float* got, int64_t count) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum += (got[i] - y[i]) * (got[i] - y[i]);
    return std::sqrt(sum / magnitude);
  }
};

constexpr float kUntouched = -12345.0f;

Floats untouched(int64_t count) {
  Floats y = floats(count);
  std::fill(y.get(), y.get() + count, kUntouched);
  return y;
}

// run(rows of x, y, begin, end): a matvec or a GEMM of one operand, prepared by `prepare`.
struct Product {
  std::function<void(const float* x, int64_t rows, float* y,
                     const std::vector<std::pair<int64_t, int64_t>>& ranges)>
      run;
  int64_t columns, features;

  Floats whole(const float* x, int64_t rows) const {
    Floats y = untouched(rows * features);
    run(x, rows, y.get(), {{0, features}});
    return y;
  }
};

Product matvec_product(const MatvecKernel& kernel, const PackedMatrix& w) {
  return {[&kernel, w](const float* x, int64_t rows, float* y, const auto& ranges) {
            const Prepared prepared(kernel.prepared_bytes(w, rows));
            kernel.prepare(w, x, rows, prepared.data());
            for (const auto& [begin, end] : ranges)
              kernel.run(w, prepared.data(), rows, y, begin, end);
          },
          w.in_features, w.out_features};
}

// Prepared in ranges, the last first, as threads might.
Product gemm_product(const GemmKernel& kernel, const PackedMatrix& w, bool in_ranges) {
  return {[&kernel, w, in_ranges](const float* x, int64_t rows, float* y, const auto& ranges) {
            const Prepared prepared(kernel.prepared_bytes(w, rows));
            const int64_t step = in_ranges ? kRowStep : rows;
            for (int64_t first = (rows - 1) / step * step; first >= 0; first -= step)
              kernel.prepare(w, x, rows, first, std::min(first + step, rows), prepared.data());
            for (const auto& [begin, end] : ranges)
              kernel.run(w, x, prepared.data(), rows, y, begin, end);
          },
          w.in_features, w.out_features};
}

// Ranges of [0, size) that meet at random places.
std::vector<std::pair<int64_t, int64_t>> random_ranges(int64_t size, Random& random) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t begin = 0; begin < size;) {
    const int64_t end = std::min<int64_t>(size, begin + 1 + random.below(random.below(2) ? 5 : 50));
    ranges.emplace_back(begin, end);
    begin = end;
  }
  std::reverse(ranges.begin(), ranges.end());
  return ranges;
}

void check_ranges(const Product& product, const float* x, int64_t rows, const float* whole,
                  const std::string& name, Random& random, Report& report) {
  const int64_t features = product.features;
  Floats y = untouched(rows * features);
  product.run(x, rows, y.get(), random_ranges(features, random));
  report.check(same_bits(y.get(), whole, rows * features), name + ": pieces differ from the whole");

  const int64_t begin = random.below(int(features)),
                end = begin + 1 + random.below(int(features - begin));
  y = untouched(rows * features);
  product.run(x, rows, y.get(), {{begin, end}});
  bool inside = true, outside = true;
  for (int64_t i = 0; i < rows * features; ++i) {
    const bool in_range = i % features >= begin && i % features < end;
    (in_range ? inside : outside) &= same_bits(y[i], in_range ? whole[i] : kUntouched);
  }
  const std::string range = " [" + std::to_string(begin) + ", " + std::to_string(end) + ")";
  report.check(inside, name + range + ": differs from the whole");
  report.check(outside, name + range + ": writes outside of its range");
}

// The last `fewer` of `rows` rows alone.
void check_fewer_rows(const Product& product, const float* x, int64_t rows, int64_t fewer,
                      const float* whole, const std::string& name, Report& report) {
  Floats part = floats(fewer * product.columns);
  std::copy_n(x + (rows - fewer) * product.columns, fewer * product.columns, part.get());
  const Floats y = product.whole(part.get(), fewer);
  report.check(
      same_bits(y.get(), whole + (rows - fewer) * product.features, fewer * product.features),
      name + ": " + std::to_string(fewer) + " rows alone differ");
}

// Row 1 gets a NaN, row 2 an infinity, row 3 zeros; row 0 stays as it is.
void check_special_rows(const Product& product, const float* x, int64_t rows, const float* whole,
                        bool nan_wanted, const std::string& name, Random& random, Report& report) {
  const int64_t columns = product.columns, features = product.features;
  Floats special = floats(rows * columns);
  std::copy_n(x, rows * columns, special.get());
  special[columns + random.below(int(columns))] = std::numeric_limits<float>::quiet_NaN();
  special[2 * columns + random.below(int(columns))] =
      std::numeric_limits<float>::infinity() * (random.below(2) ? 1 : -1);
  std::fill_n(special.get() + 3 * columns, columns, 0.0f);
  const Floats y = product.whole(special.get(), rows);
  bool nan = true, not_finite = true, zero = true;
  for (int64_t n = 0; n < features; ++n) {
    nan &= std::isnan(y[features + n]);
    not_finite &=
        !std::isfinite(y[2 * features + n]) && (!nan_wanted || std::isnan(y[2 * features + n]));
    zero &= y[3 * features + n] == 0.0f;
  }
  report.check(nan, name + ": a row with a NaN is not NaN");
  report.check(not_finite,
               name + ": a row with an infinity is " + (nan_wanted ? "not NaN" : "finite"));
  report.check(zero, name + ": a row of zeros is not 0");
  report.check(same_bits(y.get(), whole, features), name + ": NaN reaches another row");
}

std::string numbered(const char* kind, Precision p, int64_t rows) {
  return std::string(kind) + " " + name_of(p) + " rows " + std::to_string(rows);
}

void check_matvec(const KernelTable& table, const Operand& w, int64_t rows,
                  const std::string& where, Random& random, Report& report) {
  const PackedMatrix& m = w.matrix;
  const Floats x = activations(rows * m.in_features, random);
  const Wanted wanted(w, x.get(), rows);
  for (const Precision p : kAll) {
    const std::string name = where + numbered("matvec", p, rows);
    const Product product = matvec_product(table.matvec(p), m);
    const Floats y = product.whole(x.get(), rows);
    const double error = wanted.error_of(y.get(), rows * m.out_features);
    report.check(error <= matvec_bound(p) * scatter(rows * m.out_features),
                 name + ": error " + number(error));
    if (p != Precision::exact) {
      const Floats same = matvec_product(ref_kernels.matvec(p), m).whole(x.get(), rows);
      report.check(same_bits(y.get(), same.get(), rows * m.out_features),
                   name + ": bits differ from ref");
    }
    check_ranges(product, x.get(), rows, y.get(), name, random, report);
    check_fewer_rows(product, x.get(), rows, 1, y.get(), name, report);
    check_fewer_rows(product, x.get(), rows, (rows + 1) / 2, y.get(), name, report);
    if (rows >= 4)
      check_special_rows(product, x.get(), rows, y.get(), gives_nan(p, true), name, random, report);
  }
}

void check_gemm(const KernelTable& table, const Operand& w, int64_t rows, const std::string& where,
                Random& random, Report& report) {
  const PackedMatrix& m = w.matrix;
  const Floats x = activations(rows * m.in_features, random);
  const Wanted wanted(w, x.get(), rows);
  for (const Precision p : kAll) {
    const std::string name = where + numbered("gemm", p, rows);
    const Product product = gemm_product(table.gemm(p), m, false);
    const Floats y = product.whole(x.get(), rows);
    const double error = wanted.error_of(y.get(), rows * m.out_features);
    // One x in 100 is an outlier and carries nearly all of the error; what its own rounding to
    // bfloat16 costs, all features share.
    const int64_t outliers = std::max<int64_t>(rows * m.in_features / 100, 1);
    report.check(error <= gemm_bound(p) * scatter(std::min(outliers, rows * m.out_features)),
                 name + ": error " + number(error));
    check_ranges(gemm_product(table.gemm(p), m, true), x.get(), rows, y.get(), name, random,
                 report);
    if (rows > 9)
      check_fewer_rows(product, x.get(), rows, 9 + random.below(int(rows - 9)), y.get(), name,
                       report);
    check_special_rows(product, x.get(), rows, y.get(), gives_nan(p, false), name, random, report);
  }
}

void check_transposed(const KernelTable& table, const Operand& w, int64_t rows,
                      const std::string& where, Random& random, Report& report) {
  const int64_t columns = w.matrix.in_features, features = w.matrix.out_features;
  const Floats x = activations(rows * features, random);
  Floats y = untouched(rows * columns);
  table.gemm_transposed(w.matrix, x.get(), rows, y.get(), 0, columns);
  double errors = 0, magnitude = 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < columns; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < features; ++n) {
        const double product = double(x[m * features + n]) * w.dense[n * columns + k];
        sum += product;
        magnitude += product * product;
      }
      errors += (y[m * columns + k] - sum) * (y[m * columns + k] - sum);
    }
  const std::string name = where + "transposed rows " + std::to_string(rows);
  const double error = std::sqrt(errors / magnitude);
  report.check(error <= 1e-6, name + ": error " + number(error));

  Floats pieces = untouched(rows * columns);
  for (int64_t end = columns; end > 0;) {
    const int64_t begin = (end - 1) / kColumnStep * kColumnStep;
    table.gemm_transposed(w.matrix, x.get(), rows, pieces.get(), begin, end);
    end = begin;
  }
  report.check(same_bits(y.get(), pieces.get(), rows * columns),
               name + ": pieces differ from the whole");
}

} // namespace

void check_products(const KernelTable& table, const Case& c, uint32_t seed, Report& report) {
  Random random(seed);
  const std::string where = name_of(c.shape) + ": ";
  const Operand w(c.shape, random, 1 + 2 * random.below(2));
  check_matvec(table, w, c.matvec_rows, where, random, report);
  check_gemm(table, w, c.gemm_rows, where, random, report);
  check_transposed(table, w, c.matvec_rows, where, random, report);
  ++report.cases;
}

void check_largest_sums(const KernelTable& table, Report& report) {
  // The integers that rows of x become: all the largest, and those whose high and low bytes are.
  static constexpr float kIntegers[] = {32000,  -32000, 31872, 31871, -31872,
                                        -31873, -128,   127,   128};
  constexpr int kRows = std::size(kIntegers);
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int group_size : {32, 64, 128}) {
      const Shape shape{bits, group_size, DType::f32, 1152, 9};
      const Operand w(shape, Operand::Largest{});
      Floats x = floats(kRows * shape.in_features);
      for (int m = 0; m < kRows; ++m)
        for (int64_t k = 0; k < shape.in_features; ++k)
          x[m * shape.in_features + k] = k % 32 == 0 ? 32000.0f : kIntegers[m];
      const Wanted wanted(w, x.get(), kRows);
      for (const Precision p : kAll) {
        const std::string where = name_of(shape) + ", largest codes: ";
        const Floats y = gemm_product(table.gemm(p), w.matrix, false).whole(x.get(), kRows);
        const double error = wanted.error_of(y.get(), kRows * shape.out_features);
        report.check(error <= gemm_bound(p),
                     where + numbered("gemm", p, kRows) + ": error " + number(error));
        if (p == Precision::exact)
          continue;
        constexpr int kFirst[] = {0, kRows - int(kMaxMatvecRows)};
        for (const int first : kFirst) {
          const float* rows = x.get() + first * shape.in_features;
          const auto product = [&](const KernelTable& t) {
            return matvec_product(t.matvec(p), w.matrix).whole(rows, kMaxMatvecRows);
          };
          report.check(same_bits(product(table).get(), product(ref_kernels).get(),
                                 kMaxMatvecRows * shape.out_features),
                       where + numbered("matvec", p, kMaxMatvecRows) + ": bits differ from ref");
        }
      }
      ++report.cases;
    }
}

} // namespace q4metal::cpu::tests
