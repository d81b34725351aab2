// 8x8 matrices that a simdgroup holds together. Here lane 0 holds all of a matrix and computes with
// it, and the other lanes skip that: what they could see differently is the placement of elements,
// which a device keeps to itself (thread_elements() isn't offered). A product costs 512 FMAs and no
// switch between fibers: tiled matmul M=32 N=4864 K=896 went from 9.6 to 1.2 million switches. In
// the check build the lanes do meet, so that divergence is found, and each loads and stores two
// elements.
#pragma once

#include "simd.h"

namespace metal {

template <class T, int Rows, int Columns> struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has 8x8 matrices only");
  T held[64]; // row by row, in lane 0

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    if (msl::lane() != 0)
      return;
    for (int i = 0; i < 64; i++)
      held[i] = i % 9 ? (T)0.0f : diagonal;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Rows, int Columns, class U>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(U value) {
  simdgroup_matrix<T, Rows, Columns> m;
  if (msl::lane() == 0)
    for (int i = 0; i < 64; i++)
      m.held[i] = (T)value;
  return m;
}

} // namespace metal

namespace msl {

// Element (row, column) of a matrix in memory.
struct Layout {
  long start, row, column;
  long at(uint i) const { return start + i / 8 * row + i % 8 * column; }
};
inline Layout layout(ulong stride, ulong2 origin, bool transpose) {
  long step = (long)stride, start = (long)origin.y * step + (long)origin.x;
  return transpose ? Layout{start, 1, step} : Layout{start, step, 1};
}

#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))),                  \
                             apply_to = function)

// Whether this lane is the one that holds matrices.
inline bool holds(const msl_site& site) {
  if (msl_self->lanes != 32)
    msl_fail("simdgroup_matrix in a simdgroup of fewer than 32 threads", site);
#ifdef MSL_CHECK
  if (msl_meet(site))
    msl_release();
#endif
  return lane() == 0;
}

#ifdef MSL_CHECK
// Two elements of each lane together become what lane 0 holds.
template <class T> void gather(T (&held)[64], T first, T second, const msl_site& site) {
  T* slots = (T*)msl_slots();
  slots[2 * lane()] = first;
  slots[2 * lane() + 1] = second;
  if (holds(site))
    for (int i = 0; i < 64; i++)
      held[i] = slots[i];
}

template <class T> struct Pair {
  T first, second;
};
template <class T> Pair<T> spread(const T (&held)[64], const msl_site& site) {
  T* slots = (T*)msl_slots();
  if (lane() == 0)
    for (int i = 0; i < 64; i++)
      slots[i] = held[i];
  holds(site);
  return {slots[2 * lane()], slots[2 * lane() + 1]};
}
#endif

// d = a b + c, accumulated in float over k = 0..7 in turn. A device's order is its own.
template <class D, class A, class B, class C>
__attribute__((noinline)) void multiply(D* d, const A* a, const B* b, const C* c) {
  float sum[64], right[64];
  for (int i = 0; i < 64; i++)
    sum[i] = c ? (float)c[i] : 0.0f;
  for (int i = 0; i < 64; i++)
    right[i] = (float)b[i];
  for (int row = 0; row < 8; row++)
    for (int k = 0; k < 8; k++) {
      float left = (float)a[8 * row + k];
      for (int column = 0; column < 8; column++)
        sum[8 * row + column] += left * right[8 * k + column];
    }
  for (int i = 0; i < 64; i++)
    d[i] = (D)sum[i];
}

#pragma clang attribute pop

} // namespace msl

namespace metal {

template <class T, int R, int C, class Pointer>
inline __attribute__((always_inline)) void
simdgroup_load(simdgroup_matrix<T, R, C>& m, Pointer source, ulong elements_per_row = C,
               ulong2 matrix_origin = ulong2{0, 0}, bool transpose_matrix = false, MSL_SITE) {
  static_assert(is_same_v<msl::plain<decltype(*source)>, T>,
                "simdgroup_load: the element types differ");
  msl::Layout layout = msl::layout(elements_per_row, matrix_origin, transpose_matrix);
#ifdef MSL_CHECK
  uint i = 2 * msl::lane();
  T first = source[layout.at(i)], second = source[layout.at(i + 1)];
  msl::gather(m.held, first, second, MSL_AT("simdgroup_load"));
#else
  if (msl::holds(MSL_AT("simdgroup_load")))
    for (uint i = 0; i < 64; i++)
      m.held[i] = source[layout.at(i)];
#endif
}

template <class T, int R, int C, class Pointer>
inline __attribute__((always_inline)) void
simdgroup_store(const simdgroup_matrix<T, R, C>& m, Pointer target, ulong elements_per_row = C,
                ulong2 matrix_origin = ulong2{0, 0}, bool transpose_matrix = false, MSL_SITE) {
  static_assert(is_same_v<msl::plain<decltype(*target)>, T>,
                "simdgroup_store: the element types differ");
  msl::Layout layout = msl::layout(elements_per_row, matrix_origin, transpose_matrix);
#ifdef MSL_CHECK
  uint i = 2 * msl::lane();
  msl::Pair<T> mine = msl::spread(m.held, MSL_AT("simdgroup_store"));
  target[layout.at(i)] = mine.first;
  target[layout.at(i + 1)] = mine.second;
#else
  if (msl::holds(MSL_AT("simdgroup_store")))
    for (uint i = 0; i < 64; i++)
      target[layout.at(i)] = m.held[i];
#endif
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b,
                                          const simdgroup_matrix<C, 8, 8>& c, MSL_SITE) {
  if (msl::holds(MSL_AT("simdgroup_multiply_accumulate")))
    msl::multiply(d.held, a.held, b.held, c.held);
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
  if (msl::holds(MSL_AT("simdgroup_multiply")))
    msl::multiply(d.held, a.held, b.held, (const D*)nullptr);
}

} // namespace metal
