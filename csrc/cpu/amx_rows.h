// Several rows of x through byte tiles, for fast and int8, in the canonical order of split.h: the
// same bits as every other matvec of these precisions.
//
// A: x as signed bytes, a tile row for each row of x and plane (x16 = 256 * high + low; int8 has
// one plane). B: the codes of 16 output features, unsigned bytes, four k a feature and tile row, as
// byte tiles want it: that order comes out of transposing the packed codes four bytes at a time. So
// one instruction gives the sums of one group for all rows (of half a group at group size 128), 16
// features a vector, and they join the running sums of lane g mod 16 without a shuffle. Biases are
// added up feature by feature, 16 groups a vector, whose sums stay in registers.
//
// A step is 64 codes of 16 features, 128 at group size 128. Four are under way at once: the codes
// of one are unpacked while the one before is in the tiles, the products of that before are stored
// and those of the first are added up, so that nothing waits for what was just written to memory.
#pragma once

#include <utility>

#include "amx_rows_vector.h"
#include "amx_rows_x.h"

namespace q4metal::cpu {
namespace {

constexpr int64_t kFewestTileRows = 2; // a single one is faster in vectors
constexpr int kMostRows = int(kMaxMatvecRows);

template <int kBits, int kGroup, Precision kPrecision> class TileRows {
public:
  TileRows(const PackedMatrix& w, const std::byte* prepared, int64_t rows)
      : w_(w), x_(w, rows, kPlanes, const_cast<std::byte*>(prepared)), rows_(rows),
        groups_(w.groups()), steps_((groups_ + kStepGroups - 1) / kStepGroups),
        stride_(w.row_stride()), tiles_(shapes(rows)) {
    const int64_t block = kLanes * stride_;
    ahead_ = (kPrefetchAhead + block - 1) / block * kLanes;
    if (groups_ < kSplitLanes) // lanes without a group
      std::memset(sums_, 0, sizeof sums_);
  }

  // Output features [n, n + 16) or up to `end`.
  void run(int64_t n, int64_t end, float* y) {
    n_ = n;
    features_ = int(std::min<int64_t>(kLanes, end - n));
    unpack(0);
    for (int64_t s = 0; s < steps_; ++s) {
      load(s);
      if (s > 0)
        store(s - 1);
      if (s + 1 < steps_)
        unpack(s + 1);
      multiply();
      if (s > 1)
        add(s - 2);
      fetch(s);
    }
    store(steps_ - 1);
    if (steps_ > 1)
      add(steps_ - 2);
    add(steps_ - 1);
    [&]<int... kLess>(std::integer_sequence<int, kLess...>) {
      ((rows_ == kLess + 1 ? add_biases_of<kLess + 1>() : void()), ...);
    }(std::make_integer_sequence<int, kMostRows>());
    for (int64_t m = 0; m < rows_; ++m)
      join_lanes(sums_ + m * kLanes, rows_ * kLanes, offsets_ + m * kLanes * kLanes, features_,
                 y + m * w_.out_features + n);
  }

private:
  static constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;
  static constexpr int kStepGroups = kGroup == 32 ? 2 : 1;
  static constexpr int kStepUnits = kGroup == 128 ? 2 : 1;
  static constexpr int kStepColumns = kStepUnits * kUnit;
  static constexpr int kTileDepth = std::min(kGroup, kUnit);

  // Tiles 0 and 1: products; 2 and 3: x; 4 and 5: codes. The second ones: at group size 32 for the
  // second group of a step, at 128 for the second half of its group.
  static TileShapes shapes(int64_t rows) {
    TileShapes shapes;
    for (int i = 0; i < 2; ++i) {
      shapes.set(i, int(kPlanes * rows), kTileRowBytes);
      shapes.set(2 + i, int(kPlanes * rows), kTileDepth);
      shapes.set(4 + i, kTileDepth / 4, kTileRowBytes);
    }
    return shapes;
  }

  Q4_INLINE void unpack(int64_t s) {
    const int64_t first = s * kStepColumns;
    const uint8_t* rows = w_.weight + n_ * stride_ + first * kBits / 8;
    auto& to = codes_[s % 2];
    if (features_ == kLanes && first + kStepColumns <= w_.in_features)
#pragma GCC unroll 2
      for (int u = 0; u < kStepUnits; ++u)
        unpack_tile<kBits, kGroup>(rows + u * unit_bytes(kBits), stride_, to[u]);
    else
      unpack_end(rows, int(std::min<int64_t>(kStepColumns, w_.in_features - first)), to);
  }

  // Fewer features, whose places repeat the last, or half a unit.
  void unpack_end(const uint8_t* rows, int columns, uint8_t (*to)[kTileBytes]) const {
    constexpr int64_t kBytes = unit_bytes(kBits);
    alignas(64) uint8_t copy[kLanes * kBytes] = {};
    for (int u = 0; u < kStepUnits; ++u, columns -= kUnit, rows += kBytes) {
      const int bytes = std::min(columns, kUnit) * kBits / 8;
      for (int f = 0; f < kLanes; ++f)
        std::memcpy(copy + f * kBytes, rows + std::min(f, features_ - 1) * stride_, bytes);
      unpack_tile<kBits, kGroup>(copy, kBytes, to[u]);
    }
  }

  Q4_INLINE void load(int64_t s) {
    const std::byte* x = x_.unit(s * kStepUnits);
    const uint8_t* codes = codes_[s % 2][0];
    tiles_.template load<2>(x);
    tiles_.template load<4>(codes);
    if constexpr (kGroup == 32) {
      tiles_.template load<3>(x + kTileDepth);
      tiles_.template load<5>(codes + kTileDepth / 4 * kTileRowBytes);
    } else if constexpr (kGroup == 128) {
      tiles_.template load<3>(x + x_.unit_bytes());
      tiles_.template load<5>(codes + kTileBytes);
    }
  }

  Q4_INLINE void multiply() {
    tiles_.template zero<0>();
    if constexpr (kGroup == 32)
      tiles_.template zero<1>();
    tiles_.template dot_bytes<0, 2, 4>();
    if constexpr (kGroup != 64)
      tiles_.template dot_bytes<kGroup == 32 ? 1 : 0, 3, 5>();
  }

  Q4_INLINE void store(int64_t s) {
    tiles_.template store<0>(products_[s % 2][0]);
    if constexpr (kGroup == 32)
      tiles_.template store<1>(products_[s % 2][1]);
  }

  Q4_INLINE void add(int64_t s) {
#pragma GCC unroll 2
    for (int i = 0; i < kStepGroups; ++i) {
      const int64_t g = s * kStepGroups + i, lane = g % kSplitLanes;
      if (kStepGroups > 1 && g == groups_)
        return;
      if (lane == 0)
        scales_.load(w_, n_ * groups_ + g, groups_, features_,
                     int(std::min<int64_t>(kLanes, groups_ - g)));
      const auto some = [&]<bool kFirst>() __attribute__((always_inline)) {
        add_group<kPlanes, kFirst>(products_[s % 2][i], scales_, w_.scales_dtype, lane,
                                   x_.scales + g * rows_, rows_, sums_ + lane * rows_ * kLanes);
      };
      g < kSplitLanes ? some.template operator()<true>() : some.template operator()<false>();
    }
  }

  template <int kRows> void add_biases_of() {
    for (int f = 0; f < features_; ++f)
      add_biases<kRows>(w_, (n_ + f) * groups_, groups_, x_.sums, offsets_ + f * kLanes);
  }

  // What lies as far into some blocks of 16 features ahead as this step into its own, if each is
  // read from beginning to end: one stream.
  Q4_INLINE void fetch(int64_t s) const {
    constexpr int64_t kBytes = kLanes * kStepColumns * kBits / 8;
    prefetch_lines(w_.weight + (n_ + ahead_) * stride_ + s * kBytes, kBytes);
    const int64_t group = (n_ + ahead_) * groups_ + s * kStepGroups * kLanes;
    const int64_t at = group * size_of(w_.scales_dtype);
    prefetch_line(static_cast<const std::byte*>(w_.scales) + at);
    prefetch_line(static_cast<const std::byte*>(w_.biases) + at);
  }

  const PackedMatrix w_;
  const PreparedRows x_;
  const int64_t rows_, groups_, steps_, stride_;
  int64_t ahead_, n_ = 0; // features
  int features_ = 0;
  Tiles tiles_;
  alignas(64) uint8_t codes_[2][kStepUnits][kTileBytes];
  alignas(64) int32_t products_[2][kStepGroups][kTileBytes / 4]; // [plane][row][feature]
  GroupScales scales_;
  alignas(64) float sums_[kSplitLanes * kMostRows * kLanes];    // [lane][row][feature]
  alignas(64) float offsets_[kMostRows * kLanes * kSplitLanes]; // [row][feature][lane]
};

template <Precision kPrecision> struct TileMatvec {
  static constexpr int kPlanes = kPrecision == Precision::int8 ? 1 : 2;

  static size_t prepared_bytes(const PackedMatrix& w, int64_t rows) {
    return PreparedRows::bytes(w, rows, kPlanes);
  }

  static void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
    const PreparedRows to(w, rows, kPlanes, prepared);
    for_format(w, [&]<int kBits, int kGroup>() {
      prepare_rows<kBits == 4 ? 4 : 8, kGroup, kPrecision>(w, x, rows, to);
    });
  }

  static void run(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y,
                  int64_t begin, int64_t end) {
    for_format(w, [&]<int kBits, int kGroup>() {
      TileRows<kBits, kGroup, kPrecision> kernel(w, prepared, rows);
      for (int64_t n = begin; n < end; n += kLanes)
        kernel.run(n, end, y);
    });
  }
};

} // namespace
} // namespace q4metal::cpu
