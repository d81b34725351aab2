// NEON kernels, float32 arithmetic throughout, and the table.
//
// Matvec sums (code - centre) * x and adds (bias + centre * scale) * sum(x): with plain codes two
// large sums would cancel at the end. The centre is taken off 16 bytes at a time, before they are
// widened to floats.
#include "neon_gemm.h" // from here on everything compiles for NEON with dot products

#include "vector_kernels.h"

namespace q4metal::cpu {
namespace {

constexpr int centre(int bits) { return 1 << (bits - 1); }

// ---- 1 to 8 rows

// A prepared row: x, per 32 columns in the order of Width::load, then a sum per group, padded with
// zeros to whole vectors.
int64_t prepared_row(const PackedMatrix& w) { return w.in_features + (w.groups() + 3) / 4 * 4; }

size_t prepared_bytes(const PackedMatrix& w, int64_t rows) {
  return rows * prepared_row(w) * sizeof(float);
}

void prepare(const PackedMatrix& w, const float* x, int64_t rows, std::byte* prepared) {
  for (int64_t m = 0; m < rows; ++m, x += w.in_features) {
    float* out = reinterpret_cast<float*>(prepared) + m * prepared_row(w);
    float* sums = out + w.in_features;
    std::fill(sums, out + prepared_row(w), 0.0f);
    for (int64_t g = 0; g < w.groups(); ++g) {
      float32x4_t sum = vdupq_n_f32(0);
      for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; k += 4)
        sum = vaddq_f32(sum, vld1q_f32(x + k));
      sums[g] = vaddvq_f32(sum);
    }
    if (w.bits != 4) {
      std::copy(x, x + w.in_features, out);
      continue;
    }
    for (int64_t k = 0; k < w.in_features; k += 32)
      for (int i = 0; i < 16; i += 4) {
        const float32x4x2_t pairs = vld2q_f32(x + k + 2 * i);
        vst1q_f32(out + k + i, pairs.val[0]);
        vst1q_f32(out + k + 16 + i, pairs.val[1]);
      }
  }
}

// 16 bytes to floats.
Q4_INLINE void to_floats(int8x16_t bytes, float32x4_t* out) {
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  out[1] = vcvtq_f32_s32(vmovl_high_s16(low));
  out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  out[3] = vcvtq_f32_s32(vmovl_high_s16(high));
}

// Rows of W times kRows rows of x.
template <int kRows, typename Width, typename Group> struct RowProduct {
  const PackedMatrix& w;
  const Width& width;
  const Group group;
  const float* x;
  const int64_t stride = prepared_row(w), groups = w.groups();
  const uint8x16_t middle = vdupq_n_u8(uint8_t(centre(w.bits)));

  // The sums of one group in four lanes each.
  Q4_INLINE void group_lanes(const uint8_t* packed, const float* at, float32x4_t* out) const {
    float32x4_t sums[kRows][4];
    for (int m = 0; m < kRows; ++m)
      for (int i = 0; i < 4; ++i)
        sums[m][i] = vdupq_n_f32(0);
    for (int k = 0; k < group; k += 32, packed += width.run_bytes(), at += 32) {
      uint8x16_t codes[2];
      width.load(packed, codes);
      for (int half = 0; half < 2; ++half) {
        float32x4_t values[4];
        to_floats(vreinterpretq_s8_u8(vsubq_u8(codes[half], middle)), values);
        for (int m = 0; m < kRows; ++m)
          for (int i = 0; i < 4; ++i)
            sums[m][i] =
                vfmaq_f32(sums[m][i], values[i], vld1q_f32(at + m * stride + 16 * half + 4 * i));
      }
    }
    for (int m = 0; m < kRows; ++m)
      out[m] = vaddq_f32(vaddq_f32(sums[m][0], sums[m][1]), vaddq_f32(sums[m][2], sums[m][3]));
  }

  // Groups [g, g + 4) of row n, of which `count` exist.
  Q4_INLINE void add_groups(int64_t n, int64_t g, int64_t count, float32x4_t* totals,
                            float32x4_t* offsets) const {
    const int64_t group_bytes = group / 32 * width.run_bytes();
    const uint8_t* packed = w.weight + n * w.row_stride() + g * group_bytes;
    const float32x4_t scale = load_groups(w, w.scales, n * groups + g, count);
    const float32x4_t offset =
        vfmaq_n_f32(load_groups(w, w.biases, n * groups + g, count), scale, float(centre(w.bits)));
    unrolled<4>([&]<typename Lane>(Lane) __attribute__((always_inline)) {
      constexpr int kLane = Lane::value;
      if (kLane >= count)
        return;
      __builtin_prefetch(packed + kPrefetchAhead);
      float32x4_t lanes[kRows];
      group_lanes(packed + kLane * group_bytes, x + (g + kLane) * group, lanes);
      for (int m = 0; m < kRows; ++m)
        totals[m] = vfmaq_laneq_f32(totals[m], lanes[m], scale, kLane);
    });
    for (int m = 0; m < kRows; ++m)
      offsets[m] = vfmaq_f32(offsets[m], offset, vld1q_f32(x + m * stride + w.in_features + g));
  }

  void run(float* y, int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      float32x4_t totals[kRows], offsets[kRows];
      for (int m = 0; m < kRows; ++m)
        totals[m] = offsets[m] = vdupq_n_f32(0);
      int64_t g = 0;
      for (; g + 4 <= groups; g += 4)
        add_groups(n, g, 4, totals, offsets);
      if (g < groups)
        add_groups(n, g, groups - g, totals, offsets);
      for (int m = 0; m < kRows; ++m)
        y[m * w.out_features + n] = vaddvq_f32(totals[m]) + vaddvq_f32(offsets[m]);
    }
  }
};

