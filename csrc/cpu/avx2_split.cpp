// The fast and the int8 matvec for AVX2: integer activations (split.h), integer sums per group,
// eight groups side by side (avx2_split.h, avx2_turn.h), in tiles of W whose sums stay in the L1
// cache until they are scaled (avx2_lanes.h).
#include <array>

#include "avx2_lanes.h"
#include "avx2_turn.h"

namespace q4metal::cpu {
namespace {

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
      prefetch_lines(in_place + ahead, T::kBytes);
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
      prefetch_lines(in_place + tile.ahead, T::kBytes);
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

// ---- tiles of W, and y

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
