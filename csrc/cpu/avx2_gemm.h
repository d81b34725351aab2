// What the two integer GEMMs for AVX2 share (avx2_fast_gemm.cpp, avx2_int8_gemm.cpp): how the
// product is cut, how x is laid out, and how rows of W are taken apart.
//
// A tile of six rows of x and 16 output features stays in twelve accumulators. Features lie across
// the lanes: a step takes 2 columns (int8: 4), two vectors of W, and for each row a broadcast of
// its codes. So there are no horizontal sums, and no number depends on its neighbours.
//
// A chunk of columns of W is expanded for one tile at a time and stays in the L1 while all rows of
// x pass by, 24 bytes a step, in the order in which they are stored.
#pragma once

#include <type_traits>
#include <utility>

#include "split.h"

#include "avx2.h" // from here on everything compiles for AVX2

namespace q4metal::cpu {

namespace {

constexpr int64_t kTileRows = 6, kTileColumns = 16;

// A block with nothing larger counts as zeros: the inverse of its scale could be infinite.
constexpr float kSmallest = 0x1p-110f;

Q4_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
Q4_INLINE __m128i load_half(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
Q4_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
Q4_INLINE __m256i join(__m128i low, __m128i high) { return _mm256_set_m128i(high, low); }

// ---- x

// Prepared x. Codes: chunks of columns; in each the tiles of rows, the last one with the rows that
// are left; in each the steps; in each 4 bytes a row. Then arrays of 4 bytes, [block][row] each,
// the first of them the scales.
struct PreparedRows {
  int64_t rows, columns;
  int64_t chunk, block; // columns; a chunk is whole blocks
  int64_t code_bytes, arrays;

  int64_t blocks() const { return (columns + block - 1) / block; }
  size_t bytes() const { return array(arrays); }
  int64_t array(int64_t i) const { return rows * (columns * code_bytes + 4 * i * blocks()); }
  int64_t tile_rows(int64_t m) const { return std::min(kTileRows, rows - m); }
  // Codes of column k, the first of a chunk or a block, in the tile that begins with row m.
  int64_t codes(int64_t k, int64_t m) const {
    const int64_t begin = k / chunk * chunk, width = std::min(chunk, columns - begin);
    return (begin * rows + m * width + (k - begin) * tile_rows(m)) * code_bytes;
  }
};

// By comparison of bits, as split_scale wants it.
Q4_INLINE float largest_magnitude(const float* x, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < count; k += 8)
    largest = _mm256_max_epi32(largest, _mm256_and_si256(magnitude, load(x + k)));
  __m128i four =
      _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

// Every row's blocks of x: Method::round puts a block's codes in the order of the steps and fills
// the other arrays.
template <typename Method>
void prepare_rows(const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
                  std::byte* prepared) {
  const PreparedRows layout = Method::layout(w, rows);
  for (int64_t m = first; m < last; ++m) {
    const int64_t tile = m / kTileRows * kTileRows, tile_rows = layout.tile_rows(tile);
    for (int64_t b = 0; b < layout.blocks(); ++b) {
      const int64_t k = b * layout.block, count = std::min(layout.block, layout.columns - k);
      const float* values = x + m * layout.columns + k;
      const float largest = largest_magnitude(values, count);
      const SplitScale s =
          largest < kSmallest ? SplitScale{0, 0} : split_scale(largest, Method::kRange);
      const auto array = [&](int64_t i) { return prepared + layout.array(i) + 4 * (b * rows + m); };
      std::memcpy(array(0), &s.scale, 4);
      alignas(32) int32_t steps[kSplitBlock / 2];
      Method::round(w, values, count, s, steps, array);
      auto* out = reinterpret_cast<int32_t*>(prepared + layout.codes(k, tile)) + (m - tile);
      for (int64_t i = 0; i < count * layout.code_bytes / 4; ++i)
        out[i * tile_rows] = steps[i];
    }
  }
}

// ---- W, eight rows at a time, side by side in the lanes

struct EightRows {
  const PackedMatrix& w;
  int64_t rows[8]; // past `end` the last row again

  EightRows(const PackedMatrix& w, int64_t first, int64_t end) : w(w) {
    for (int i = 0; i < 8; ++i)
      rows[i] = std::min(first + i, end - 1);
  }
  const uint8_t* codes(int i, int64_t k) const {
    return w.weight + rows[i] * w.row_stride() + k * w.bits / 8;
  }
  __m256 scales(int64_t g) const { return of_group(w.scales, g); }
  __m256 biases(int64_t g) const { return of_group(w.biases, g); }

private:
  __m256 of_group(const void* values, int64_t g) const {
    alignas(32) std::byte eight[32];
    const auto* from = static_cast<const std::byte*>(values);
    const auto gather = [&]<int kSize>() {
      for (int i = 0; i < 8; ++i)
        std::memcpy(eight + i * kSize, from + (rows[i] * w.groups() + g) * kSize, kSize);
    };
    w.scales_dtype == DType::f32 ? gather.template operator()<4>()
                                 : gather.template operator()<2>();
    return load8(eight, w.scales_dtype);
  }
};

// Words 0 to 3 of eight rows. `rows`: row i in the low, row i + 4 in the high half of a vector.
Q4_INLINE void transpose(const __m256i* rows, __m256i* words) {
  const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]);
  const __m256i b = _mm256_unpacklo_epi32(rows[2], rows[3]);
  const __m256i c = _mm256_unpackhi_epi32(rows[0], rows[1]);
  const __m256i d = _mm256_unpackhi_epi32(rows[2], rows[3]);
  words[0] = _mm256_unpacklo_epi64(a, b);
  words[1] = _mm256_unpackhi_epi64(a, b);
  words[2] = _mm256_unpacklo_epi64(c, d);
  words[3] = _mm256_unpackhi_epi64(c, d);
}

// Codes [16 * half, 16 * half + 16) of a run of 32, a byte each.
template <int kBits> Q4_INLINE __m128i bytes_of(const uint8_t* run, int half) {
  if constexpr (kBits == 8)
    return load_half(run + 16 * half);
  constexpr uint64_t kFields = 0x0101010101010101u * ((1 << kBits) - 1);
  return _mm_set_epi64x(int64_t(_pdep_u64(eight_codes<kBits>(run, 2 * half + 1), kFields)),
                        int64_t(_pdep_u64(eight_codes<kBits>(run, 2 * half), kFields)));
}

// Calls put(word) for the words of 32 columns from k on, eight rows in each. A word is 8 codes of 4
// bits, or 4 codes in bytes; kOrder says in which order the bytes of eight codes become two words.
template <int kBits, uint64_t kOrder, typename Put>
Q4_INLINE void for_words(const EightRows& rows, int64_t k, const Put& put) {
  constexpr uint64_t kNext = 0x0808080808080808;
  const __m256i order = _mm256_setr_epi64x(kOrder, kOrder + kNext, kOrder, kOrder + kNext);
#pragma GCC unroll 2
  for (int half = 0; half < (kBits == 4 ? 1 : 2); ++half) {
    __m256i v[4], words[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if constexpr (kBits == 4)
        v[i] = join(load_half(rows.codes(i, k)), load_half(rows.codes(i + 4, k)));
      else
        v[i] = _mm256_shuffle_epi8(join(bytes_of<kBits>(rows.codes(i, k), half),
                                        bytes_of<kBits>(rows.codes(i + 4, k), half)),
                                   order);
    transpose(v, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      put(words[i]);
  }
}

// ---- a tile

// Calls f(0) to f(kCount - 1), the arguments being constants before GCC decides what is an array:
// sums that are indexed by a loop stay in memory even if the loop is unrolled.
template <int kCount, typename F> Q4_INLINE void unrolled(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Where a tile finds its rows of x and of y.
struct TileRows {
  const int32_t* codes;
  const float* arrays[3]; // of the chunk's first block; the next block is block_stride further
  int64_t block_stride;
  float* y;
  int64_t y_stride;

  Q4_INLINE __m256 broadcast(int array, int64_t block, int m) const {
    return _mm256_broadcast_ss(arrays[array] + block * block_stride + m);
  }
};

// y += x W^T for kRows rows, 16 features and a chunk of columns. Not inlined: with `width` known
// GCC 12 unrolls the inner loop and spills half of the sums (15 instead of 24 multiplications a
// cycle).
template <typename Method, int kRows>
__attribute__((noinline)) void multiply_tile(const Method& w, const TileRows& rows, int64_t width) {
  // y is far apart from row to row, where no hardware prefetcher follows.
  for (int m = 0; m < kRows; ++m)
    __builtin_prefetch(rows.y + m * rows.y_stride, 1);
  const int32_t* x = rows.codes;
  const std::byte* step = w.codes;
  for (int64_t b = 0; b * w.block < width; ++b) {
    __m256i sums[kRows][2];
    unrolled<kRows>([&](int m) __attribute__((always_inline)) {
      sums[m][0] = sums[m][1] = Method::start(rows, b, m);
    });
    const std::byte* end =
        step + std::min(w.block, width - b * w.block) * Method::kCodeBytes * kTileColumns;
    for (; step != end; step += 64, x += kRows) {
      const __m256i codes[2] = {load(step), load(step + 32)};
      unrolled<kRows>([&](int m) __attribute__((always_inline)) {
        Method::add_products(codes, x + m, sums[m]);
      });
    }
    unrolled<2 * kRows>([&](int i) __attribute__((always_inline)) {
      const int m = i / 2, half = i % 2;
      float* y = rows.y + m * rows.y_stride + 8 * half;
      _mm256_storeu_ps(y, w.finish(rows, b, m, half, sums[m][half], _mm256_loadu_ps(y)));
    });
  }
}

template <typename Method>
void multiply_rows(const Method& w, int64_t count, const TileRows& rows, int64_t width) {
  switch (count) {
  case 1:
    return multiply_tile<Method, 1>(w, rows, width);
  case 2:
    return multiply_tile<Method, 2>(w, rows, width);
  case 3:
    return multiply_tile<Method, 3>(w, rows, width);
  case 4:
    return multiply_tile<Method, 4>(w, rows, width);
  case 5:
    return multiply_tile<Method, 5>(w, rows, width);
  default:
    return multiply_tile<Method, kTileRows>(w, rows, width);
  }
}

// The same for fewer than 16 features, by way of a copy of y.
template <typename Method>
void multiply_edge(const Method& w, int64_t count, TileRows rows, int64_t width, int64_t features) {
  float copy[kTileRows * kTileColumns] = {};
  float* y = std::exchange(rows.y, copy);
  const int64_t stride = std::exchange(rows.y_stride, kTileColumns);
  for (int64_t m = 0; m < count; ++m)
    std::copy_n(y + m * stride, features, copy + m * kTileColumns);
  multiply_rows(w, count, rows, width);
  for (int64_t m = 0; m < count; ++m)
    std::copy_n(copy + m * kTileColumns, features, y + m * stride);
}

// ---- all tiles

// Asks for the codes that the next tile will expand.
inline void prefetch_codes(const PackedMatrix& w, int64_t begin, int64_t end, int64_t k,
                           int64_t width) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t byte = 0; byte < width * w.bits / 8; byte += 64)
      __builtin_prefetch(w.weight + n * w.row_stride() + k * w.bits / 8 + byte);
}

template <typename Method, int kBits>
void multiply(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
              int64_t begin, int64_t end) {
  static thread_local Method tile;
  const PreparedRows x = Method::layout(w, rows);
  const int64_t stride = w.out_features;
  tile.block = x.block;
  for (int64_t m = 0; m < rows; ++m)
    std::fill(y + m * stride + begin, y + m * stride + end, 0.0f);
  for (int64_t k = 0; k < x.columns; k += x.chunk) {
    const int64_t width = std::min(x.chunk, x.columns - k);
    for (int64_t n = begin; n < end; n += kTileColumns) {
      for (int half = 0; half < 2; ++half)
        tile.template expand<kBits>(EightRows(w, n + 8 * half, end), half, k, width);
      const int64_t next = n + kTileColumns;
      if (next < end)
        prefetch_codes(w, next, std::min(next + kTileColumns, end), k, width);
      else if (k + width < x.columns)
        prefetch_codes(w, begin, std::min(begin + kTileColumns, end), k + width, width);
      for (int64_t m = 0; m < rows; m += kTileRows) {
        TileRows at{reinterpret_cast<const int32_t*>(prepared + x.codes(k, m)),
                    {},
                    rows,
                    y + m * stride + n,
                    stride};
        for (int64_t i = 0; i < x.arrays; ++i)
          at.arrays[i] =
              reinterpret_cast<const float*>(prepared + x.array(i)) + k / x.block * rows + m;
        if (next <= end)
          multiply_rows(tile, x.tile_rows(m), at, width);
        else
          multiply_edge(tile, x.tile_rows(m), at, width, end - n);
      }
    }
  }
}

template <typename Method> size_t gemm_bytes(const PackedMatrix& w, int64_t rows) {
  return Method::layout(w, rows).bytes();
}

} // namespace
} // namespace q4metal::cpu
