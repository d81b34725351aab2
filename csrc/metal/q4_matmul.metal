// Matrix products of many rows with simdgroup matrices: a threadgroup of four simdgroups computes
// kTileRows x 64 numbers, a slice of the reduced dimension at a time. Slices of x and of W,
// dequantized in float32 and rounded to the tile's type, are staged in threadgroup memory twice:
// while one pair is multiplied the next is filled, so one barrier a slice is enough.
//
// A result's terms are added in one order, whatever the number of rows and the tile's height.
#include "q4.h"

#include <metal_simdgroup_matrix>

// A staged slice. Rows are padded by 16 bytes, so that the eight rows of a simdgroup matrix begin
// in different banks.
template <typename T> struct Slice {
  enum { kDepth = sizeof(T) == 4 ? 16 : 32 }; // of the reduced dimension
  enum { kPadding = 16 / sizeof(T) };
  enum { kStride = kDepth + kPadding };           // of x [rows][kDepth] and W [columns][kDepth]
  enum { kWideStride = kTileColumns + kPadding }; // of W [kDepth][columns]
  enum { kVectors = 16 / sizeof(T) };             // elements of 16 bytes
};

// How four simdgroups share a tile, and the simdgroup matrices of each.
template <int kTileRows> struct Share {
  enum { kDown = kTileRows == 16 ? 1 : 2, kAcross = 4 / kDown };
  enum { kMatrixRows = kTileRows / kDown / 8, kMatrixColumns = kTileColumns / kAcross / 8 };
};

// Bytes of threadgroup memory, in vectors of 16: two pairs of slices, or the results.
template <typename T, int kTileRows> struct Pool {
  enum { kX = kTileRows * Slice<T>::kStride * sizeof(T) / 16 };
  enum { kRowsOfW = kTileColumns * Slice<T>::kStride * sizeof(T) / 16 };
  enum { kColumnsOfW = Slice<T>::kDepth * Slice<T>::kWideStride * sizeof(T) / 16 };
  enum { kW = kRowsOfW > kColumnsOfW ? kRowsOfW : kColumnsOfW };
  enum { kPair = kX + kW, kResults = kTileRows * kTileColumns / 4 };
  enum { kVectors = 2 * kPair > kResults ? 2 * kPair : kResults };
};

// Stores kCount values as whole vectors.
template <typename T, int kCount>
inline void store_values(threadgroup T* out, thread const float (&values)[kCount]) {
  typedef vec<T, 4> Four;
  for (int i = 0; i < kCount; i += 4)
    *reinterpret_cast<threadgroup Four*>(out + i) =
        Four(T(values[i]), T(values[i + 1]), T(values[i + 2]), T(values[i + 3]));
}

// x [kTileRows][kDepth] from row `row` and column k on. Rows past the end repeat the last one.
template <typename T, int kTileRows, typename X>
inline void stage_x(device const X* x, threadgroup T* out, uint row, uint rows, uint k,
                    uint columns, uint thread_at) {
  const uint fours = Slice<T>::kDepth / 4;
  for (uint i = thread_at; i < kTileRows * fours; i += kTileThreads) {
    const uint m = min(row + i / fours, rows - 1), column = i % fours * 4;
    const float4 v = load4(x + ulong(columns) * m, k + column);
    const float values[4] = {v.x, v.y, v.z, v.w};
    store_values<T, 4>(out + i / fours * Slice<T>::kStride + column, values);
  }
}

// The same where columns may be any number: one element at a time, zeros past the end.
template <typename T, int kTileRows, typename X>
inline void stage_any_x(device const X* x, threadgroup T* out, uint row, uint rows, uint k,
                        uint columns, uint thread_at) {
  for (uint i = thread_at; i < kTileRows * Slice<T>::kDepth; i += kTileThreads) {
    const uint m = min(row + i / Slice<T>::kDepth, rows - 1), column = k + i % Slice<T>::kDepth;
    out[i / Slice<T>::kDepth * Slice<T>::kStride + i % Slice<T>::kDepth] =
        column < columns ? T(float(x[ulong(columns) * m + column])) : T(0.0f);
  }
}

