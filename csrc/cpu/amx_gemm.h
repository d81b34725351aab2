// The GEMM through bfloat16 tiles: W is dequantized on the fly, 32 output features x kDepth k at a
// time (a panel, which stays in L1), and multiplied with all rows of x.
//
// A: 16 features x 32 k; B: 32 k x 16 rows of x, packed once by `prepare`. 2 x 2 tiles of sums.
// While one panel is multiplied, the vector unit dequantizes the next and transposes finished tiles
// to y; it has little else to do then. Between panels sums stay in memory as float32, unrounded, so
// each result is one sum over k in one order, whatever the number of rows.
//
// int8 uses it too: byte tiles are twice as fast, but every group's sums (one instruction deep)
// would have to leave the tiles for their scale, more vector work than both instructions take.
#pragma once

#include <cstdlib>
#include <memory>

#include "amx_vector.h"

namespace q4metal::cpu {
namespace {

constexpr int64_t kDepth = 256; // codes of a panel
constexpr int64_t kDepthUnits = kDepth / kUnit;
constexpr int64_t kPanelFeatures = 32, kPanelRows = 32; // 2 x 2 tiles
// A block's sums, 512 KB, and x of one depth, 256 KB, stay in L2.
constexpr int64_t kBlockFeatures = 256, kBlockRows = 512;
constexpr int64_t kStepValues = 2 * kTileBytes / 2; // bfloat16 of two tiles
constexpr int64_t kTileSums = 16 * 16;
constexpr int64_t kPanelSums = 4 * kTileSums;

constexpr int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// Packed x: [k / kDepth][row / 32][step][row / 16 % 2], each a B tile.
struct PackedX {
  uint16_t* values;
  int64_t row_panels, units;

  PackedX(const PackedMatrix& w, int64_t rows, std::byte* prepared)
      : values(reinterpret_cast<uint16_t*>(prepared)), row_panels(panels_of(rows)),
        units(units_of(w)) {}

  int64_t units_at(int64_t depth) const {
    return std::min(kDepthUnits, units - depth * kDepthUnits);
  }

