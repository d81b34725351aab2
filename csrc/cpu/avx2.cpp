// AVX2 + FMA + F16C kernels, float32 arithmetic throughout.
//
// 4 and 8 bits need no shifts: a vector of eight words is masked with 0xf << 4j (0xff << 8j), which
// gives codes times a power of two, and x holds the inverse power. So eight codes cost and +
// convert + fma. Only the top field, where the sign bit would be set, is shifted down. For that,
// `prepare` stores x per block of eight words as [field j][word]. The other widths unpack eight
// codes at a time in natural order.
//
// Matvec sums (code - centre) * x and adds (bias + centre * scale) * sum(x): with plain codes two
// large sums would cancel at the end, and at K = 18944 the error was 1.3e-6 instead of 4e-7
// (relative rms). The centre costs nothing per code: each lane's sum starts at -centre times the x
// that the lane will meet.
#include <limits>

#include "avx2.h" // from here on everything compiles for AVX2

#include "vector_kernels.h"

namespace q4metal::cpu {
namespace {

// Codes a block of the inner loop covers.
constexpr int64_t block_codes(int bits) { return bits == 4 ? 64 : 32; }

constexpr float centre(int bits) { return float(1 << (bits - 1)); }

// Floats of a prepared block: its x, then where the lanes' sums start.
constexpr int64_t block_floats(int bits) { return block_codes(bits) + 8; }

// Floats of a prepared row: the blocks, then a sum per group, padded to whole vectors.
int64_t prepared_x(const PackedMatrix& w) {
  return round_up(w.in_features, block_codes(w.bits)) / block_codes(w.bits) * block_floats(w.bits);
}

int64_t prepared_row(const PackedMatrix& w) { return prepared_x(w) + round_up(w.groups(), 8); }

size_t prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return rows * prepared_row(w) * sizeof(float);
}

// One block of eight words in the order [field][word], each field scaled by the inverse of its
// place.
template <int kBits> void prepare_block(const float* x, int64_t available, float* out) {
  constexpr int kFields = 32 / kBits;
  float* start = out + block_codes(kBits);
  std::fill(start, start + 8, 0.0f);
  float place = 1;
  for (int field = 0; field < kFields; ++field, place /= float(1 << kBits))
    for (int word = 0; word < 8; ++word) {
      const int64_t k = word * kFields + field;
      const float value = k < available ? x[k] : 0.0f;
      start[word] -= centre(kBits) * value;
      // The top field is shifted down by the kernel, so it keeps its x.
      out[field * 8 + word] = field == kFields - 1 ? value : value * place;
    }
}

void prepare_block_in_order(const float* x, int bits, float* out) {
  std::copy(x, x + 32, out);
  for (int lane = 0; lane < 8; ++lane)
    out[32 + lane] = -centre(bits) * (x[lane] + x[lane + 8] + x[lane + 16] + x[lane + 24]);
}

void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
  for (int64_t m = 0; m < rows; ++m, x += w.in_features) {
    float* out = reinterpret_cast<float*>(prepared) + m * prepared_row(w);
    float* sums = out + prepared_x(w);
    for (int64_t k = 0; k < w.in_features; k += block_codes(w.bits), out += block_floats(w.bits)) {
      if (w.bits == 4)
        prepare_block<4>(x + k, w.in_features - k, out);
      else if (w.bits == 8)
        prepare_block<8>(x + k, w.in_features - k, out);
      else
        prepare_block_in_order(x + k, w.bits, out);
    }
    std::fill(sums, sums + round_up(w.groups(), 8), 0.0f);
    for (int64_t g = 0; g < w.groups(); ++g) {
      __m256 sum = _mm256_setzero_ps();
      for (int i = 0; i < w.group_size; i += 8)
        sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + g * w.group_size + i));
      sums[g] = horizontal_sum(sum);
    }
  }
}

// Eight codes in natural order. A read of eight bytes never passes the end of its run of 32 codes.
template <int kBits> Q4_INLINE __m256 unpack8(const uint8_t* run, int eighth) {
  const uint64_t stream = eight_codes<kBits>(run, eighth);
  const __m256i all = _mm256_set1_epi64x(int64_t(stream));
  const __m256i low = _mm256_srlv_epi64(all, _mm256_setr_epi64x(0, kBits, 2 * kBits, 3 * kBits));
  const __m256i high =
      _mm256_srlv_epi64(all, _mm256_setr_epi64x(4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits));
  // Even 32-bit lanes of both: pairs (0 1)(4 5)(2 3)(6 7), then the middle pairs change places.
  const __m256 pairs = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88);
  const __m256i ordered = _mm256_permute4x64_epi64(_mm256_castps_si256(pairs), 0xd8);
  return _mm256_cvtepi32_ps(_mm256_and_si256(ordered, _mm256_set1_epi32((1 << kBits) - 1)));
}