// W [kTileColumns features][kDepth]. Features past the end repeat the last one.
template <typename T, int kBits, int kGroup, typename S>
inline void stage_w(thread const Packed<kBits, kGroup, S>& w, threadgroup T* out, uint feature,
                    uint features, uint k, uint thread_at) {
  enum { kCount = Slice<T>::kDepth * kTileColumns / kTileThreads };
  const uint row = thread_at / 2, column = thread_at % 2 * kCount;
  const uint n = min(feature + row, features - 1);
  const ulong group = w.group(n, k + column);
  float values[kCount];
  expand<kBits>(w.codes(n, k + column), float(w.scales[group]), float(w.biases[group]), values);
  store_values<T, kCount>(out + row * Slice<T>::kStride + column, values);
}

// W [kDepth features][kTileColumns] from column k on; zeros past the end.
template <typename T, int kBits, int kGroup, typename S>
inline void stage_plain_w(thread const Packed<kBits, kGroup, S>& w, threadgroup T* out,
                          uint feature, uint features, uint k, uint thread_at) {
  enum { kCount = Slice<T>::kDepth * kTileColumns / kTileThreads, kParts = kTileColumns / kCount };
  const uint row = thread_at / kParts, column = thread_at % kParts * kCount;
  const uint n = feature + row;
  float values[kCount] = {};
  if (n < features && k + column < w.in_features) {
    const ulong group = w.group(n, k + column);
    expand<kBits>(w.codes(n, k + column), float(w.scales[group]), float(w.biases[group]), values);
  }
  store_values<T, kCount>(out + row * Slice<T>::kWideStride + column, values);
}

// The simdgroup's part of results: sums of products of 8x8 matrices.
template <int kTileRows> struct Accumulator {
  typedef Share<kTileRows> S;
  simdgroup_matrix<float, 8, 8> sums[S::kMatrixRows][S::kMatrixColumns];
};

