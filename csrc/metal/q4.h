// What every kernel on packed weights is made of: element access, unpacking, and the matvec core
// that the single operator and the decode plan's steps share.
//
// Sums are written with fma and with a fixed order of addition: nothing is left to a compiler's
// choice of contraction, so a row has the same bits alone and among eight.
#pragma once

#include <metal_stdlib>

#include "launch.h"

using namespace metal;
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

  void load(device const uchar* codes) {
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
  stream.load(codes);
  for (int j = 0; j < kCount; ++j)
    values[j] = fma(scale, float(stream.code(j)), bias);
}

// ---- the matvec core: each lane takes kCodesPerLane weights of an output feature at a time

// 16 values of x, ready to be multiplied by 16 placed codes.
struct Sixteen {
  float4 values[4]; // x divided by the places of the codes
  float sum;        // of x
};

template <int kBits> inline Sixteen prepare(float4 a, float4 b, float4 c, float4 d) {
  typedef CodeStream<kBits, kCodesPerLane> Stream;
  const float4 sums = (a + b) + (c + d);
  Sixteen x;
  x.sum = (sums.x + sums.y) + (sums.z + sums.w);
  x.values[0] = a;
  x.values[1] = b;
  x.values[2] = c;
  x.values[3] = d;
  for (int j = 0; j < kCodesPerLane; ++j)
    if (Stream::place(j) != 1)
      x.values[j / 4][j % 4] *= 1.0f / float(Stream::place(j));
  return x;
}

template <typename Vector>
inline float dot16(thread const Vector (&codes)[4], thread const Sixteen& x) {
  float4 sums = float4(codes[0]) * x.values[0];
  for (int i = 1; i < 4; ++i)
    sums = fma(float4(codes[i]), x.values[i], sums);
  return (sums.x + sums.y) + (sums.z + sums.w);
}

// Codes wait in registers while several rows use them; half holds them exactly in half the room.
template <int kRows> struct CodeVector {
  typedef half4 type;
};
template <> struct CodeVector<1> {
  typedef float4 type;
};

template <int kBits, typename Vector>
inline void place_codes(thread const CodeStream<kBits, kCodesPerLane>& stream,
                        thread Vector (&codes)[4]) {
  for (int i = 0; i < 4; ++i)
    codes[i] = Vector(stream.placed(4 * i), stream.placed(4 * i + 1), stream.placed(4 * i + 2),
                      stream.placed(4 * i + 3));
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
};

// Rows of x [rows, K] in device memory.
template <typename T> struct RowsOf {
  device const T* x;
  uint in_features;

  float4 load(int row, uint k) const { return load4(x + ulong(in_features) * row, k); }
};

// sums[f][m] += this lane's share of the product of row features[f] of W and row m of x.
template <int kRows, int kFeatures, int kBits, int kGroup, typename S, typename Input>
inline void multiply(thread const Packed<kBits, kGroup, S>& w, thread const Input& input,
                     thread const uint (&features)[kFeatures], uint lane,
                     thread float (&sums)[kFeatures][kRows]) {
  typedef typename CodeVector<kRows>::type Vector;
  for (uint k = lane * kCodesPerLane; k < w.in_features; k += kSimdWidth * kCodesPerLane) {
    CodeStream<kBits, kCodesPerLane> streams[kFeatures];
    float scales[kFeatures], biases[kFeatures];
    for (int f = 0; f < kFeatures; ++f) {
      streams[f].load(w.codes(features[f], k));
      scales[f] = float(w.scales[w.group(features[f], k)]);
      biases[f] = float(w.biases[w.group(features[f], k)]);
    }
    Vector codes[kFeatures][4];
    for (int f = 0; f < kFeatures; ++f)
      place_codes<kBits>(streams[f], codes[f]);
    for (int m = 0; m < kRows; ++m) {
      const Sixteen x = prepare<kBits>(input.load(m, k), input.load(m, k + 4), input.load(m, k + 8),
                                       input.load(m, k + 12));
      for (int f = 0; f < kFeatures; ++f)
        sums[f][m] = fma(scales[f], dot16(codes[f], x), fma(biases[f], x.sum, sums[f][m]));
    }
  }
}
