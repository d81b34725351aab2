// What every kernel on packed weights is made of: element access, unpacking, and the matvec core
// that the single operator and the decode plan's steps share.
//
// Sums are written with fma and with a fixed order of addition: nothing is left to a compiler's
// choice of contraction, so a row has the same bits alone and among eight.
#pragma once

#include "launch.h"

using namespace q4metal;
using namespace q4metal::mps;

// promote(A, B) of two float types.
template <typename A, typename B> struct Promoted {
  typedef float type;
};
template <typename A> struct Promoted<A, A> {
  typedef A type;
};

// Four elements from a multiple of four on.
template <typename T> inline float4 load4(device const T* x, uint at) {
  return float4(*reinterpret_cast<device const vec<T, 4>*>(x + at));
}

// Element `at` of a vector whose dtype is an argument (launch.h); 0 where there is no vector.
inline float load_any(device const void* values, int dtype, uint at) {
  if (dtype == kFloat32)
    return static_cast<device const float*>(values)[at];
  if (dtype == kFloat16)
    return float(static_cast<device const half*>(values)[at]);
  if (dtype == kBFloat16)
    return float(static_cast<device const bfloat*>(values)[at]);
  return 0.0f;
}

// ---- unpacking

// kCount codes of a bit stream that begins at a byte: 8 or 16, so that they end at one too. Read in
// units of 16 bits, or of 8 where the bytes are odd (8 codes of 3 or 5 bits).
template <int kBits, int kCount> struct CodeStream {
  enum { kUnit = kBits * kCount % 16 == 0 ? 16 : 8, kUnits = kBits * kCount / kUnit };
  // Whether no code lies in two units.
  enum { kWhole = 16 % kBits == 0 };

  ushort units[kUnits];

  void read(device const uchar* codes) {
    for (int i = 0; i < kUnits; ++i)
      units[i] = kUnit == 16 ? reinterpret_cast<device const ushort*>(codes)[i] : ushort(codes[i]);
  }

  uint code(int j) const {
    const int bit = j * kBits, unit = bit / kUnit, shift = bit % kUnit;
    uint bits = units[unit];
    if (shift + kBits > kUnit)
      bits |= uint(units[unit + 1]) << kUnit;
    return bits >> shift & ((1u << kBits) - 1);
  }

  // The code times `place(j)`, for widths that divide 16 the bits as they stand in their unit: no
  // shift. At most 65280 and of at most 8 significant bits, so exact in half too.
  uint placed(int j) const {
    if (!kWhole)
      return code(j);
    const int bit = j * kBits;
    return units[bit / kUnit] & ((1u << kBits) - 1) << bit % kUnit;
  }

  static uint place(int j) { return kWhole ? 1u << j * kBits % kUnit : 1u; }
};

// W[k .. k + kCount) of one group, computed in float32.
template <int kBits, int kCount>
inline void expand(device const uchar* codes, float scale, float bias,
                   thread float (&values)[kCount]) {
  CodeStream<kBits, kCount> stream;
  stream.read(codes);
  for (int j = 0; j < kCount; ++j)
    values[j] = fma(scale, float(stream.code(j)), bias);
}

// ---- the matvec core: each lane takes kCodesPerLane weights of an output feature at a time

// Codes and dense weights wait in registers while several rows use them; half holds codes exactly,
// in half the room.
template <int kRows> struct CodeVector {
  typedef half4 type;
};
template <> struct CodeVector<1> {
  typedef float4 type;
};

inline float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }

template <typename Vector>
inline float dot16(thread const Vector (&w)[4], thread const float4 (&x)[4]) {
  float4 sums = float4(w[0]) * x[0];
  for (int i = 1; i < 4; ++i)
    sums = fma(float4(w[i]), x[i], sums);
  return sum_of(sums);
}

