// The int8 GEMM for AVX2: x as 8-bit integers with a scale for each block of at most 64 columns,
// and W's own codes.
//
// vpmaddubsw adds products of unsigned codes q and signed x in pairs, and the pairs are added up in
// 16 bits. 64 columns of 4-bit codes overflow that, but 64 columns of (q - 8) x do not: 32 * 8 *
// 127 < 2^15. So a sum starts at -8 sum(x), and whatever overflows on the way cancels out modulo
// 2^16. Codes of 5 bits allow 32 columns. Wider ones take the fast GEMM, which is more exact and
// would be faster: with 6 bits every fourth step would have to be widened.
#include "avx2_gemm.h"

namespace q4metal::cpu {
namespace {

constexpr int kWidestBits = 5;

constexpr int middle_code(int bits) { return 1 << (bits - 1); }

struct Int8Tile {
  static constexpr int kCodeBytes = 1;
  static constexpr float kRange = kInt8Range;
  static constexpr int64_t kChunk = 1024;
  enum Array { kScales, kSums, kStarts, kArrays };

  int64_t block;
  alignas(64) std::byte codes[kChunk * kTileColumns]; // [step][feature][4]
  // Of a block; offsets are biases for codes from which the middle one was subtracted.
  alignas(32) float scales[kChunk / 32][kTileColumns];
  alignas(32) float offsets[kChunk / 32][kTileColumns];

  static PreparedRows layout(const PackedMatrix& w, int64_t rows) {
    const int64_t block = std::min(w.group_size, w.bits == 5 ? 32 : 64);
    return {rows, w.in_features, kChunk, block, kCodeBytes, kArrays};
  }

  template <typename Array>
  static void round(const PackedMatrix& w, const float* x, int64_t count, SplitScale s,
                    int32_t* out, const Array& array) {
    const __m256 inverse = _mm256_set1_ps(s.inverse);
    __m256i total = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 32) {
      __m256i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8 * i), inverse));
        total = _mm256_add_epi32(total, v[i]);
      }
      store(out + k / 4, quads(v));
    }
    // Quads hold codes 0 to 3 of eight in their low 16 bits, 4 to 7 in the high ones.
    __m128i parts =
        _mm_hadd_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    parts = _mm_hadd_epi32(parts, parts);
    const int low = _mm_cvtsi128_si32(parts), high = _mm_extract_epi32(parts, 1);
    const float sum = float(low + high) * s.scale;
    std::memcpy(array(kSums), &sum, 4);
    const int middle = middle_code(w.bits);
    const int16_t starts[2] = {int16_t(-middle * low), int16_t(-middle * high)};
    std::memcpy(array(kStarts), starts, 4);
  }

  // Of each eight codes the quads (0 2 4 6)(1 3 5 7): a shift and a mask take words of 4-bit codes
  // apart that way.
  Q4_INLINE static __m256i quads(const __m256i* codes) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]),
                                             _mm256_packs_epi32(codes[2], codes[3]));
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i v = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
    return join(_mm_unpacklo_epi16(low, high), _mm_unpackhi_epi16(low, high));
  }

  // Columns [k, k + width) of eight rows.
  template <int kBits> void expand(const EightRows& rows, int half, int64_t k, int64_t width) {
    const __m256 middle = _mm256_set1_ps(middle_code(kBits));
    for (int64_t b = 0; b * block < width; ++b) {
      const int64_t g = (k + b * block) / rows.w.group_size;
      const __m256 scale = rows.scales(g);
      _mm256_store_ps(scales[b] + 8 * half, scale);
      _mm256_store_ps(offsets[b] + 8 * half, _mm256_fmadd_ps(scale, middle, rows.biases(g)));
    }
    constexpr uint64_t kOrder = 0x0705030106040200; // (0 2 4 6)(1 3 5 7)
    std::byte* out = codes + 32 * half;
    const auto put = [&](__m256i v) __attribute__((always_inline)) {
      store(out, v);
      out += 64;
    };
    for (int64_t run = 0; run < width; run += kCodesPerRun)
      for_words<kBits, kOrder>(rows, k + run, [&](__m256i word) __attribute__((always_inline)) {
        if constexpr (kBits == 4) {
          const __m256i nibble = _mm256_set1_epi8(15);
          put(_mm256_and_si256(word, nibble));
          put(_mm256_and_si256(_mm256_srli_epi16(word, 4), nibble));
        } else {
          put(word);
        }
      });
  }

  Q4_INLINE static __m256i start(const TileRows& rows, int64_t b, int m) {
    return _mm256_castps_si256(rows.broadcast(kStarts, b, m));
  }

  // sums += four columns of W times those of a row of x, two in each 16-bit lane. In assembler,
  // because GCC 12 keeps products of several rows alive and spills sums.
  Q4_INLINE static void add_products(const __m256i* w, const int32_t* x, __m256i* sums) {
    __m256i broadcast, product;
    asm("vpbroadcastd %[x], %[b]\n\t"
        "vpmaddubsw %[b], %[w0], %[p]\n\t"
        "vpmaddubsw %[b], %[w1], %[b]\n\t"
        "vpaddw %[p], %[s0], %[s0]\n\t"
        "vpaddw %[b], %[s1], %[s1]"
        : [s0] "+x"(sums[0]), [s1] "+x"(sums[1]), [b] "=&x"(broadcast), [p] "=&x"(product)
        : [x] "m"(*x), [w0] "x"(w[0]), [w1] "x"(w[1]));
  }

  Q4_INLINE __m256 finish(const TileRows& rows, int64_t b, int m, int half, __m256i sum,
                          __m256 y) const {
    y = _mm256_fmadd_ps(rows.broadcast(kSums, b, m), _mm256_load_ps(offsets[b] + 8 * half), y);
    const __m256 factor =
        _mm256_mul_ps(rows.broadcast(kScales, b, m), _mm256_load_ps(scales[b] + 8 * half));
    const __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), factor, y);
  }
};

} // namespace

using Fast = Avx2Gemm<Precision::fast>;

template <> size_t Avx2Gemm<Precision::int8>::prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return w.bits > kWidestBits ? Fast::prepared_bytes(w, rows) : gemm_bytes<Int8Tile>(w, rows);
}

template <>
void Avx2Gemm<Precision::int8>::prepare(const PackedMatrix& w, const float* x, int64_t rows,
                                        int64_t first, int64_t last, std::byte* prepared) {
  w.bits > kWidestBits ? Fast::prepare(w, x, rows, first, last, prepared)
                       : prepare_rows<Int8Tile>(w, x, rows, first, last, prepared);
}

template <>
void Avx2Gemm<Precision::int8>::run(const PackedMatrix& w, const float* x,
                                    const std::byte* prepared, int64_t rows, float* y,
                                    int64_t begin, int64_t end) {
  switch (w.bits) {
  case 2:
    return multiply<Int8Tile, 2>(w, prepared, rows, y, begin, end);
  case 3:
    return multiply<Int8Tile, 3>(w, prepared, rows, y, begin, end);
  case 4:
    return multiply<Int8Tile, 4>(w, prepared, rows, y, begin, end);
  case 5:
    return multiply<Int8Tile, 5>(w, prepared, rows, y, begin, end);
  default:
    return Fast::run(w, x, prepared, rows, y, begin, end);
  }
}

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