// Field `j` of eight words, times 2^(j * bits); the top field is shifted down instead.
template <int kBits> Q4_INLINE __m256 field(__m256i words, int j) {
  constexpr int kFields = 32 / kBits;
  if (j == kFields - 1)
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 32 - kBits));
  return _mm256_cvtepi32_ps(
      _mm256_and_si256(words, _mm256_set1_epi32(((1 << kBits) - 1) << (j * kBits))));
}

// Adds one block of codes times x, for kRows rows of x at distance `stride`.
template <int kBits, int kRows>
Q4_INLINE void dot_block(const uint8_t* block, bool half, const float* x, int64_t stride,
                         __m256* sums) {
  if constexpr (kBits == 4 || kBits == 8) {
    // `half`: the row ends after four words, and the block's upper x are zero.
    const auto* words = reinterpret_cast<const __m256i*>(block);
    const __m256i v =
        half ? _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)))
             : _mm256_loadu_si256(words);
#pragma GCC unroll 8
    for (int j = 0; j < 32 / kBits; ++j) {
      const __m256 codes = field<kBits>(v, j);
      for (int m = 0; m < kRows; ++m)
        sums[m] = _mm256_fmadd_ps(codes, _mm256_load_ps(x + m * stride + 8 * j), sums[m]);
    }
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256 codes = unpack8<kBits>(block, j);
      for (int m = 0; m < kRows; ++m)
        sums[m] = _mm256_fmadd_ps(codes, _mm256_load_ps(x + m * stride + 8 * j), sums[m]);
    }
  }
}

// Which of eight scales each lane of a block takes: a block of 64 codes at group size 32 spans two
// groups.
template <int kBits, int kGroup> __m256i scale_lanes() {
  if constexpr (block_codes(kBits) > kGroup)
    return _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_setzero_si256();
}

template <int kBits, int kGroup, int kRows>
void matvec_row(const PackedMatrix& w, const float* x, int64_t n, float* y) {
  constexpr int64_t kBlock = block_codes(kBits);
  constexpr int64_t kSpan = 8 * kGroup; // codes that eight scales cover
  const int64_t columns = w.in_features, groups = w.groups(), stride = prepared_row(w);
  const uint8_t* row = w.weight + n * w.row_stride();
  const float* group_sums = x + prepared_x(w);
  const __m256 middle = _mm256_set1_ps(centre(kBits));
  __m256 totals[kRows], offsets[kRows];
  for (int m = 0; m < kRows; ++m)
    totals[m] = offsets[m] = _mm256_setzero_ps();
  for (int64_t first = 0; first < columns; first += kSpan) {
    const int64_t g = first / kGroup;
    const __m256 scale8 = load_groups(w, w.scales, n * groups + g, groups - g);
    const __m256 offset8 =
        _mm256_fmadd_ps(scale8, middle, load_groups(w, w.biases, n * groups + g, groups - g));
    for (int m = 0; m < kRows; ++m)
      offsets[m] =
          _mm256_fmadd_ps(offset8, _mm256_load_ps(group_sums + m * stride + g), offsets[m]);
    const int64_t last = std::min(first + kSpan, columns);
    __m256i lanes = scale_lanes<kBits, kGroup>();
    for (int64_t k = first; k < last; k += kBlock, x += block_floats(kBits)) {
      const uint8_t* block = row + k * kBits / 8;
      prefetch_line(block + kPrefetchAhead);
      __m256 sums[kRows];
      for (int m = 0; m < kRows; ++m)
        sums[m] = _mm256_load_ps(x + m * stride + kBlock);
      dot_block<kBits, kRows>(block, kBlock > kGroup && last - k < kBlock, x, stride, sums);
      const __m256 scale = _mm256_permutevar8x32_ps(scale8, lanes);
      for (int m = 0; m < kRows; ++m)
        totals[m] = _mm256_fmadd_ps(sums[m], scale, totals[m]);
      if constexpr (kBlock >= kGroup)
        lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(int(kBlock / kGroup)));
      else if ((k + kBlock) % kGroup == 0)
        lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(1));
    }
  }
  for (int m = 0; m < kRows; ++m)
    y[m * w.out_features + n] = horizontal_sum(totals[m]) + horizontal_sum(offsets[m]);
}

