// The fast and the int8 matvec for AVX2: integer activations (split.h), integer sums per group,
// eight groups side by side (avx2_split.h).
//
// 4 bits: bytes hold codes 2j and 2j + 1, so x16 comes as two int8 planes, high and low, each split
// into even and odd k; int8 activations are the low plane alone. maddubs(15, -128) is at most 3840,
// so a lane of int16 takes eight of them before it is widened: 13.6 instructions for 64 weights.
// Other widths become int16 first (maddubs would saturate for 8 bits: 255 * 127 * 2 > 32767).
#include <array>

#include "avx2_split.h"

namespace q4metal::cpu {
namespace {

// Keeps the compiler from moving or regrouping what v is computed from.
Q4_INLINE __m256i in_order(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

// ---- one turn: eight groups of W

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

// ---- the sums t of many turns

// Some turns of some lines of W, for all rows of x.
struct Tile {
  const uint8_t* codes; // of the first line's first turn
  const uint8_t* end;   // of all codes of W
  int64_t line_bytes;   // from line to line
  int64_t ahead;        // bytes from a turn to what is to be prefetched
  const std::byte* x;   // of the first turn
  int64_t x_bytes;      // from row to row
  int64_t rows, lines, turns;
  int32_t* sums; // [lines, rows, turns * 8]
};

// The codes of a turn: in place, or in `copy` where reads would pass the end of the array.
template <typename T>
Q4_INLINE const uint8_t* readable(const uint8_t* turn, const uint8_t* end, uint8_t* copy) {
  if (end - turn >= T::kBytes + T::kOverread) [[likely]]
    return turn;
  std::memset(copy, 0, T::kBytes + T::kOverread);
  std::memcpy(copy, turn, std::clamp<int64_t>(end - turn, 0, T::kBytes));
  return copy;
}

template <typename T> Q4_INLINE void prefetch(const uint8_t* p) {
  for (int b = 0; b < T::kBytes; b += 64)
    prefetch_line(p + b);
}

Q4_INLINE void store(int32_t* to, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}

template <typename T> void sum_one(const Tile& tile) {
  alignas(32) uint8_t copy[T::kBytes + T::kOverread];
  const int64_t turns = tile.turns, ahead = tile.ahead;
  const uint8_t* const end = tile.end;
  int32_t* sums = tile.sums;
  for (int64_t line = 0; line < tile.lines; ++line) {
    const uint8_t* in_place = tile.codes + line * tile.line_bytes;
    const std::byte* x = tile.x;
    for (int64_t turn = 0; turn < turns; ++turn) {
      prefetch<T>(in_place + ahead);
      const uint8_t* codes = readable<T>(in_place, end, copy);
      __m256i quads[T::kQuads];
#pragma GCC unroll 8
      for (int b = 0; b < T::kBlocks; b += T::kAtOnce) {
        __m256i read[T::kAtOnce][4];
#pragma GCC unroll 8
        for (int i = 0; i < T::kAtOnce; ++i) {
          T::read(codes, b + i, read[i]);
          if (T::kCodeVectors == 8)
            for (__m256i& v : read[i])
              v = in_order(v);
        }
#pragma GCC unroll 8
        for (int i = 0; i < T::kAtOnce; ++i) {
          __m256i c[T::kCodeVectors];
          T::unpack(read[i], c);
          const __m256i sum = T::dot(c, x + (b + i) * T::kBlockX);
          __m256i& quad = quads[(b + i) / T::kChunks];
          quad = (b + i) % T::kChunks == 0 ? sum : _mm256_add_epi32(quad, sum);
        }
      }
      store(sums, T::join(quads));
      sums += kTurnGroups;
      in_place += T::kBytes;
      x += T::kTurnX;
    }
  }
}

template <typename T> void sum_several(const Tile& tile) {
  alignas(32) uint8_t copy[T::kBytes + T::kOverread];
  const int64_t rows = tile.rows, x_bytes = tile.x_bytes, stride = tile.turns * kTurnGroups;
  for (int64_t turn = 0; turn < tile.turns; ++turn)
    for (int64_t line = 0; line < tile.lines; ++line) {
      const uint8_t* in_place = tile.codes + line * tile.line_bytes + turn * T::kBytes;
      prefetch<T>(in_place + tile.ahead);
      const uint8_t* codes = readable<T>(in_place, tile.end, copy);
      __m256i quads[kMaxMatvecRows][T::kQuads];
#pragma GCC unroll 16
      for (int b = 0; b < T::kBlocks; ++b) {
        __m256i read[4], c[T::kCodeVectors];
        T::read(codes, b, read);
        T::unpack(read, c);
        const std::byte* x = tile.x + turn * T::kTurnX + b * T::kBlockX;
        for (int64_t m = 0; m < rows; ++m, x += x_bytes) {
          const __m256i sum = T::dot(c, x);
          __m256i& quad = quads[m][b / T::kChunks];
          quad = b % T::kChunks == 0 ? sum : _mm256_add_epi32(quad, sum);
        }
      }
      int32_t* sums = tile.sums + line * rows * stride + turn * kTurnGroups;
      for (int64_t m = 0; m < rows; ++m, sums += stride)
        store(sums, T::join(quads[m]));
    }
}

template <int kPlanes> void sum_turns(const PackedMatrix& w, const Tile& tile) {
  for_format(w, [&]<int kBits, int kGroup>() {
    // Only 4 bits have planes: one instance serves both precisions of the other widths.
    using T = Turn<kBits, kGroup, kBits == 4 ? kPlanes : 2>;
    tile.rows == 1 ? sum_one<T>(tile) : sum_several<T>(tile);
  });
}

// ---- from sums to y

// The sums of one row of W and one of x; lanes as in split.h.
struct Lanes {
  __m256 acc[2], off[2];

  // Eight groups.
  Q4_INLINE void add(const int32_t* t, __m256 scale, __m256 bias, const float* x_scales,
                     const float* x_sums, int half) {
    const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(x_scales));
    acc[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(t)), factor, acc[half]);
    off[half] = _mm256_fmadd_ps(bias, _mm256_loadu_ps(x_sums), off[half]);
  }
  // Both trees at once, one in each half.
  Q4_INLINE float result() const {
    const __m256 a = _mm256_add_ps(acc[0], acc[1]), b = _mm256_add_ps(off[0], off[1]);
    const __m256 four =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    const __m256 two = _mm256_add_ps(four, _mm256_permute_ps(four, 0x0e));
    const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1)));
  }
};

