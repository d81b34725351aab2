// Tile registers: eight of 16 rows of 64 bytes. One interface, two implementations: the registers
// of AMX where Q4_AMX_TILES is 1, else plain C++ with the same results, for tests on any CPU.
//
// The emulation follows Intel's manual: dot_bytes wraps around in int32; dot_bf16 keeps the sums of
// even and of odd k apart, rounds each step to nearest even, joins them once per instruction, and
// takes subnormal numbers, operands and results alike, for zero. Not emulated: faults (a shape that
// does not fit is undefined here) and rows and columns past a tile's shape, which are kept here and
// zeroed by the hardware.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float_types.h"
#include "kernels.h"

namespace q4metal::cpu {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int tile_rows, int tile_row_bytes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(tile_row_bytes);
  }
};

// Subnormal numbers count as zero in bfloat16 arithmetic.
inline float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

#if Q4_AMX_TILES

// Inline assembly: GCC's intrinsics paste their register number as text, so that it cannot be a
// template argument, and their loads do not tell the compiler that they read memory.
class Tiles {
public:
  explicit Tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
  // Tiles in use make every context switch save 8 KB.
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile> Q4_INLINE void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(kTile)); }

  template <int kTile> Q4_INLINE void load(const void* from, int64_t stride = kTileRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }

  // The same for what passes by: it takes less room in the L1 cache.
  template <int kTile> Q4_INLINE void load_once(const void* from) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(int64_t(kTileRowBytes)), "i"(kTile)
                 : "memory");
  }

  template <int kTile> Q4_INLINE void store(void* to, int64_t stride = kTileRowBytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }

  // C[m][n] += sum over k of A[m][k] * B[k / 4][n][k % 4]: A signed bytes, B unsigned, C int32.
  template <int kC, int kA, int kB> Q4_INLINE void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }

  // C[m][n] += sum over k of A[m][k] * B[k / 2][n][k % 2]: A and B bfloat16, C float32.
  template <int kC, int kA, int kB> Q4_INLINE void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

#else

class Tiles {
public:
  explicit Tiles(const TileShapes& shapes) : shapes_(shapes) {
    std::memset(tiles_, 0, sizeof tiles_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile> void zero() { std::memset(tiles_[kTile], 0, kTileBytes); }

  template <int kTile> void load(const void* from, int64_t stride = kTileRowBytes) {
    for (int r = 0; r < shapes_.rows[kTile]; ++r)
      std::memcpy(tiles_[kTile] + r * kTileRowBytes,
                  static_cast<const std::byte*>(from) + r * stride, shapes_.row_bytes[kTile]);
  }

  template <int kTile> void load_once(const void* from) { load<kTile>(from); }

  template <int kTile> void store(void* to, int64_t stride = kTileRowBytes) const {
    for (int r = 0; r < shapes_.rows[kTile]; ++r)
      std::memcpy(static_cast<std::byte*>(to) + r * stride, tiles_[kTile] + r * kTileRowBytes,
                  shapes_.row_bytes[kTile]);
  }

  template <int kC, int kA, int kB> void dot_bytes() {
    for (int m = 0; m < shapes_.rows[kC]; ++m) {
      uint32_t sums[16];
      std::memcpy(sums, row<kC>(m), sizeof sums);
      for (int k = 0; k < shapes_.row_bytes[kA]; ++k) {
        const int a = int8_t(row<kA>(m)[k]);
        const uint8_t* b = row<kB>(k / 4);
        for (int n = 0; n < shapes_.row_bytes[kC] / 4; ++n)
          sums[n] += uint32_t(a * b[4 * n + k % 4]);
      }
      std::memcpy(row<kC>(m), sums, sizeof sums);
    }
  }

  template <int kC, int kA, int kB> void dot_bf16() {
    for (int m = 0; m < shapes_.rows[kC]; ++m) {
      float even[16] = {}, odd[16] = {}, sums[16];
      for (int pair = 0; pair < shapes_.row_bytes[kA] / 4; ++pair) {
        const float a0 = element<kA>(m, 2 * pair), a1 = element<kA>(m, 2 * pair + 1);
        // A product of two bfloat16 is exact in float32 (unless it is flushed), so this rounds
        // once, as the hardware does.
        for (int n = 0; n < shapes_.row_bytes[kC] / 4; ++n) {
          even[n] = flushed(even[n] + a0 * element<kB>(pair, 2 * n));
          odd[n] = flushed(odd[n] + a1 * element<kB>(pair, 2 * n + 1));
        }
      }
      std::memcpy(sums, row<kC>(m), sizeof sums);
      for (int n = 0; n < shapes_.row_bytes[kC] / 4; ++n)
        sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
      std::memcpy(row<kC>(m), sums, sizeof sums);
    }
  }

private:
  template <int kTile> uint8_t* row(int r) { return tiles_[kTile] + r * kTileRowBytes; }

  template <int kTile> float element(int r, int index) const {
    uint16_t bits;
    std::memcpy(&bits, tiles_[kTile] + r * kTileRowBytes + 2 * index, sizeof bits);
    return flushed(widen(BFloat16{bits}));
  }

  TileShapes shapes_;
  alignas(64) uint8_t tiles_[8][kTileBytes];
};

#endif

} // namespace
} // namespace q4metal::cpu