  uint16_t* panel(int64_t depth, int64_t row_panel) const {
    return values +
           (depth * kDepthUnits * row_panels + units_at(depth) * row_panel) * 2 * kStepValues;
  }
};

inline size_t packed_x_bytes(const PackedMatrix& w, int64_t rows) {
  return panels_of(rows) * units_of(w) * 2 * kStepValues * sizeof(uint16_t);
}

template <int kBits>
void pack_rows(const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
               const PackedX& to) {
  for (int64_t m = first; m < last; m += kPanelRows)
    for (int64_t u = 0; u < to.units; ++u) {
      const int count = int(std::min<int64_t>(kUnit, w.in_features - u * kUnit));
      uint16_t* step =
          to.panel(u / kDepthUnits, m / kPanelRows) + u % kDepthUnits * 2 * kStepValues;
      for (int half = 0; half < 2; ++half, step += kTileBytes / 2) {
        const int64_t row = m + 16 * half;
        pack_unit<kBits>(x + std::min(row, rows - 1) * w.in_features + u * kUnit, w.in_features,
                         rows - row, count, step, step + kStepValues);
      }
    }
}

inline void pack_x(const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
                   std::byte* prepared) {
  const PackedX to(w, rows, prepared);
  if (w.bits == 4)
    pack_rows<4>(w, x, rows, first, last, to);
  else
    pack_rows<8>(w, x, rows, first, last, to); // all other widths are in natural order
}

// Dequantizes one panel in small steps: per step of 32 k, a row of two A tiles for each feature.
template <int kBits, int kGroup> class PanelWriter {
public:
  PanelWriter(const PackedMatrix& w, int64_t begin, int64_t end)
      : w_(w), begin_(begin), end_(end) {}

  // Features [n, n + 32) or up to the end; `to` is the panel.
  void start(int64_t n, int64_t depth, uint16_t* to) {
    n_ = n;
    last_ = std::min(n + kPanelFeatures, end_);
    unit_ = first_unit_ = depth * kDepthUnits;
    last_unit_ = std::min(first_unit_ + kDepthUnits, units_of(w_));
    to_ = to;
  }

  int64_t units() const { return (last_ - n_) * (last_unit_ - first_unit_); }

  // Dequantizes `count` more units.
  Q4_INLINE void advance(int64_t count) {
    for (; count > 0 && n_ < last_; --count)
      one();
  }

  void finish() { advance(units()); }

private:
  Q4_INLINE void one() {
    const int64_t k = unit_ * kUnit;
    if (unit_ == first_unit_)
      start_row();
    const int64_t group = (unit_ - first_unit_) * kUnit / kGroup;
    uint16_t* step = to_ + (unit_ - first_unit_) * 2 * kStepValues;
    dequantize_unit<kBits, kGroup>(w_.weight + n_ * w_.row_stride() + unit_ * unit_bytes(kBits),
                                   int(std::min<int64_t>(kUnit, w_.in_features - k)),
                                   scales_ + group, biases_ + group, step, step + kStepValues);
    if (++unit_ == last_unit_) {
      unit_ = first_unit_;
      to_ += kStep;
      ++n_;
    }
  }

  void start_row() {
    const int64_t g = first_unit_ * kUnit / kGroup;
    for (int64_t i = 0; i < kGroups; i += kLanes) {
      const int64_t count = std::max<int64_t>(w_.groups() - g - i, 0);
      const int64_t at = n_ * w_.groups() + g + i;
      widen_groups(w_.scales, w_.scales_dtype, at, count, scales_ + i);
      widen_groups(w_.biases, w_.scales_dtype, at, count, biases_ + i);
    }
    // Rows are read a few cache lines at a time, which no prefetcher foresees.
    constexpr int64_t kAhead = 16;
    const bool wraps = n_ + kAhead >= end_;
    const int64_t n = wraps ? begin_ + (n_ + kAhead - end_) : n_ + kAhead;
    const uint8_t* next = w_.weight + n * w_.row_stride() +
                          (first_unit_ + (wraps ? kDepthUnits : 0)) * unit_bytes(kBits);
    for (int64_t b = 0; b < kDepth * kBits / 8; b += 64)
      __builtin_prefetch(next + b);
    const int64_t at = (n * w_.groups() + g) * size_of(w_.scales_dtype);
    __builtin_prefetch(static_cast<const std::byte*>(w_.scales) + at);
    __builtin_prefetch(static_cast<const std::byte*>(w_.biases) + at);
  }

  // Groups of a panel's row, whole vectors of them.
  static constexpr int64_t kGroups = (kDepth / kGroup + kLanes - 1) / kLanes * kLanes;

  const PackedMatrix& w_;
  const int64_t begin_, end_;
  int64_t n_ = 0, last_ = 0, unit_ = 0, first_unit_ = 0, last_unit_ = 0;
  uint16_t* to_ = nullptr;
  alignas(64) float scales_[kGroups], biases_[kGroups];
};

// Transposes 2 x 2 tiles of finished sums to y, one a step.
class ResultWriter {
public:
  explicit ResultWriter(int64_t stride) : stride_(stride) {}

  void start(const float* sums, float* y, int64_t rows, int64_t features) {
    sums_ = sums;
    y_ = y;
    rows_ = rows;
    features_ = features;
    tile_ = 0;
  }

  Q4_INLINE void advance() {
    if (tile_ == 4)
      return;
    const int64_t m = tile_ % 2 * 16, n = tile_ / 2 * 16;
    if (m < rows_ && n < features_)
      write_tile(sums_ + tile_ * kTileSums, y_ + m * stride_ + n, stride_, rows_ - m,
                 features_ - n);
    ++tile_;
  }

  void finish() {
    while (tile_ < 4)
      advance();
  }

private:
  const int64_t stride_;
  const float* sums_ = nullptr;
  float* y_ = nullptr;
  int64_t rows_ = 0, features_ = 0;
  int tile_ = 4;
};

// Per thread: two panels and the sums of a block.
struct GemmScratch {
  static constexpr size_t kPanelBytes = kPanelFeatures * kDepth * sizeof(uint16_t);
  static constexpr size_t kSumsBytes = kBlockFeatures * kBlockRows * sizeof(float);

  std::byte* bytes =
      static_cast<std::byte*>(std::aligned_alloc(4096, 2 * kPanelBytes + kSumsBytes));

  GemmScratch() { // the tiles' rows past the last feature are multiplied too
    if (bytes == nullptr)
      throw std::bad_alloc();
    std::memset(bytes, 0, 2 * kPanelBytes);
  }
  ~GemmScratch() { std::free(bytes); }
  GemmScratch(const GemmScratch&) = delete;
  GemmScratch& operator=(const GemmScratch&) = delete;