// Sums of groups [group, group + groups) of some rows of W, for one or several rows of x.
struct Sums {
  const PackedMatrix& w;
  const PreparedRow& row;
  const std::byte* x;
  int64_t rows; // of x
  int64_t group, groups;
  bool is_first, is_last; // of the rows' groups

  // Adds those of row n of W to `lanes` [rows]; t [rows, stride].
  template <DType kDType, bool kSeveral>
  Q4_INLINE void add(int64_t n, const int32_t* t, int64_t stride, Lanes* lanes, float* y) const {
    const int64_t count = kSeveral ? rows : 1;
    Lanes own[kSeveral ? kMaxMatvecRows : 1];
    for (int64_t m = 0; m < count; ++m)
      own[m] = is_first ? Lanes{} : lanes[m];
    const auto eight = [&]<bool kAll>(int64_t g, int half) __attribute__((always_inline)) {
      const int64_t at = n * row.groups + group + g;
      __m256 scale, bias;
      if constexpr (kAll) {
        scale = load8(static_cast<const std::byte*>(w.scales) + at * size_of(kDType), kDType);
        bias = load8(static_cast<const std::byte*>(w.biases) + at * size_of(kDType), kDType);
      } else {
        scale = load_groups(w, w.scales, at, groups - g);
        bias = load_groups(w, w.biases, at, groups - g);
      }
      for (int64_t m = 0; m < count; ++m) {
        const std::byte* xm = x + m * row.bytes();
        own[m].add(t + m * stride + g, scale, bias, row.scales(xm) + group + g,
                   row.sums(xm) + group + g, half);
      }
    };
    int64_t g = 0;
    for (; g + 16 <= groups; g += 16) {
      eight.template operator()<true>(g, 0);
      eight.template operator()<true>(g + 8, 1);
    }
    if (g + 8 <= groups) {
      eight.template operator()<true>(g, 0);
      g += 8;
      if (g < groups)
        eight.template operator()<false>(g, 1);
    } else if (g < groups) {
      eight.template operator()<false>(g, 0);
    }
    for (int64_t m = 0; m < count; ++m)
      if (is_last)
        y[m * w.out_features + n] = own[m].result();
      else
        lanes[m] = own[m];
  }
};

