// The GEMM through bfloat16 tiles: W is dequantized on the fly, 32 output features x at most 512 k
// at a time (a panel, which stays in L1), and multiplied with all rows of x, which pass by from L2.
//
// A: 16 features x 32 k; B: 32 k x 16 rows of x, packed once by `prepare`. 2 x 2 tiles of sums.
// Between panels sums stay in memory as float32, unrounded, so each result is one sum over k in one
// order, whatever the number of rows.
//
// Dequantizing a panel piece by piece between tile instructions is no faster than at once: little
// overlaps with loads of tiles. Beside them the next panel's weights are fetched into L2, and
// finished tiles are transposed to y.
//
// int8 uses it too: byte tiles are twice as fast, but every group's sums (one instruction deep)
// would have to leave the tiles for their scale, more vector work than both instructions take.
#pragma once

#include <cstdlib>
#include <memory>

#include "amx_vector.h"
#include "prefetch.h"

namespace q4metal::cpu {
namespace {

constexpr int64_t kPanelFeatures = 32, kPanelRows = 32; // 2 x 2 tiles
// A block's sums, 256 KB, and x of one depth, 512 KB, stay in L2.
constexpr int64_t kBlockFeatures = 128, kBlockRows = 512;
constexpr int64_t kStepValues = 2 * kTileBytes / 2; // bfloat16 of two tiles
constexpr int64_t kTileSums = 16 * 16;
constexpr int64_t kPanelSums = 4 * kTileSums;

constexpr int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// k is cut into depths, as equal as whole groups and units allow: all have `most` units but the
// last, which may have fewer.
struct Depths {
  static constexpr int64_t kMostUnits = 8; // 512 codes

  int64_t units, count, most;

  explicit Depths(const PackedMatrix& w) : units(units_of(w)) {
    const int64_t group = std::max(w.group_size / kUnit, 1);
    count = (units + kMostUnits - 1) / kMostUnits;
    most = (units + count * group - 1) / (count * group) * group;
  }

  int64_t first(int64_t depth) const { return depth * most; }
  int64_t units_at(int64_t depth) const { return std::min(most, units - first(depth)); }
};

// Packed x: [depth][row / 32][step][row / 16 % 2], each a B tile.
struct PackedX {
  uint16_t* values;
  int64_t row_panels;
  Depths depths;

  PackedX(const PackedMatrix& w, int64_t rows, std::byte* prepared)
      : values(reinterpret_cast<uint16_t*>(prepared)), row_panels(panels_of(rows)), depths(w) {}

