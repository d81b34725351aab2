// What the GEMMs for NEON share (neon.cpp, neon_split_gemm.h): how the product is cut.
//
// A tile of four rows of x and 16 output features stays in sixteen accumulators. Features lie
// across the lanes: a step multiplies four vectors of W with single lanes of x, so there are no
// horizontal sums, and no number depends on its neighbours. A chunk of columns of W is expanded for
// one tile at a time and stays in the L1 while all rows of x pass by.
#pragma once

#include "neon.h" // from here on everything compiles for NEON with dot products

namespace q4metal::cpu {
namespace {

constexpr int64_t kTileColumns = 16;

// Rows of W side by side, past `end` the last row again.
struct TileOfW {
  const PackedMatrix& w;
  int64_t rows[kTileColumns];

  TileOfW(const PackedMatrix& w, int64_t first, int64_t end) : w(w) {
    for (int i = 0; i < kTileColumns; ++i)
      rows[i] = std::min(first + i, end - 1);
  }
  const uint8_t* codes(int i, int64_t k) const {
    return w.weight + rows[i] * w.row_stride() + k * w.bits / 8;
  }
  // Of group g, for four of the rows.
  float32x4_t scales(int first, int64_t g) const { return of_group(w.scales, first, g); }
  float32x4_t biases(int first, int64_t g) const { return of_group(w.biases, first, g); }

private:
  float32x4_t of_group(const void* values, int first, int64_t g) const {
    alignas(16) std::byte four[16];
    const auto* from = static_cast<const std::byte*>(values);
    const auto gather = [&]<int kSize>() {
      for (int i = 0; i < 4; ++i)
        std::memcpy(four + i * kSize, from + (rows[first + i] * w.groups() + g) * kSize, kSize);
    };
    w.scales_dtype == DType::f32 ? gather.template operator()<4>()
                                 : gather.template operator()<2>();
    return load4(four, w.scales_dtype);
  }
};

// 32 columns of four rows, from k on, as eight vectors: four codes of each row. The codes come in
// the order of Width::load.
template <typename Width>
Q4_INLINE void quads_of_codes(const Width& width, const TileOfW& rows, int first, int64_t k,
                              uint8x16_t* out) {
  uint32x4_t v[4][2];
  for (int i = 0; i < 4; ++i) {
    uint8x16_t codes[2];
    width.load(rows.codes(first + i, k), codes);
    v[i][0] = vreinterpretq_u32_u8(codes[0]);
    v[i][1] = vreinterpretq_u32_u8(codes[1]);
  }
  for (int half = 0; half < 2; ++half) {
    const uint32x4_t a = vtrn1q_u32(v[0][half], v[1][half]), b = vtrn1q_u32(v[2][half], v[3][half]);
    const uint32x4_t c = vtrn2q_u32(v[0][half], v[1][half]), d = vtrn2q_u32(v[2][half], v[3][half]);
    const auto low = [](uint32x4_t p, uint32x4_t q) {
      return vreinterpretq_u8_u64(vtrn1q_u64(vreinterpretq_u64_u32(p), vreinterpretq_u64_u32(q)));
    };
    const auto high = [](uint32x4_t p, uint32x4_t q) {
      return vreinterpretq_u8_u64(vtrn2q_u64(vreinterpretq_u64_u32(p), vreinterpretq_u64_u32(q)));
    };
    out[4 * half] = low(a, b);
    out[4 * half + 1] = low(c, d);
    out[4 * half + 2] = high(a, b);
    out[4 * half + 3] = high(c, d);
  }
}

// Asks for the codes that the next tile will expand.
inline void prefetch_codes(const PackedMatrix& w, int64_t begin, int64_t end, int64_t k,
                           int64_t width) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t byte = 0; byte < width * w.bits / 8; byte += 64)
      __builtin_prefetch(w.weight + n * w.row_stride() + k * w.bits / 8 + byte);
}

// y += x W^T for kRows rows from m on, kTileColumns features and a chunk of columns.
template <int kRows, typename Tile, typename X>
void multiply_tile(const Tile& tile, const X& x, int64_t m, int64_t k, int64_t width, float* y,
                   int64_t stride, int64_t features) {
  if (features == kTileColumns)
    return tile.template multiply<kRows>(x, m, k, width, y, stride);
  float copy[kRows * kTileColumns] = {};
  for (int r = 0; r < kRows; ++r)
    std::copy_n(y + r * stride, features, copy + r * kTileColumns);
  tile.template multiply<kRows>(x, m, k, width, copy, kTileColumns);
  for (int r = 0; r < kRows; ++r)
    std::copy_n(copy + r * kTileColumns, features, y + r * stride);
}

// y[:, begin:end) for all rows of x. Tile has kChunk, a multiple of every group size,
//   expand(width, w, n, end, k, columns)           W[n .. n + 16, k .. k + columns)
//   multiply<kRows>(x, m, k, columns, y, stride)   y += rows m .. m + kRows of x times that
template <typename Tile, typename Width, typename X>
void multiply_all(const PackedMatrix& w, const Width& width, const X& x, int64_t rows, float* y,
                  int64_t begin, int64_t end) {
  static thread_local Tile tile;
  const int64_t stride = w.out_features;
  for (int64_t m = 0; m < rows; ++m)
    std::fill(y + m * stride + begin, y + m * stride + end, 0.0f);
  for (int64_t k = 0; k < w.in_features; k += Tile::kChunk) {
    const int64_t columns = std::min(Tile::kChunk, w.in_features - k);
    for (int64_t n = begin; n < end; n += kTileColumns) {
      const int64_t features = std::min(kTileColumns, end - n), next = n + kTileColumns;
      tile.expand(width, w, n, end, k, columns);
      prefetch_codes(w, next, std::min(next + kTileColumns, end), k, columns);
      for (int64_t m = 0; m < rows; m += kTileRows) {
        float* out = y + m * stride + n;
        for_tile_rows(rows - m, [&]<int kRows>() {
          multiply_tile<kRows>(tile, x, m, k, columns, out, stride, features);
        });
      }
    }
  }
}

} // namespace
} // namespace q4metal::cpu