void matvec(const PackedMatrix& w, const std::byte* prepared, int64_t rows, float* y, int64_t begin,
            int64_t end) {
  const float* x = reinterpret_cast<const float*>(prepared);
  for_format(w, [&]<typename Width, typename Group>(const Width& width, Group group) {
    for_matvec_tiles(rows, begin, end, [&]<int kRows>(int64_t m, int64_t first, int64_t last) {
      RowProduct<kRows, Width, Group>{w, width, group, x + m * prepared_row(w)}.run(
          y + m * w.out_features, first, last);
    });
  });
}

// ---- more rows

struct PlainX {
  const float* x;
  int64_t columns;
};

struct DenseTile {
  static constexpr int64_t kChunk = 256; // 16 KB of W
  static constexpr int64_t kBlock =
      64; // columns of a running sum: over 256 it lost digits (1.7e-6)

  alignas(64) float dense[kChunk][kTileColumns];

  template <typename Width>
  void expand(const Width& width, const PackedMatrix& w, int64_t n, int64_t end, int64_t k,
              int64_t columns) {
    const TileOfW rows(w, n, end);
    for (int64_t first = 0; first < columns; first += w.group_size)
      for (int f = 0; f < kTileColumns; f += 4) {
        const float32x4_t scale = rows.scales(f, (k + first) / w.group_size);
        const float32x4_t bias = rows.biases(f, (k + first) / w.group_size);
        for (int64_t run = first; run < first + w.group_size; run += 32) {
          uint8x16_t quads[8];
          quads_of_codes(width, rows, f, k + run, quads);
          for (int q = 0; q < 8; ++q)
            unrolled<4>([&]<typename Byte>(Byte) __attribute__((always_inline)) {
              const int at = 4 * q + Byte::value; // in the order of Width::load
              const int64_t column = run + (Width::kEvenOdd ? at % 16 * 2 + at / 16 : at);
              vst1q_f32(dense[column] + f,
                        vfmaq_f32(bias, byte_to_float<Byte::value>(quads[q]), scale));
            });
        }
      }
  }

  // Byte kByte of each 32-bit lane; the conversion divides by its place.
  template <int kByte> Q4_INLINE static float32x4_t byte_to_float(uint8x16_t quad) {
    const uint32x4_t v = vandq_u32(vreinterpretq_u32_u8(quad), vdupq_n_u32(255u << 8 * kByte));
    if constexpr (kByte == 0)
      return vcvtq_f32_u32(v);
    else
      return vcvtq_n_f32_u32(v, 8 * kByte);
  }

  template <int kRows>
  void multiply(const PlainX& x, int64_t m, int64_t k, int64_t columns, float* y,
                int64_t stride) const {
    for (int64_t c = 0; c < columns; c += kBlock)
      multiply_block<kRows>(x.x + m * x.columns + k + c, x.columns, dense + c,
                            std::min(kBlock, columns - c), y, stride);
  }

  template <int kRows>
  static void multiply_block(const float* x, int64_t x_stride, const float (*w)[kTileColumns],
                             int64_t columns, float* y, int64_t stride) {
    float32x4_t sums[kRows][4];
    unrolled<4 * kRows>(
        [&](int i) __attribute__((always_inline)) { sums[i / 4][i % 4] = vdupq_n_f32(0); });
    for (int64_t c = 0; c < columns; c += 4) {
      float32x4_t row[kRows];
      unrolled<kRows>(
          [&](int r) __attribute__((always_inline)) { row[r] = vld1q_f32(x + r * x_stride + c); });
      unrolled<4>([&]<typename Lane>(Lane) __attribute__((always_inline)) {
        unrolled<4>([&](int f) __attribute__((always_inline)) {
          const float32x4_t v = vld1q_f32(w[c + Lane::value] + 4 * f);
          unrolled<kRows>([&](int r) __attribute__((always_inline)) {
            sums[r][f] = vfmaq_laneq_f32(sums[r][f], v, row[r], Lane::value);
          });
        });
      });
    }
    unrolled<4 * kRows>([&](int i) __attribute__((always_inline)) {
      float* out = y + i / 4 * stride + i % 4 * 4;
      vst1q_f32(out, vaddq_f32(vld1q_f32(out), sums[i / 4][i % 4]));
    });
  }
};

