// The portable kernels: plain C++ that any compiler vectorises as it can. They define what the
// others are compared with; float32 throughout.
#include <algorithm>
#include <limits>
#include <vector>

#include "split.h"
#include "vector_kernels.h"

namespace q4metal::cpu {
namespace {

// Partial sums per row: wide enough for any vector unit, and the order of addition is fixed by it.
constexpr int kLanes = 16;

// W[row, begin:end) in float32; begin and end are multiples of kCodesPerRun.
void expand_row(const PackedMatrix& w, int64_t row, int64_t begin, int64_t end, float* out) {
  const uint8_t* packed = w.weight + row * w.row_stride();
  for (int64_t k = begin; k < end; k += kCodesPerRun, out += kCodesPerRun) {
    unpack_run(packed, w.bits, k, out);
    const int64_t group = row * w.groups() + k / w.group_size;
    const float scale = widen_at(w.scales, w.scales_dtype, group);
    const float bias = widen_at(w.biases, w.scales_dtype, group);
    for (int i = 0; i < kCodesPerRun; ++i)
      out[i] = out[i] * scale + bias;
  }
}

float sum_lanes(const float* lanes) {
  float sums[kLanes];
  std::copy(lanes, lanes + kLanes, sums);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      sums[i] += sums[i + width];
  return sums[0];
}

// One order of addition for every number of rows.
void multiply(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
              int64_t end) {
  std::vector<float> dense(w.in_features);
  for (int64_t n = begin; n < end; ++n) {
    expand_row(w, n, 0, w.in_features, dense.data());
    for (int64_t m = 0; m < rows; ++m) {
      const float* row = x + m * w.in_features;
      float lanes[kLanes] = {};
      for (int64_t k = 0; k < w.in_features; k += kLanes)
        for (int i = 0; i < kLanes; ++i)
          lanes[i] += row[k + i] * dense[k + i];
      y[m * w.out_features + n] = sum_lanes(lanes);
    }
  }
}

void gemm_transposed(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                     int64_t end) {
  // Sums of eight before they join the total: with 152,064 rows one running float32 sum loses
  // digits.
  constexpr int64_t kRows = 8;
  const int64_t width = end - begin;
  std::vector<float> dense(kRows * width), block(width);
  for (int64_t m = 0; m < rows; ++m)
    std::fill_n(y + m * w.in_features + begin, width, 0.0f);
  for (int64_t n = 0; n < w.out_features; n += kRows) {
    const int64_t count = std::min(kRows, w.out_features - n);
    for (int64_t r = 0; r < count; ++r)
      expand_row(w, n + r, begin, end, dense.data() + r * width);
    for (int64_t m = 0; m < rows; ++m) {
      std::fill(block.begin(), block.end(), 0.0f);
      for (int64_t r = 0; r < count; ++r) {
        const float factor = x[m * w.out_features + n + r];
        for (int64_t k = 0; k < width; ++k)
          block[k] += factor * dense[r * width + k];
      }
      float* out = y + m * w.in_features + begin;
      for (int64_t k = 0; k < width; ++k)
        out[k] += block[k];
    }
  }
}

size_t prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return rows * w.in_features * sizeof(float);
}

void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
  std::copy(x, x + rows * w.in_features, reinterpret_cast<float*>(prepared));
}

void matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
            int64_t end) {
  multiply(w, reinterpret_cast<const float*>(prepared), rows, y, begin, end);
}

// The GEMM uses x as it is.
size_t nothing_prepared(const PackedMatrix&, int64_t) { return 0; }
void prepare_nothing(const PackedMatrix&, const float*, int64_t, int64_t, int64_t, std::byte*) {}

void gemm(const PackedMatrix& w, const float* x, const std::byte*, int64_t rows, float* y,
          int64_t begin, int64_t end) {
  multiply(w, x, rows, y, begin, end);
}

// ---- integer activations, see split.h

// A prepared row: int16 codes, then per block its sx (room for one a group), then per group
// float(sum of x16) * sx.
int64_t split_row_bytes(const PackedMatrix& w) { return w.in_features * 2 + w.groups() * 8; }

size_t split_bytes(const PackedMatrix& w, int64_t rows) { return rows * split_row_bytes(w); }

struct SplitRow {
  int16_t* codes;
  float* blocks;
  float* groups;

  SplitRow(const PackedMatrix& w, std::byte* prepared, int64_t row) {
    codes = reinterpret_cast<int16_t*>(prepared + row * split_row_bytes(w));
    blocks = reinterpret_cast<float*>(codes + w.in_features);
    groups = blocks + w.groups();
  }
};

template <Precision kPrecision>
void split_rows(const PackedMatrix& w, const float* x, int64_t, int64_t first, int64_t last,
                std::byte* prepared) {
  for (int64_t m = first; m < last; ++m) {
    const SplitRow row(w, prepared, m);
    split_row(x + m * w.in_features, w.in_features, w.group_size,
              split_format(kPrecision, w.group_size), row.codes, row.blocks, row.groups);
  }
}

template <Precision kPrecision>
void split_prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
  split_rows<kPrecision>(w, x, rows, 0, rows, prepared);
}

template <Precision kPrecision>
void split_matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                  int64_t begin, int64_t end) {
  std::vector<float> unpacked(w.in_features);
  std::vector<int32_t> codes(w.in_features);
  const int64_t block = split_format(kPrecision, w.group_size).block;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t k = 0; k < w.in_features; k += kCodesPerRun)
      unpack_run(w.weight + n * w.row_stride(), w.bits, k, unpacked.data() + k);
    std::copy(unpacked.begin(), unpacked.end(), codes.begin());
    for (int64_t m = 0; m < rows; ++m) {
      const SplitRow row(w, const_cast<std::byte*>(prepared), m);
      float sums[kSplitLanes] = {}, offsets[kSplitLanes] = {};
      for (int64_t g = 0; g < w.groups(); ++g) {
        int32_t t = 0;
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; ++k)
          t += codes[k] * row.codes[k];
        const float scale = widen_at(w.scales, w.scales_dtype, n * w.groups() + g);
        const float bias = widen_at(w.biases, w.scales_dtype, n * w.groups() + g);
        const float factor = scale * row.blocks[g * w.group_size / block];
        const int lane = g % kSplitLanes;
        sums[lane] = std::fma(float(t), factor, sums[lane]);
        offsets[lane] = std::fma(bias, row.groups[g], offsets[lane]);
      }
      y[m * w.out_features + n] = split_tree(sums) + split_tree(offsets);
    }
  }
}

void int8_gemm(const PackedMatrix& w, const float*, const std::byte* prepared, int64_t rows,
               float* y, int64_t begin, int64_t end) {
  split_matvec<Precision::int8>(w, prepared, rows, y, begin, end);
}

} // namespace

const KernelTable ref_kernels = {
    "ref",
    {{prepared_bytes, prepare, matvec},
     {split_bytes, split_prepare<Precision::fast>, split_matvec<Precision::fast>},
     {split_bytes, split_prepare<Precision::int8>, split_matvec<Precision::int8>}},
    {{nothing_prepared, prepare_nothing, gemm},
     {nothing_prepared, prepare_nothing, gemm},
     {split_bytes, split_rows<Precision::int8>, int8_gemm}},
    gemm_transposed,
    vector_kernels};

} // namespace q4metal::cpu
