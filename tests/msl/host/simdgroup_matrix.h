// 8x8 matrices that a simdgroup holds together. Here lane L has elements 2L and 2L+1 in row order; a device
// places them differently and may change that, so thread_elements() isn't offered.
#pragma once

#include "simd.h"

namespace metal {

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8x8 matrices only");
  T held[2];

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    uint row = msl::lane() / 4, column = msl::lane() % 4 * 2;
    held[0] = row == column ? diagonal : (T)0.0f;
    held[1] = row == column + 1 ? diagonal : (T)0.0f;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns, class U>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(U value) {
  simdgroup_matrix<T, Rows, Columns> m;
  m.held[0] = m.held[1] = (T)value;
  return m;
}

}  // namespace metal

namespace msl {

#ifdef MSL_CHECK
// Loads and stores need nothing from other lanes: they meet only so that divergence is found.
__attribute__((no_sanitize("thread", "undefined"))) inline void gather_lanes(const msl_site& site) {
  if (msl_self->lanes != 32) msl_fail("simdgroup_matrix in a simdgroup of fewer than 32 threads", site);
  if (msl_meet(site)) msl_release();
}
#else
inline void gather_lanes(const msl_site&) {}
#endif

// Where the lane's two elements are, relative to element (0, 0).
struct Places {
  long first, second;
};
inline __attribute__((always_inline)) Places places(long stride, ulong2 origin, bool transpose) {
  long row = lane() / 4, column = lane() % 4 * 2;
  long start = (long)origin.y * stride + (long)origin.x;
  if (transpose) return {start + column * stride + row, start + (column + 1) * stride + row};
  return {start + row * stride + column, start + row * stride + column + 1};
}

struct Product {
  float first, second;
};

// Accumulates in float over k = 0..7 in turn. A device's order is its own.
__attribute__((noinline, no_sanitize("thread", "undefined"))) inline Product multiply(
    const float (&operands)[6], const msl_site& site) {
  float(*slots)[64] = (float(*)[64])msl_slots();
  uint at = 2 * lane();
  for (int m = 0; m < 3; m++) {
    slots[m][at] = operands[2 * m];
    slots[m][at + 1] = operands[2 * m + 1];
  }
  if (msl_meet(site)) {
    float *a = slots[0], *b = slots[1], *c = slots[2];
    for (int row = 0; row < 8; row++)
      for (int k = 0; k < 8; k++)
        for (int column = 0; column < 8; column++) c[8 * row + column] += a[8 * row + k] * b[8 * k + column];
    msl_release();
  }
  return {slots[2][at], slots[2][at + 1]};
}

}  // namespace msl

namespace metal {

template <class T, int R, int C, class Pointer>
inline __attribute__((always_inline)) void simdgroup_load(simdgroup_matrix<T, R, C>& m, Pointer source,
                                                          ulong elements_per_row = C,
                                                          ulong2 matrix_origin = ulong2{0, 0},
                                                          bool transpose_matrix = false, MSL_SITE) {
  static_assert(is_same_v<msl::plain<decltype(*source)>, T>, "simdgroup_load: the element types differ");
  msl::gather_lanes(MSL_AT("simdgroup_load"));
  msl::Places at = msl::places((long)elements_per_row, matrix_origin, transpose_matrix);
  m.held[0] = source[at.first];
  m.held[1] = source[at.second];
}

template <class T, int R, int C, class Pointer>
inline __attribute__((always_inline)) void simdgroup_store(simdgroup_matrix<T, R, C> m, Pointer target,
                                                           ulong elements_per_row = C,
                                                           ulong2 matrix_origin = ulong2{0, 0},
                                                           bool transpose_matrix = false, MSL_SITE) {
  static_assert(is_same_v<msl::plain<decltype(*target)>, T>, "simdgroup_store: the element types differ");
  msl::gather_lanes(MSL_AT("simdgroup_store"));
  msl::Places at = msl::places((long)elements_per_row, matrix_origin, transpose_matrix);
  target[at.first] = m.held[0];
  target[at.second] = m.held[1];
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_SITE) {
  float operands[6] = {(float)a.held[0], (float)a.held[1], (float)b.held[0],
                       (float)b.held[1], (float)c.held[0], (float)c.held[1]};
  msl::Product p = msl::multiply(operands, MSL_AT("simdgroup_multiply_accumulate"));
  d.held[0] = (D)p.first;
  d.held[1] = (D)p.second;
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, MSL_SITE) {
  float operands[6] = {(float)a.held[0], (float)a.held[1], (float)b.held[0], (float)b.held[1], 0.0f, 0.0f};
  msl::Product p = msl::multiply(operands, MSL_AT("simdgroup_multiply"));
  d.held[0] = (D)p.first;
  d.held[1] = (D)p.second;
}

}  // namespace metal