  uint16_t* panel(int64_t depth, int64_t row_panel) const {
    const int64_t units = depths.first(depth) * row_panels + depths.units_at(depth) * row_panel;
    return values + units * 2 * kStepValues;
  }
};

inline size_t packed_x_bytes(const PackedMatrix& w, int64_t rows) {
  return panels_of(rows) * units_of(w) * 2 * kStepValues * sizeof(uint16_t);
}

template <int kBits>
void pack_rows(const PackedMatrix& w, const float* x, int64_t rows, int64_t first, int64_t last,
               const PackedX& to) {
  const int64_t most = to.depths.most;
  for (int64_t m = first; m < last; m += kPanelRows)
    for (int64_t u = 0; u < to.depths.units; ++u) {
      const int count = int(std::min<int64_t>(kUnit, w.in_features - u * kUnit));
      uint16_t* step = to.panel(u / most, m / kPanelRows) + u % most * 2 * kStepValues;
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

// Dequantized W: [step][feature], each row of an A tile 32 values. Steps lie a cache line further
// apart than they need, so that a feature's rows are not all in the same few sets of L1.
struct Panel {
  static constexpr int64_t kStride = kStepValues + kStep; // of a step
  static constexpr int64_t kBytes = 2 * Depths::kMostUnits * kStride * int64_t(sizeof(uint16_t));

  uint16_t* values;

  const uint16_t* step(int64_t s) const { return values + s * kStride; }
  uint16_t* row(int64_t feature) const { return values + feature * kStep; }
};

// Which part of W a panel holds: features [n, n + count).
struct PanelPlace {
  int64_t n, count, depth;

  // Panel i of y[:, begin:end), of a depth all features.
  PanelPlace(int64_t i, int64_t begin, int64_t end) {
    const int64_t panels = (end - begin + kPanelFeatures - 1) / kPanelFeatures;
    n = begin + i % panels * kPanelFeatures;
    count = std::min(kPanelFeatures, end - n);
    depth = i / panels;
  }
};

template <int kBits, int kGroup>
void dequantize_panel(const PackedMatrix& w, const Depths& depths, const PanelPlace& place,
                      const Panel& to) {
  // Groups of a row, whole vectors of them.
  constexpr int64_t kMostGroups = Depths::kMostUnits * kUnit / kGroup;
  constexpr int64_t kGroups = (kMostGroups + kLanes - 1) / kLanes * kLanes;
  alignas(64) float scales[kGroups], biases[kGroups];
  const int64_t first = depths.first(place.depth), units = depths.units_at(place.depth);
  const int64_t groups = w.groups(), group = first * kUnit / kGroup, stride = w.row_stride();
  const DType dtype = w.scales_dtype;
  const void *const all_scales = w.scales, *const all_biases = w.biases;
  const uint8_t* row = w.weight + place.n * stride + first * unit_bytes(kBits);
  for (int64_t f = 0; f < place.count; ++f, row += stride) {
    for (int64_t i = 0; i < kGroups; i += kLanes) {
      const int64_t count = std::max<int64_t>(groups - group - i, 0);
      const int64_t at = (place.n + f) * groups + group + i;
      widen_groups(all_scales, dtype, at, count, scales + i);
      widen_groups(all_biases, dtype, at, count, biases + i);
    }
    uint16_t* step = to.row(f);
    for (int64_t u = 0; u < units; ++u, step += 2 * Panel::kStride) {
      const int count = int(std::min<int64_t>(kUnit, w.in_features - (first + u) * kUnit));
      dequantize_unit<kBits, kGroup>(row + u * unit_bytes(kBits), count,
                                     scales + u * kUnit / kGroup, biases + u * kUnit / kGroup, step,
                                     step + Panel::kStride);
    }
  }
}

// Fetches a panel's part of W into L2, a feature at a time: a few cache lines of each, which no
// prefetcher foresees.
class PanelFetcher {
public:
  PanelFetcher(const PackedMatrix& w, const Depths& depths) : w_(w), depths_(depths) {}

  void start(const PanelPlace& place) {
    const int64_t first = depths_.first(place.depth);
    n_ = place.n;
    last_ = place.n + place.count;
    offset_ = first * unit_bytes(w_.bits);
    bytes_ = depths_.units_at(place.depth) * unit_bytes(w_.bits);
    group_ = first * kUnit / w_.group_size;
  }

  int64_t left() const { return last_ - n_; }

  Q4_INLINE void advance(int64_t count) {
    for (; count > 0 && n_ < last_; --count, ++n_) {
      prefetch_lines(w_.weight + n_ * w_.row_stride() + offset_, bytes_);
      const int64_t at = (n_ * w_.groups() + group_) * size_of(w_.scales_dtype);
      prefetch_line(static_cast<const std::byte*>(w_.scales) + at);
      prefetch_line(static_cast<const std::byte*>(w_.biases) + at);
    }
  }

private:
  const PackedMatrix& w_;
  const Depths& depths_;
  int64_t n_ = 0, last_ = 0, offset_ = 0, bytes_ = 0, group_ = 0;
};

// Transposes 2 x 2 tiles of finished sums to y, one a step.
class ResultWriter {
public:
  ResultWriter(int64_t rows, int64_t stride) : stride_(stride), far_(rows * stride > kNear) {}

  // y [rows, features] will be written soon.
  void expect(const float* y, int64_t rows) {
    if (far_) {
      fetched_ = y;
      fetches_ = std::min(rows, kPanelRows);
    }
  }

  void start(const float* sums, float* y, int64_t rows, int64_t features) {
    finish();
    sums_ = sums;
    y_ = y;
    rows_ = rows;
    features_ = features;
    tile_ = 0;
  }

  Q4_INLINE void advance() {
    if (tile_ < 4)
      write();
    for (int i = 0; i < kFetchedRows && fetches_ > 0; ++i, --fetches_, fetched_ += stride_) {
      __builtin_prefetch(fetched_, 1);
      __builtin_prefetch(fetched_ + 16, 1);
    }
  }

  void finish() {
    while (tile_ < 4)
      write();
  }

private:
  static constexpr int64_t kNear = 256 << 10; // values of y that stay in L2
  static constexpr int kFetchedRows = 4;      // a step

  Q4_INLINE void write() {
    const int64_t m = tile_ % 2 * 16, n = tile_ / 2 * 16;
    if (m < rows_ && n < features_)
      write_tile(sums_ + tile_ * kTileSums, y_ + m * stride_ + n, stride_, rows_ - m,
                 features_ - n);
    ++tile_;
  }

  const int64_t stride_;
  const bool far_;
  const float* sums_ = nullptr;
  float* y_ = nullptr;
  int64_t rows_ = 0, features_ = 0;
  int tile_ = 4;
  const float* fetched_ = nullptr;
  int64_t fetches_ = 0;
};

// Per thread: a panel and the sums of a block.
struct GemmScratch {
  static constexpr size_t kPanelBytes = (Panel::kBytes + 4095) / 4096 * 4096;
  static constexpr size_t kSumsBytes = kBlockFeatures * kBlockRows * sizeof(float);

  std::byte* bytes = static_cast<std::byte*>(std::aligned_alloc(4096, kPanelBytes + kSumsBytes));

  GemmScratch() { // the tiles' rows past the last feature are multiplied too
    if (bytes == nullptr)
      throw std::bad_alloc();
    std::memset(bytes, 0, kPanelBytes);
  }
  ~GemmScratch() { std::free(bytes); }
  GemmScratch(const GemmScratch&) = delete;
  GemmScratch& operator=(const GemmScratch&) = delete;

  Panel panel() const { return {reinterpret_cast<uint16_t*>(bytes)}; }
  float* sums() const { return reinterpret_cast<float*>(bytes + kPanelBytes); }
};

inline const GemmScratch& gemm_scratch() {
  static thread_local GemmScratch scratch;
  return scratch;
}

// Tiles 0 to 3: sums of features i / 2 and rows i % 2; 4 and 5: W; 6 and 7: x.
template <typename Step>
Q4_INLINE void multiply_panel(Tiles& tiles, const Panel& w, const uint16_t* x, int64_t steps,
                              const Step& beside) {
  for (int64_t s = 0; s < steps; ++s, x += kStepValues) {
    tiles.load<4>(w.step(s));
    tiles.load_once<6>(x);
    tiles.dot_bf16<0, 4, 6>();
    tiles.load<5>(w.step(s) + kStepValues / 2);
    tiles.dot_bf16<2, 5, 6>();
    tiles.load_once<7>(x + kStepValues / 2);
    tiles.dot_bf16<1, 4, 7>();
    tiles.dot_bf16<3, 5, 7>();
    beside();
  }
}

// Stores a tile of sums and loads the one that is next in its place, zeros if null.
template <int kTile> Q4_INLINE void exchange_tile(Tiles& tiles, float* sums, const float* next) {
  tiles.store<kTile>(sums + kTile * kTileSums);
  if (next == nullptr)
    tiles.zero<kTile>();
  else
    tiles.load_once<kTile>(next + kTile * kTileSums);
}

// In the order in which products end and begin: one tile's way does not wait for another's.
Q4_INLINE void exchange_sums(Tiles& tiles, float* sums, const float* next) {
  exchange_tile<0>(tiles, sums, next);
  exchange_tile<2>(tiles, sums, next);
  exchange_tile<1>(tiles, sums, next);
  exchange_tile<3>(tiles, sums, next);
}

// y[32 * first_row : 32 * last_row, begin:end).
template <int kBits, int kGroup>
void gemm_block(Tiles& tiles, const PackedMatrix& w, const PackedX& x, int64_t rows,
                int64_t first_row, int64_t last_row, float* y, int64_t begin, int64_t end) {
  const GemmScratch& scratch = gemm_scratch();
  const Panel panel = scratch.panel();
  const int64_t panels = (end - begin + kPanelFeatures - 1) / kPanelFeatures;
  const int64_t row_panels = last_row - first_row, all_panels = x.depths.count * panels;
  // Of panel i of W and panel r of x; null where there are none yet. i and r may be past their end.
  const auto sums_of = [&](int64_t i, int64_t r) {
    const int64_t at = i * row_panels + r;
    return scratch.sums() + at % (panels * row_panels) * kPanelSums;
  };
  PanelFetcher fetcher(w, x.depths);
  ResultWriter results(rows, w.out_features);
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
  for (int64_t i = 0; i < all_panels; ++i) {
    const PanelPlace place(i, begin, end);
    const bool is_last = place.depth + 1 == x.depths.count;
    dequantize_panel<kBits, kGroup>(w, x.depths, place, panel);
    if (i + 1 < all_panels)
      fetcher.start(PanelPlace(i + 1, begin, end));
    const int64_t steps = 2 * x.depths.units_at(place.depth);
    const int64_t share = (fetcher.left() + row_panels * steps - 1) / (row_panels * steps);
    for (int64_t r = 0; r < row_panels; ++r) {
      const int64_t m = (first_row + r) * kPanelRows;
      float* const to = y + m * w.out_features + place.n;
      if (is_last)
        results.expect(to, rows - m);
      multiply_panel(tiles, panel, x.panel(place.depth, first_row + r), steps,
                     [&]() __attribute__((always_inline)) {
                       fetcher.advance(share);
                       results.advance();
                     });
      float* const sums = sums_of(i, r);
      const bool has_next = i * row_panels + r + 1 >= panels * row_panels;
      exchange_sums(tiles, sums, has_next ? sums_of(i, r + 1) : nullptr);
      if (is_last)
        results.start(sums, to, rows - m, end - place.n);
    }
  }
  results.finish();
}

// Every piece reads all of x: half as often where x leaves no room in an L2 cache of 2 MB.
inline int64_t gemm_piece(const PackedMatrix& w, int64_t rows) {
  return packed_x_bytes(w, rows) > 3 << 19 ? kBlockFeatures : kGemmPiece;
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