template <int kBits, int kGroup>
void matvec_range(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                  int64_t end) {
  // Four rows at most fit the registers. A row's order of addition is the same in every variant.
  const int64_t stride = prepared_row(w);
  for (int64_t n = begin; n < end; ++n)
    for (int64_t m = 0; m < rows;) {
      const float* at = x + m * stride;
      float* out = y + m * w.out_features;
      switch (rows - m) {
      case 1:
        matvec_row<kBits, kGroup, 1>(w, at, n, out);
        m += 1;
        break;
      case 2:
        matvec_row<kBits, kGroup, 2>(w, at, n, out);
        m += 2;
        break;
      case 3:
        matvec_row<kBits, kGroup, 3>(w, at, n, out);
        m += 3;
        break;
      default:
        matvec_row<kBits, kGroup, 4>(w, at, n, out);
        m += 4;
      }
    }
}

void matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
            int64_t end) {
  const float* x = reinterpret_cast<const float*>(prepared);
  for_format(
      w, [&]<int kBits, int kGroup>() { matvec_range<kBits, kGroup>(w, x, rows, y, begin, end); });
}

// ---- more rows: a block of W is expanded to float32 in the cache and used for all rows of x

// 48 rows of 512 columns are 96 KB: they stay in a 256 KB L2 beside four rows of x.
constexpr int64_t kRowBlock = 48, kColumnBlock = 512;

float* dense_scratch() {
  alignas(64) static thread_local float dense[kRowBlock * kColumnBlock];
  return dense;
}

// W[n, begin:end) in float32; begin and end are multiples of the group size.
template <int kBits, int kGroup>
void expand_row(const PackedMatrix& w, int64_t n, int64_t begin, int64_t end, float* out) {
  const uint8_t* row = w.weight + n * w.row_stride();
  for (int64_t k = begin; k < end; k += kGroup) {
    const int64_t group = n * w.groups() + k / kGroup;
    const __m256 scale = _mm256_set1_ps(widen_at(w.scales, w.scales_dtype, group));
    const __m256 bias = _mm256_set1_ps(widen_at(w.biases, w.scales_dtype, group));
    for (int64_t run = k; run < k + kGroup; run += kCodesPerRun, out += kCodesPerRun)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        _mm256_store_ps(out + 8 * j,
                        _mm256_fmadd_ps(unpack8<kBits>(row + run * kBits / 8, j), scale, bias));
  }
}

// y[kM, kN] (+)= x[kM, columns] times dense[kN, columns]^T.
template <int kM, int kN>
void gemm_tile(const float* x, int64_t x_stride, const float* dense, int64_t columns, float* y,
               int64_t y_stride, bool accumulate) {
  __m256 sums[kM][kN];
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n)
      sums[m][n] = _mm256_setzero_ps();
  for (int64_t k = 0; k < columns; k += 8) {
    __m256 w[kN];
    for (int n = 0; n < kN; ++n)
      w[n] = _mm256_load_ps(dense + n * kColumnBlock + k);
    for (int m = 0; m < kM; ++m) {
      const __m256 v = _mm256_loadu_ps(x + m * x_stride + k);
      for (int n = 0; n < kN; ++n)
        sums[m][n] = _mm256_fmadd_ps(v, w[n], sums[m][n]);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      float* out = y + m * y_stride + n;
      *out = (accumulate ? *out : 0.0f) + horizontal_sum(sums[m][n]);
    }
}

template <int kM>
void gemm_rows(const float* x, int64_t x_stride, const float* dense, int64_t columns, float* y,
               int64_t y_stride, int64_t count, bool accumulate) {
  int64_t n = 0;
  for (; n + 3 <= count; n += 3)
    gemm_tile<kM, 3>(x, x_stride, dense + n * kColumnBlock, columns, y + n, y_stride, accumulate);
  for (; n < count; ++n)
    gemm_tile<kM, 1>(x, x_stride, dense + n * kColumnBlock, columns, y + n, y_stride, accumulate);
}

