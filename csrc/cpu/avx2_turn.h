// One turn of the AVX2 integer matvec (avx2_split.h): eight groups of W, unpacked and multiplied.
//
// 4 bits: bytes hold codes 2j and 2j + 1, so x16 comes as two int8 planes, high and low, each split
// into even and odd k; int8 activations are the low plane alone. maddubs(15, -128) is at most 3840,
// so a lane of int16 takes eight of them before it is widened: 13.6 instructions for 64 weights.
// Other widths become int16 first (maddubs would saturate for 8 bits: 255 * 127 * 2 > 32767).
#pragma once

#include <array>

#include "avx2_split.h"

namespace q4metal::cpu {
namespace {

// Keeps the compiler from moving or regrouping what v is computed from.
Q4_INLINE __m256i in_order(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

template <int kBits, int kGroup, int kPlanes> struct Turn {
  static constexpr int kGroupBytes = kGroup * kBits / 8;
  static constexpr int kBytes = kTurnGroups * kGroupBytes;
  static constexpr int kBlocks = kGroup / half_codes(kBits);
  static constexpr int kCodeVectors = kBits == 4 || kBits == 8 ? 8 : 4;
  static constexpr int kBlockX = strings_of(kBits, kPlanes) * 4 * 32; // bytes of x
  static constexpr int kTurnX = kBlocks * kBlockX;
  // Bytes that reads of codes reach beyond the codes they want.
  static constexpr int kOverread = kBits == 4 || kBits == 8 ? 0 : 16 - 2 * kBits;
  // A vector of weights holds two groups; else four vectors hold four groups, and a turn has two
  // such quads.
  static constexpr bool kPairs = kBlocks == 1;
  static constexpr int kQuads = kPairs ? 1 : 2;
  // Blocks whose reads are issued together. Two: from memory 1.65 ns for 64 weights against 1.91,
  // because the cache lines of a turn are then asked for in order and at once.
  static constexpr int kAtOnce = kPairs ? 1 : 2;
  static constexpr int kChunks = kBlocks / kQuads; // blocks of a quad

  // What block `b` reads of W.
  Q4_INLINE static void read(const uint8_t* turn, int b, __m256i* out) {
    const int stride = kPairs ? 32 : kGroupBytes;
    const uint8_t* p =
        turn + b / kChunks * 4 * kGroupBytes + b % kChunks * 2 * half_codes(kBits) * kBits / 8;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      out[i] = kCodeVectors == 8 ? load(p + i * stride) : widen_16(p + i * stride);
  }

  // Its codes in the order of its x. Changes v.
  Q4_INLINE static void unpack(__m256i* v, __m256i* codes) {
    transpose(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 4) {
        const __m256i nibble = _mm256_set1_epi8(15);
        codes[i] = _mm256_and_si256(v[i], nibble);
        codes[4 + i] = _mm256_and_si256(_mm256_srli_epi16(v[i], 4), nibble);
      } else if constexpr (kBits == 8) {
        codes[i] = _mm256_and_si256(v[i], _mm256_set1_epi16(255));
        codes[4 + i] = _mm256_srli_epi16(v[i], 8);
      } else {
        codes[i] = v[i];
      }
    }
  }

  // 16 codes of an odd width as int16, in order: the two bytes that hold a code are shuffled into
  // each lane, and a multiplication shifts every code to the top of its own.
  Q4_INLINE static __m256i widen_16(const uint8_t* p) {
    alignas(32) static constexpr auto kBytesOf = [] {
      std::array<uint8_t, 32> bytes{};
      for (int j = 0; j < 16; ++j) {
        bytes[2 * j] = uint8_t(j * kBits / 8);
        bytes[2 * j + 1] = uint8_t(j * kBits / 8 + 1);
      }
      return bytes;
    }();
    alignas(32) static constexpr auto kFactorOf = [] {
      std::array<uint16_t, 16> factors{};
      for (int j = 0; j < 16; ++j)
        factors[j] = uint16_t(1 << (16 - kBits - j * kBits % 8));
      return factors;
    }();
    const __m256i window =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i words = _mm256_shuffle_epi8(window, load(kBytesOf.data()));
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, load(kFactorOf.data())), 16 - kBits);
  }

  // One lane of 32 bits per group, or per group and half of its codes.
  Q4_INLINE static __m256i dot(const __m256i* codes, const std::byte* x) {
    if constexpr (kBits == 4) {
      // In order: GCC makes a tree of the additions, whose leaves do not fit the registers.
      __m256i plane[kPlanes]; // high and low, or low
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
          const __m256i product = _mm256_maddubs_epi16(codes[i], load(x + p * 256 + 32 * i));
          plane[p] = i == 0 ? product : in_order(_mm256_add_epi16(plane[p], product));
        }
      const __m256i low = _mm256_madd_epi16(plane[kPlanes - 1], _mm256_set1_epi16(1));
      if constexpr (kPlanes == 1)
        return low;
      else
        return _mm256_add_epi32(low, _mm256_madd_epi16(plane[0], _mm256_set1_epi16(256)));
    } else {
      __m256i sum = _mm256_madd_epi16(codes[0], load(x));
#pragma GCC unroll 8
      for (int i = 1; i < kCodeVectors; ++i)
        sum = in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(codes[i], load(x + 32 * i))));
      return sum;
    }
  }

  // The sums t of the eight groups in order, from those of the quads (or pairs).
  Q4_INLINE static __m256i join(const __m256i* quads) {
    if constexpr (kPairs)
      return _mm256_permutevar8x32_epi32(quads[0], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_add_epi32(_mm256_blend_epi32(quads[0], quads[kQuads - 1], 0xf0),
                            _mm256_permute2x128_si256(quads[0], quads[kQuads - 1], 0x21));
  }
};

} // namespace
} // namespace q4metal::cpu
