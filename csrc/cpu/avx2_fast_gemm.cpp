// The fast GEMM for AVX2: x and W as integers of 13 bits with a scale for each block of 128
// columns.
//
// 4096 * 4094 * 128 < 2^31, so vpmaddwd adds up a block without overflow. W is dequantized and
// rounded again, by which the groups are gone: there is no product with a scale and a bias for each
// of them, which would be 12 % of the instructions for groups of 32. Relative rms error 7e-4 with
// outliers of 50 in x.
#include <cmath>
#include <limits>

#include "avx2_gemm.h"

namespace q4metal::cpu {
namespace {

constexpr float kWRange = 4093.0f; // roundings add 1.25 at most

struct FastTile {
  static constexpr int kCodeBytes = 2;
  static constexpr float kRange = 4096.0f;
  static constexpr int64_t kChunk = 512;

  int64_t block;
  alignas(64) std::byte codes[kChunk * kTileColumns * kCodeBytes]; // [step][feature][2]
  alignas(32) float scales[kChunk / kSplitBlock][kTileColumns];

  static PreparedRows layout(const PackedMatrix& w, int64_t rows) {
    return {rows, w.in_features, kChunk, kSplitBlock, kCodeBytes, 1};
  }

  // Of each eight codes the pairs (0 4)(1 5)(2 6)(3 7): a shift and a mask take words of 4-bit
  // codes apart that way.
  template <typename Array>
  static void round(const PackedMatrix&, const float* x, int64_t count, SplitScale s, int32_t* out,
                    const Array&) {
    const __m256 inverse = _mm256_set1_ps(s.inverse);
    const auto codes = [&](int64_t k) __attribute__((always_inline)) {
      return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inverse));
    };
    for (int64_t k = 0; k < count; k += 16) {
      const __m256i first = codes(k), second = codes(k + 8);
      const __m256i low = _mm256_permute2x128_si256(first, second, 0x20);
      const __m256i high = _mm256_permute2x128_si256(first, second, 0x31);
      store(out + k / 2, _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa));
    }
  }

  // Columns [k, k + width) of eight rows.
  template <int kBits> void expand(const EightRows& rows, int half, int64_t k, int64_t width) {
    for (int64_t first = 0; first < width; first += kSplitBlock)
      expand_block<kBits>(rows, k + first, std::min(kSplitBlock, width - first),
                          codes + first * kTileColumns * kCodeBytes + 32 * half,
                          scales[first / kSplitBlock] + 8 * half);
  }

  template <int kBits>
  static void expand_block(const EightRows& rows, int64_t k, int64_t width, std::byte* out,
                           float* out_scale) {
    constexpr float kLevels = 1 << kBits, kTop = kLevels - 1;
    const int64_t group_size = rows.w.group_size;
    const int groups = int(width / group_size);
    __m256 scale[kSplitBlock / 32], bias[kSplitBlock / 32];
    // The lowest and the highest code bound a group. By comparison of bits: a NaN must win.
    __m256i bound = _mm256_setzero_si256();
    const auto reach = [&](__m256 v) {
      bound = _mm256_max_epi32(
          bound, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
    };
    for (int g = 0; g < groups; ++g) {
      scale[g] = rows.scales(k / group_size + g);
      bias[g] = rows.biases(k / group_size + g);
      reach(bias[g]);
      reach(_mm256_fmadd_ps(scale[g], _mm256_set1_ps(kTop), bias[g]));
    }
    const __m256 inverse = block_scale(_mm256_castsi256_ps(bound), out_scale);
    for (int g = 0; g < groups; ++g) {
      // code * step / 2^bits + origin. What rounding changes the step by is taken out of the origin
      // for the middle code, or it would add up over the group.
      const __m256 wanted =
          _mm256_mul_ps(_mm256_mul_ps(scale[g], inverse), _mm256_set1_ps(kLevels));
      const __m256i step = _mm256_cvtps_epi32(wanted);
      const __m256 error = _mm256_sub_ps(wanted, _mm256_cvtepi32_ps(step));
      const __m256i origin = _mm256_cvtps_epi32(_mm256_fmadd_ps(
          error, _mm256_set1_ps(0.5f * kTop / kLevels), _mm256_mul_ps(bias[g], inverse)));
      for (int64_t run = 0; run < group_size; run += kCodesPerRun, out += 64 * kCodesPerRun / 2)
        expand_run<kBits>(rows, k + g * group_size + run, twice(step), twice(origin), out);
    }
  }

  // Largest values of eight rows to their scales; returns the inverse ones.
  static __m256 block_scale(__m256 largest, float* scale) {
    const __m256 range = _mm256_set1_ps(kWRange);
    const __m256 finite =
        _mm256_cmp_ps(largest, _mm256_set1_ps(std::numeric_limits<float>::max()), _CMP_LE_OQ);
    const __m256 usable =
        _mm256_and_ps(finite, _mm256_cmp_ps(largest, _mm256_set1_ps(kSmallest), _CMP_GE_OQ));
    const __m256 nan = _mm256_andnot_ps(finite, _mm256_set1_ps(NAN));
    _mm256_store_ps(scale, _mm256_or_ps(nan, _mm256_and_ps(usable, _mm256_div_ps(largest, range))));
    return _mm256_and_ps(usable, _mm256_div_ps(range, largest));
  }

  // The low 16 bits of each 32 in both halves.
  Q4_INLINE static __m256i twice(__m256i v) {
    return _mm256_blend_epi16(v, _mm256_slli_epi32(v, 16), 0xaa);
  }

  template <int kBits>
  Q4_INLINE static void expand_run(const EightRows& rows, int64_t k, __m256i step, __m256i origin,
                                   std::byte* out) {
    constexpr uint64_t kOrder = 0x0706030205040100; // (0 1 4 5)(2 3 6 7)
    const auto put = [&](__m256i code) __attribute__((always_inline)) {
      store(out, _mm256_add_epi16(_mm256_mulhrs_epi16(code, step), origin));
      out += 64;
    };
    for_words<kBits, kOrder>(rows, k, [&](__m256i word) __attribute__((always_inline)) {
      put(field<kBits, 0>(word));
      if constexpr (kBits == 4) {
        put(field<4, 4>(word));
        put(field<4, 8>(word));
        put(field<4, 12>(word));
      } else {
        put(field<kBits, 8>(word));
      }
    });
  }

  // The code at bit kAt of each 16 bits, times 2^(15 - kBits): vpmulhrsw divides by 2^15.
  template <int kBits, int kAt> Q4_INLINE static __m256i field(__m256i v) {
    constexpr int kUp = 15 - kBits - kAt;
    v = kUp >= 0 ? _mm256_slli_epi16(v, std::max(kUp, 0)) : _mm256_srli_epi16(v, std::max(-kUp, 0));
    return _mm256_and_si256(v, _mm256_set1_epi16(int16_t(((1 << kBits) - 1) << (15 - kBits))));
  }

  Q4_INLINE static __m256i start(const TileRows&, int64_t, int) { return _mm256_setzero_si256(); }

  // sums += two columns of W times those of a row of x. In assembler, because GCC 12 keeps products
  // of several rows alive and spills sums.
  Q4_INLINE static void add_products(const __m256i* w, const int32_t* x, __m256i* sums) {
    __m256i broadcast, product;
    asm("vpbroadcastd %[x], %[b]\n\t"
        "vpmaddwd %[w0], %[b], %[p]\n\t"
        "vpmaddwd %[w1], %[b], %[b]\n\t"
        "vpaddd %[p], %[s0], %[s0]\n\t"
        "vpaddd %[b], %[s1], %[s1]"
        : [s0] "+x"(sums[0]), [s1] "+x"(sums[1]), [b] "=&x"(broadcast), [p] "=&x"(product)
        : [x] "m"(*x), [w0] "x"(w[0]), [w1] "x"(w[1]));
  }

  Q4_INLINE __m256 finish(const TileRows& rows, int64_t b, int m, int half, __m256i sum,
                          __m256 y) const {
    const __m256 factor =
        _mm256_mul_ps(rows.broadcast(0, b, m), _mm256_load_ps(scales[b] + 8 * half));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, y);
  }
};

} // namespace

template <> size_t Avx2Gemm<Precision::fast>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return gemm_bytes<FastTile>(w, rows);
}

template <>
void Avx2Gemm<Precision::fast>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                        int64_t first, int64_t last, std::byte* prepared) {
  prepare_rows<FastTile>(w, x, rows, first, last, prepared);
}

template <>
void Avx2Gemm<Precision::fast>::run(const PackedMatrix& w, const float*, const std::byte* prepared,
                                    int64_t rows, float* y, int64_t begin, int64_t end) {
  switch (w.bits) {
  case 2:
    return multiply<FastTile, 2>(w, prepared, rows, y, begin, end);
  case 3:
    return multiply<FastTile, 3>(w, prepared, rows, y, begin, end);
  case 4:
    return multiply<FastTile, 4>(w, prepared, rows, y, begin, end);
  case 5:
    return multiply<FastTile, 5>(w, prepared, rows, y, begin, end);
  case 6:
    return multiply<FastTile, 6>(w, prepared, rows, y, begin, end);
  default:
    return multiply<FastTile, 8>(w, prepared, rows, y, begin, end);
  }
}

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