template <int kBits, int kGroup>
void gemm_range(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                int64_t end) {
  float* dense = dense_scratch();
  const int64_t columns = w.in_features, stride = w.out_features;
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t count = std::min(kRowBlock, end - n);
    for (int64_t k = 0; k < columns; k += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, columns - k);
      for (int64_t r = 0; r < count; ++r)
        expand_row<kBits, kGroup>(w, n + r, k, k + width, dense + r * kColumnBlock);
      // Each y[m][n] is a sum over column blocks of eight lanes: the same for every number of rows.
      int64_t m = 0;
      for (; m + 4 <= rows; m += 4)
        gemm_rows<4>(x + m * columns + k, columns, dense, width, y + m * stride + n, stride, count,
                     k > 0);
      for (; m < rows; ++m)
        gemm_rows<1>(x + m * columns + k, columns, dense, width, y + m * stride + n, stride, count,
                     k > 0);
    }
  }
}

size_t nothing_prepared(const PackedMatrix&, int64_t) { return 0; }
void prepare_nothing(const PackedMatrix&, const float*, int64_t, int64_t, int64_t, std::byte*) {}

void gemm(const PackedMatrix& w, const float* x, const std::byte*, int64_t rows, float* y,
          int64_t begin, int64_t end) {
  for_format(
      w, [&]<int kBits, int kGroup>() { gemm_range<kBits, kGroup>(w, x, rows, y, begin, end); });
}

// ---- y = x W: rows of W are added up, so columns are shared out and every thread walks all rows

template <int kBits, int kGroup>
void transposed_range(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                      int64_t end) {
  // Sums of 16 before they join the total: one running float32 sum over 152,064 rows loses digits.
  constexpr int64_t kDepth = 16;
  float* dense = dense_scratch();
  for (int64_t k = begin; k < end; k += kColumnBlock) {
    const int64_t width = std::min(kColumnBlock, end - k);
    for (int64_t m = 0; m < rows; ++m)
      std::memset(y + m * w.in_features + k, 0, width * sizeof(float));
    for (int64_t n = 0; n < w.out_features; n += kDepth) {
      const int64_t count = std::min(kDepth, w.out_features - n);
      for (int64_t r = 0; r < count; ++r)
        expand_row<kBits, kGroup>(w, n + r, k, k + width, dense + r * kColumnBlock);
      for (int64_t m = 0; m < rows; ++m) {
        const float* factors = x + m * w.out_features + n;
        float* out = y + m * w.in_features + k;
        for (int64_t c = 0; c < width; c += 32) { // 32 columns: four chains hide the latency of fma
          __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                            _mm256_setzero_ps()};
          for (int64_t r = 0; r < count; ++r) {
            const __m256 factor = _mm256_set1_ps(factors[r]);
            for (int i = 0; i < 4; ++i)
              sums[i] = _mm256_fmadd_ps(
                  factor, _mm256_load_ps(dense + r * kColumnBlock + c + 8 * i), sums[i]);
          }
          for (int i = 0; i < 4; ++i)
            _mm256_storeu_ps(out + c + 8 * i,
                             _mm256_add_ps(_mm256_loadu_ps(out + c + 8 * i), sums[i]));
        }
      }
    }
  }
}

void gemm_transposed(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                     int64_t end) {
  for_format(w, [&]<int kBits, int kGroup>() {
    transposed_range<kBits, kGroup>(w, x, rows, y, begin, end);
  });
}

template <Precision kPrecision>
constexpr MatvecKernel integer_matvec = {Avx2Matvec<kPrecision>::prepared_bytes,
                                         Avx2Matvec<kPrecision>::prepare,
                                         Avx2Matvec<kPrecision>::run};

template <Precision kPrecision>
constexpr GemmKernel integer_gemm = {Avx2Gemm<kPrecision>::prepared_bytes,
                                     Avx2Gemm<kPrecision>::prepare, Avx2Gemm<kPrecision>::run};

} // namespace

constinit const KernelTable avx2_kernels = {"avx2",
                                            {{prepared_bytes, prepare, matvec},
                                             integer_matvec<Precision::fast>,
                                             integer_matvec<Precision::int8>},
                                            {{nothing_prepared, prepare_nothing, gemm},
                                             integer_gemm<Precision::fast>,
                                             integer_gemm<Precision::int8>},
                                            gemm_transposed,
                                            vector_kernels};

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