// One row of x and whole rows of W: nothing is carried from tile to tile.
template <DType kDType> struct OneRow {
  const PackedMatrix& w;
  const int64_t groups, whole; // of a row, and of those in vectors of eight
  const __m256 mask;           // of the groups in the last vector
  const float *x_scales, *x_sums;

  OneRow(const PackedMatrix& matrix, const PreparedRow& row, const std::byte* x)
      : w(matrix), groups(row.groups), whole(row.groups / 8 * 8), mask(group_mask(row.groups % 8)),
        x_scales(row.scales(x)), x_sums(row.sums(x)) {}

  // Row n of W times x, t [groups].
  Q4_INLINE float result(int64_t n, const int32_t* t) const {
    constexpr int64_t kSize = size_of(kDType);
    const auto* scales = static_cast<const std::byte*>(w.scales) + n * groups * kSize;
    const auto* biases = static_cast<const std::byte*>(w.biases) + n * groups * kSize;
    Lanes lanes{};
    int64_t g = 0;
    for (; g + 16 <= whole; g += 16) {
      lanes.add(t + g, load8(scales + g * kSize, kDType), load8(biases + g * kSize, kDType),
                x_scales + g, x_sums + g, 0);
      lanes.add(t + g + 8, load8(scales + (g + 8) * kSize, kDType),
                load8(biases + (g + 8) * kSize, kDType), x_scales + g + 8, x_sums + g + 8, 1);
    }
    if (g < whole) {
      lanes.add(t + g, load8(scales + g * kSize, kDType), load8(biases + g * kSize, kDType),
                x_scales + g, x_sums + g, 0);
      g += 8;
      if (g < groups)
        rest(lanes, scales + g * kSize, biases + g * kSize, n, t, g, 1);
    } else if (g < groups) {
      rest(lanes, scales + g * kSize, biases + g * kSize, n, t, g, 0);
    }
    return lanes.result();
  }

  Q4_INLINE void rest(Lanes& lanes, const std::byte* scales, const std::byte* biases, int64_t n,
                      const int32_t* t, int64_t g, int half) const {
    __m256 scale, bias;
    if (n * groups + g + 8 <= w.out_features * groups) [[likely]] {
      scale = _mm256_and_ps(load8(scales, kDType), mask);
      bias = _mm256_and_ps(load8(biases, kDType), mask);
    } else {
      scale = load_groups(w, w.scales, n * groups + g, groups - g);
      bias = load_groups(w, w.biases, n * groups + g, groups - g);
    }
    lanes.add(t + g, scale, bias, x_scales + g, x_sums + g, half);
  }
};

// How much of W one tile takes.
struct TileShape {
  static constexpr int64_t kMaxSums = 2560, kOneRowSums = 1024, kManyLines = 8, kTileX = 16384;
  int64_t lines, turns;

  // One row of x: lines one after another. Several: the turns of x that fit the L1 cache meet
  // eight lines.
  TileShape(const PreparedRow& row, int64_t rows) {
    turns = row.turns;
    if (rows == 1) {
      turns = std::min(turns, kOneRowSums / kTurnGroups);
      lines = std::max<int64_t>(kOneRowSums / (turns * kTurnGroups), 1);
    } else if (row.rows > 1) {
      lines = std::max<int64_t>(kMaxSums / (rows * turns * kTurnGroups), 1);
    } else {
      lines = kManyLines;
      // An even number: the next tile begins with lane 0 of the 16.
      const int64_t fitting =
          std::min(kTileX / (rows * row.turn_bytes), kMaxSums / (lines * rows * kTurnGroups));
      turns = std::min(turns, std::max<int64_t>(fitting / 2, 1) * 2);
    }
  }
};