  uint16_t* panel(int64_t i) const {
    return reinterpret_cast<uint16_t*>(bytes + i % 2 * kPanelBytes);
  }
  float* sums() const { return reinterpret_cast<float*>(bytes + 2 * kPanelBytes); }
};

inline const GemmScratch& gemm_scratch() {
  static thread_local GemmScratch scratch;
  return scratch;
}

// Tiles 0 to 3: sums of features i / 2 and rows i % 2; 4 and 5: W; 6 and 7: x.
template <typename Step>
Q4_INLINE void multiply_panel(Tiles& tiles, const uint16_t* w, const uint16_t* x, int64_t steps,
                              float* sums, bool first, const Step& beside) {
  if (first) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  } else {
    tiles.load<0>(sums);
    tiles.load<1>(sums + kTileSums);
    tiles.load<2>(sums + 2 * kTileSums);
    tiles.load<3>(sums + 3 * kTileSums);
  }
  for (int64_t s = 0; s < steps; ++s, w += kStepValues, x += kStepValues) {
    tiles.load<4>(w);
    tiles.load<6>(x);
    tiles.dot_bf16<0, 4, 6>();
    tiles.load<5>(w + kStepValues / 2);
    tiles.dot_bf16<2, 5, 6>();
    tiles.load<7>(x + kStepValues / 2);
    tiles.dot_bf16<1, 4, 7>();
    tiles.dot_bf16<3, 5, 7>();
    beside();
  }
  tiles.store<0>(sums);
  tiles.store<1>(sums + kTileSums);
  tiles.store<2>(sums + 2 * kTileSums);
  tiles.store<3>(sums + 3 * kTileSums);
}

// y[32 * first_row : 32 * last_row, begin:end).
template <int kBits, int kGroup>
void gemm_block(Tiles& tiles, const PackedMatrix& w, const PackedX& x, int64_t rows,
                int64_t first_row, int64_t last_row, float* y, int64_t begin, int64_t end) {
  const GemmScratch& scratch = gemm_scratch();
  const int64_t depths = (x.units + kDepthUnits - 1) / kDepthUnits;
  const int64_t panels = (end - begin + kPanelFeatures - 1) / kPanelFeatures;
  const int64_t row_panels = last_row - first_row;
  PanelWriter<kBits, kGroup> next(w, begin, end);
  ResultWriter results(w.out_features);
  next.start(begin, 0, scratch.panel(0));
  next.finish();
  for (int64_t i = 0; i < depths * panels; ++i) {
    const int64_t depth = i / panels, n = begin + i % panels * kPanelFeatures;
    const int64_t steps = 2 * x.units_at(depth);
    const uint16_t* panel = scratch.panel(i);
    if (i + 1 < depths * panels)
      next.start(begin + (i + 1) % panels * kPanelFeatures, (i + 1) / panels, scratch.panel(i + 1));
    const int64_t share = (next.units() + row_panels * steps - 1) / (row_panels * steps);
    for (int64_t r = first_row; r < last_row; ++r) {
      float* sums = scratch.sums() + (i % panels * row_panels + r - first_row) * kPanelSums;
      multiply_panel(tiles, panel, x.panel(depth, r), steps, sums, depth == 0,
                     [&]() __attribute__((always_inline)) {
                       next.advance(share);
                       results.advance();
                     });
      if (depth + 1 == depths) {
        results.finish();
        results.start(sums, y + r * kPanelRows * w.out_features + n, rows - r * kPanelRows,
                      end - n);
      }
    }
    next.finish();
  }
  results.finish();
}

inline void run_gemm(const PackedMatrix& w, const float*, const std::byte* prepared, int64_t rows,
                     float* y, int64_t begin, int64_t end) {
  const PackedX x(w, rows, const_cast<std::byte*>(prepared));
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile)
    shapes.set(tile, kTileRows, kTileRowBytes);
  Tiles tiles(shapes);
  for_format(w, [&]<int kBits, int kGroup>() {
    for (int64_t n = begin; n < end; n += kBlockFeatures)
      for (int64_t r = 0; r < x.row_panels; r += kBlockRows / kPanelRows)
        gemm_block<kBits, kGroup>(tiles, w, x, rows, r,
                                  std::min(r + kBlockRows / kPanelRows, x.row_panels), y, n,
                                  std::min(n + kBlockFeatures, end));
  });
}

} // namespace
} // namespace q4metal::cpu