template <int kTileRows> inline void clear(thread Accumulator<kTileRows>& to) {
  typedef Share<kTileRows> S;
  for (int i = 0; i < S::kMatrixRows; ++i)
    for (int j = 0; j < S::kMatrixColumns; ++j)
      to.sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

// Adds the product of two slices. kPlain: W is [kDepth][columns].
template <typename T, int kTileRows, bool kPlain>
inline void multiply_slices(threadgroup const T* x, threadgroup const T* w, uint simdgroup,
                            thread Accumulator<kTileRows>& to) {
  typedef Share<kTileRows> S;
  const uint row = simdgroup / S::kAcross * S::kMatrixRows * 8;
  const uint column = simdgroup % S::kAcross * S::kMatrixColumns * 8;
  for (int k = 0; k < Slice<T>::kDepth; k += 8) {
    simdgroup_matrix<T, 8, 8> a[S::kMatrixRows], b[S::kMatrixColumns];
    for (int i = 0; i < S::kMatrixRows; ++i)
      simdgroup_load(a[i], x + (row + 8 * i) * Slice<T>::kStride + k, Slice<T>::kStride);
    for (int j = 0; j < S::kMatrixColumns; ++j)
      if (kPlain)
        simdgroup_load(b[j], w + k * Slice<T>::kWideStride + column + 8 * j, Slice<T>::kWideStride);
      else
        simdgroup_load(b[j], w + (column + 8 * j) * Slice<T>::kStride + k, Slice<T>::kStride,
                       ulong2(0, 0), true);
    for (int i = 0; i < S::kMatrixRows; ++i)
      for (int j = 0; j < S::kMatrixColumns; ++j)
        simdgroup_multiply_accumulate(to.sums[i][j], a[i], b[j], to.sums[i][j]);
  }
}

template <int kTileRows>
inline void store_sums(thread const Accumulator<kTileRows>& from, threadgroup float* results,
                       uint simdgroup) {
  typedef Share<kTileRows> S;
  const uint row = simdgroup / S::kAcross * S::kMatrixRows * 8;
  const uint column = simdgroup % S::kAcross * S::kMatrixColumns * 8;
  for (int i = 0; i < S::kMatrixRows; ++i)
    for (int j = 0; j < S::kMatrixColumns; ++j)
      simdgroup_store(from.sums[i][j], results + (row + 8 * i) * kTileColumns + column + 8 * j,
                      kTileColumns);
}

// y [rows, columns] = results + bias, from (row, column) on, as far as y goes.
template <typename Y>
inline void write_results(threadgroup const float* results, int tile_rows, device Y* y,
                          device const void* bias, int bias_dtype, uint row, uint rows, uint column,
                          uint columns, uint thread_at) {
  const uint n = column + thread_at % kTileColumns;
  if (n >= columns)
    return;
  const float offset = load_any(bias, bias_dtype, n);
  for (int m = int(thread_at) / kTileColumns; m < tile_rows; m += kTileThreads / kTileColumns)
    if (row + m < rows)
      y[ulong(columns) * (row + m) + n] =
          Y(results[m * kTileColumns + thread_at % kTileColumns] + offset);
}

// One tile of y, with `pool` as memory. kPlain: of x W instead of x W^T.
template <typename T, int kTileRows, bool kPlain, typename X, typename Y, int kBits, int kGroup,
          typename S>
inline void compute_tile(thread const Packed<kBits, kGroup, S>& w, device const void* bias,
                         device const X* x, device Y* y, constant MatmulArgs& args,
                         threadgroup float4* pool, uint row, uint column, uint thread_at,
                         uint simdgroup) {
  typedef Pool<T, kTileRows> P;
  const uint reduced = kPlain ? args.out_features : args.in_features;
  const uint columns = kPlain ? args.in_features : args.out_features;
  Accumulator<kTileRows> sums;
  clear(sums);
  for (uint at = 0, turn = 0;; at += Slice<T>::kDepth, turn ^= 1) {
    if (at < reduced) {
      threadgroup T* slice_of_x = reinterpret_cast<threadgroup T*>(pool + turn * P::kPair);
      threadgroup T* slice_of_w = reinterpret_cast<threadgroup T*>(pool + turn * P::kPair + P::kX);
      if (kPlain) {
        stage_any_x<T, kTileRows>(x, slice_of_x, row, args.rows, at, reduced, thread_at);
        stage_plain_w(w, slice_of_w, at, reduced, column, thread_at);
      } else {
        stage_x<T, kTileRows>(x, slice_of_x, row, args.rows, at, reduced, thread_at);
        stage_w(w, slice_of_w, column, columns, at, thread_at);
      }
    }
    if (at > 0) {
      threadgroup const float4* pair = pool + (turn ^ 1) * P::kPair;
      multiply_slices<T, kTileRows, kPlain>(reinterpret_cast<threadgroup const T*>(pair),
                                            reinterpret_cast<threadgroup const T*>(pair + P::kX),
                                            simdgroup, sums);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (at >= reduced)
      break;
  }
  threadgroup float* results = reinterpret_cast<threadgroup float*>(pool);
  store_sums(sums, results, simdgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  write_results(results, kTileRows, y, bias, args.bias_dtype, row, args.rows, column, columns,
                thread_at);
}

// y [rows, N] = x [rows, K] W^T + bias [N].
template <typename X, typename S, typename T, int kBits, int kGroup, int kTileRows>
kernel void q4_matmul(device const uchar* weight [[buffer(0)]],
                      device const S* scales [[buffer(1)]], device const S* biases [[buffer(2)]],
                      device const void* bias [[buffer(3)]], device const X* x [[buffer(4)]],
                      device typename Promoted<X, S>::type* y [[buffer(5)]],
                      constant MatmulArgs& args [[buffer(6)]],
                      uint3 threadgroup_at [[threadgroup_position_in_grid]],
                      uint thread_at [[thread_index_in_threadgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  typedef Pool<T, kTileRows> P;
  threadgroup float4 pool[P::kVectors];
  const Packed<kBits, kGroup, S> w = {weight, scales, biases, args.in_features};
  compute_tile<T, kTileRows, false>(w, bias, x, y, args, pool, threadgroup_at.x * kTileRows,
                                    threadgroup_at.y * kTileColumns, thread_at, simdgroup);
}

// y [rows, K] = x [rows, N] W + bias [K].
template <typename X, typename S, typename T, int kBits, int kGroup, int kTileRows>
kernel void q4_matmul_plain(device const uchar* weight [[buffer(0)]],
                            device const S* scales [[buffer(1)]],
                            device const S* biases [[buffer(2)]],
                            device const void* bias [[buffer(3)]], device const X* x [[buffer(4)]],
                            device typename Promoted<X, S>::type* y [[buffer(5)]],
                            constant MatmulArgs& args [[buffer(6)]],
                            uint3 threadgroup_at [[threadgroup_position_in_grid]],
                            uint thread_at [[thread_index_in_threadgroup]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  typedef Pool<T, kTileRows> P;
  threadgroup float4 pool[P::kVectors];
  const Packed<kBits, kGroup, S> w = {weight, scales, biases, args.in_features};
  compute_tile<T, kTileRows, true>(w, bias, x, y, args, pool, threadgroup_at.x * kTileRows,
                                   threadgroup_at.y * kTileColumns, thread_at, simdgroup);
}