size_t nothing_prepared(const PackedMatrix&, int64_t) { return 0; }
void prepare_nothing(const PackedMatrix&, const float*, int64_t, int64_t, int64_t, std::byte*) {}

void gemm(const PackedMatrix& w, const float* x, const std::byte*, int64_t rows, float* y,
          int64_t begin, int64_t end) {
  for_width(w, [&](const auto& width) {
    multiply_all<DenseTile>(w, width, PlainX{x, w.in_features}, rows, y, begin, end);
  });
}

// ---- y = x W: rows of W are added up, so columns are shared out and every thread walks all rows

// Sums of 16 before they join the total: one running float32 sum over 152,064 rows loses digits.
constexpr int64_t kDepth = 16, kColumnBlock = 512;

// W[n, begin:end) in float32; begin and end are multiples of the group size.
template <typename Width>
void expand_row(const PackedMatrix& w, const Width& width, int64_t n, int64_t begin, int64_t end,
                float* out) {
  const uint8_t* packed = w.weight + n * w.row_stride() + begin / 32 * width.run_bytes();
  for (int64_t k = begin; k < end; k += 32, packed += width.run_bytes(), out += 32) {
    const int64_t g = n * w.groups() + k / w.group_size;
    const float32x4_t scale = vdupq_n_f32(widen_at(w.scales, w.scales_dtype, g));
    const float32x4_t bias = vdupq_n_f32(widen_at(w.biases, w.scales_dtype, g));
    uint8x16_t codes[2];
    width.load(packed, codes);
    if constexpr (Width::kEvenOdd) {
      const uint8x16_t even = codes[0], odd = codes[1];
      codes[0] = vzip1q_u8(even, odd);
      codes[1] = vzip2q_u8(even, odd);
    }
    for (int half = 0; half < 2; ++half) {
      // As signed bytes from -128 on; 128 is exact in float32.
      float32x4_t values[4];
      to_floats(vreinterpretq_s8_u8(veorq_u8(codes[half], vdupq_n_u8(0x80))), values);
      for (int i = 0; i < 4; ++i)
        vst1q_f32(out + 16 * half + 4 * i,
                  vfmaq_f32(bias, vaddq_f32(values[i], vdupq_n_f32(128)), scale));
    }
  }
}

// y += one row of x, 16 features of it, times as many rows of W.
void add_rows(const float* x, int64_t count, const float* dense, int64_t width, float* y) {
  for (int64_t c = 0; c < width; c += 32) { // eight chains hide the latency of fma
    float32x4_t sums[8];
    for (auto& sum : sums)
      sum = vdupq_n_f32(0);
    for (int64_t r = 0; r < count; ++r)
      for (int i = 0; i < 8; ++i)
        sums[i] = vfmaq_n_f32(sums[i], vld1q_f32(dense + r * kColumnBlock + c + 4 * i), x[r]);
    for (int i = 0; i < 8; ++i)
      vst1q_f32(y + c + 4 * i, vaddq_f32(vld1q_f32(y + c + 4 * i), sums[i]));
  }
}

void gemm_transposed(const PackedMatrix& w, const float* x, int64_t rows, float* y, int64_t begin,
                     int64_t end) {
  alignas(64) static thread_local float dense[kDepth * kColumnBlock];
  for (int64_t m = 0; m < rows; ++m)
    std::fill(y + m * w.in_features + begin, y + m * w.in_features + end, 0.0f);
  for_width(w, [&](const auto& codes) {
    for (int64_t k = begin; k < end; k += kColumnBlock) {
      const int64_t width = std::min(kColumnBlock, end - k);
      for (int64_t n = 0; n < w.out_features; n += kDepth) {
        const int64_t count = std::min(kDepth, w.out_features - n);
        for (int64_t r = 0; r < count; ++r)
          expand_row(w, codes, n + r, k, k + width, dense + r * kColumnBlock);
        for (int64_t m = 0; m < rows; ++m)
          add_rows(x + m * w.out_features + n, count, dense, width, y + m * w.in_features + k);
      }
    }
  });
}

template <Precision kPrecision>
constexpr MatvecKernel integer_matvec = {NeonMatvec<kPrecision>::prepared_bytes,
                                         NeonMatvec<kPrecision>::prepare,
                                         NeonMatvec<kPrecision>::run};

template <Precision kPrecision>
constexpr GemmKernel integer_gemm = {NeonGemm<kPrecision>::prepared_bytes,
                                     NeonGemm<kPrecision>::prepare, NeonGemm<kPrecision>::run};

} // namespace

constinit const KernelTable neon_kernels = {"neon",
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