// A packed matrix [N, K] in device memory.
template <int kBits, int kGroup, typename S> struct Packed {
  device const uchar* weight;
  device const S* scales;
  device const S* biases;
  uint in_features;

  device const uchar* codes(uint feature, uint k) const {
    return weight + row_bytes(in_features, kBits) * feature + k * kBits / 8;
  }
  ulong group(uint feature, uint k) const {
    return ulong(in_features / kGroup) * feature + k / kGroup;
  }

  static Packed at(device const void* weight, device const void* scales, device const void* biases,
                   uint in_features) {
    return Packed{static_cast<device const uchar*>(weight), static_cast<device const S*>(scales),
                  static_cast<device const S*>(biases), in_features};
  }

  // 16 values of x, ready to be multiplied by 16 placed codes: divided by the codes' places.
  struct Input {
    float4 values[4];
    float sum; // of x itself

    Input(thread const float4 (&x)[4]) {
      sum = sum_of((x[0] + x[1]) + (x[2] + x[3]));
      for (int i = 0; i < 4; ++i)
        values[i] = x[i];
      typedef CodeStream<kBits, kCodesPerLane> Stream;
      for (int j = 0; j < kCodesPerLane; ++j)
        if (Stream::place(j) != 1)
          values[j / 4][j % 4] *= 1.0f / float(Stream::place(j));
    }
  };

  // W[features, k .. k + 16) in registers.
  template <int kFeatures, int kRows> struct Piece {
    typedef typename CodeVector<kRows>::type Vector;
    Vector codes[kFeatures][4];
    float scales[kFeatures], biases[kFeatures];

    void fetch(thread const Packed& w, thread const uint (&features)[kFeatures], uint k) {
      CodeStream<kBits, kCodesPerLane> streams[kFeatures];
      for (int f = 0; f < kFeatures; ++f) {
        streams[f].read(w.codes(features[f], k));
        scales[f] = float(w.scales[w.group(features[f], k)]);
        biases[f] = float(w.biases[w.group(features[f], k)]);
      }
      for (int f = 0; f < kFeatures; ++f)
        for (int i = 0; i < 4; ++i)
          codes[f][i] = Vector(streams[f].placed(4 * i), streams[f].placed(4 * i + 1),
                               streams[f].placed(4 * i + 2), streams[f].placed(4 * i + 3));
    }

    float add(int f, thread const Input& x, float sum) const {
      return fma(scales[f], dot16(codes[f], x.values), fma(biases[f], x.sum, sum));
    }
  };
};

// A matrix [N, K] that was left dense. K is a multiple of 16, rows begin at multiples of four
// elements.
template <typename T> struct Dense {
  device const T* weight;
  uint in_features;

  static Dense at(device const void* weight, device const void*, device const void*,
                  uint in_features) {
    return Dense{static_cast<device const T*>(weight), in_features};
  }

  struct Input {
    float4 values[4];

    Input(thread const float4 (&x)[4]) {
      for (int i = 0; i < 4; ++i)
        values[i] = x[i];
    }
  };

  template <int kFeatures, int kRows> struct Piece {
    vec<T, 4> values[kFeatures][4];

    void fetch(thread const Dense& w, thread const uint (&features)[kFeatures], uint k) {
      for (int f = 0; f < kFeatures; ++f)
        for (int i = 0; i < 4; ++i)
          values[f][i] = *reinterpret_cast<device const vec<T, 4>*>(
              w.weight + ulong(w.in_features) * features[f] + k + 4 * i);
    }

    float add(int f, thread const Input& x, float sum) const {
      return sum + dot16(values[f], x.values);
    }
  };
};

// Rows of x [rows, K] in device memory: what a matrix is multiplied by.
template <typename T> struct RowsOf {
  device const T* x;
  uint in_features;

  void load(int row, uint k, thread float4 (&values)[4]) {
    for (int i = 0; i < 4; ++i)
      values[i] = load4(x + ulong(in_features) * row, k + 4 * i);
  }
};

// sums[f][m] += this lane's share of the product of row features[f] of W and row m of x.
template <int kRows, int kFeatures, typename Matrix, typename Rows>
inline void multiply(thread const Matrix& w, thread Rows& rows,
                     thread const uint (&features)[kFeatures], uint lane,
                     thread float (&sums)[kFeatures][kRows]) {
  for (uint k = lane * kCodesPerLane; k < w.in_features; k += kSimdWidth * kCodesPerLane) {
    typename Matrix::template Piece<kFeatures, kRows> piece;
    piece.fetch(w, features, k);
    for (int m = 0; m < kRows; ++m) {
      float4 values[4];
      rows.load(m, k, values);
      const typename Matrix::Input x(values);
      for (int f = 0; f < kFeatures; ++f)
        sums[f][m] = piece.add(f, x, sums[f][m]);
    }
  }
}