template <int kPlanes, DType kDType, bool kSeveral>
void matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
            int64_t end) {
  const PreparedRow row(w, kPlanes);
  const TileShape shape(row, rows);
  const OneRow<kDType> one_row(w, row, prepared);
  const int64_t line_bytes = row.rows * w.row_stride();
  const int64_t turn_codes = kTurnGroups * w.group_size * w.bits / 8;
  alignas(32) int32_t sums[TileShape::kMaxSums + kTurnGroups];
  alignas(32) Lanes lanes[TileShape::kManyLines * kMaxMatvecRows];
  for (int64_t n = begin; n < end;) {
    const int64_t lines = std::clamp<int64_t>((end - n) / row.rows, 1, shape.lines);
    const int64_t line_rows = std::min(row.rows, end - n);
    const int64_t all_turns = (line_rows * row.groups + kTurnGroups - 1) / kTurnGroups;
    for (int64_t turn = 0; turn < all_turns; turn += shape.turns) {
      const int64_t turns = std::min(shape.turns, all_turns - turn);
      const bool is_last = turn + turns == all_turns;
      const int64_t next = is_last ? lines * line_bytes - turn * turn_codes : turns * turn_codes;
      sum_turns<kPlanes>(w, {w.weight + n * w.row_stride() + turn * turn_codes,
                             w.weight + w.out_features * w.row_stride(), line_bytes,
                             kSeveral ? next : kPrefetchAhead, prepared + turn * row.turn_bytes,
                             row.bytes(), rows, lines, turns, sums});
      const int64_t stride = turns * kTurnGroups;
      if (!kSeveral && turns == all_turns) {
        for (int64_t line = 0; line < lines; ++line)
          for (int64_t r = 0; r < line_rows; ++r) {
            const int64_t at = n + line * row.rows + r;
            y[at] = one_row.result(at, sums + line * stride + r * row.groups);
          }
        continue;
      }
      const int64_t group = turn * kTurnGroups;
      const Sums part{
          w, row, prepared, rows, group, std::min(row.groups - group, stride), turn == 0, is_last};
      for (int64_t line = 0; line < lines; ++line)
        for (int64_t r = 0; r < line_rows; ++r)
          part.add<kDType, kSeveral>(n + line * row.rows + r,
                                     sums + line * rows * stride + r * row.groups, stride,
                                     lanes + line * rows, y);
    }
    n += std::min(lines * row.rows, end - n);
  }
}

template <int kPlanes, bool kSeveral>
void matvec_rows(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                 int64_t begin, int64_t end) {
  switch (w.scales_dtype) {
  case DType::f32:
    return matvec<kPlanes, DType::f32, kSeveral>(w, prepared, rows, y, begin, end);
  case DType::f16:
    return matvec<kPlanes, DType::f16, kSeveral>(w, prepared, rows, y, begin, end);
  case DType::bf16:
    return matvec<kPlanes, DType::bf16, kSeveral>(w, prepared, rows, y, begin, end);
  }
}

} // namespace

template <Precision kPrecision>
void Avx2Matvec<kPrecision>::run(const PackedMatrix& w, const std::byte* prepared, int64_t rows,
                                 float* y, int64_t begin, int64_t end) {
  constexpr int kPlanes = planes_of(kPrecision);
  rows == 1 ? matvec_rows<kPlanes, false>(w, prepared, rows, y, begin, end)
            : matvec_rows<kPlanes, true>(w, prepared, rows, y, begin, end);
}

template void Avx2Matvec<Precision::fast>::run(const PackedMatrix&, const std::byte*, int64_t,
                                               float*, int64_t, int64_t);
template void Avx2Matvec<Precision::int8>::run(const PackedMatrix&, const std::byte*, int64_t,
                                               float*, int64_t, int64_t);

} // namespace q4metal::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
