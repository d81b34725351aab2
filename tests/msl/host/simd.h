// Barriers and operations across the lanes of a simdgroup or quad. All lanes have to arrive at the
// same call.
#pragma once

#include "../runtime/context.h"
#include "math.h"

// Default arguments take the caller's place in the .metal text.
#define MSL_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define MSL_AT(what)                                                                               \
  msl_site { what, file_, line_ }

// The executor's own memory is none of the checker's business.
#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))),                  \
                             apply_to = function)

namespace msl {

inline uint lane() { return msl_self->lane; }

template <class T> constexpr void check_exchanged() {
  static_assert(sizeof(element<T>) <= 4 && !metal::is_same_v<T, bool>,
                "a simdgroup does not exchange bool, long or ulong");
}

// The first lane combines all operands pairwise, every lane gets the result.
template <class T, class F>
__attribute__((noinline)) T reduce(T x, const msl_site& site, F combine) {
  T* slots = (T*)msl_slots();
  slots[lane()] = x;
  if (msl_meet(site)) {
    for (int n = (int)msl_self->lanes; n > 1;) {
      int half_n = (n + 1) / 2;
      for (int i = 0; i + half_n < n; i++)
        slots[i] = combine(slots[i], slots[i + half_n]);
      n = half_n;
    }
    msl_release();
  }
  return slots[0];
}

// All lanes' operands, for the caller to read: valid until the lane's next but one operation.
template <class T> __attribute__((noinline)) const T* exchange(T x, const msl_site& site) {
  static_assert(sizeof(T) <= 64, "too large for a simdgroup operation");
  T* slots = (T*)msl_slots();
  slots[lane()] = x;
  if (msl_meet(site))
    msl_release();
  return slots;
}

template <class T> T from_lane(T x, uint source, const msl_site& site) {
  const T* slots = exchange(x, site);
  if (source >= msl_self->lanes) {
    msl_fail("source lane outside the simdgroup", site);
    return x;
  }
  return slots[source];
}

template <class T> T from_lane_or(T x, int source, T otherwise, const msl_site& site) {
  const T* slots = exchange(x, site);
  return source >= 0 && source < (int)msl_self->lanes ? slots[source] : otherwise;
}

template <class T, class F> T scan(T x, T start, bool inclusive, const msl_site& site, F combine) {
  const T* slots = exchange(x, site);
  T result = start;
  for (uint i = 0; i < lane() + inclusive; i++)
    result = combine(result, slots[i]);
  return result;
}

template <class T, class F> T quad_reduce(T x, const msl_site& site, F combine) {
  const T* q = exchange(x, site) + lane() / 4 * 4;
  return combine(combine(q[0], q[1]), combine(q[2], q[3]));
}

} // namespace msl

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }

inline void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_threadgroup_barrier((int)flags, MSL_AT("threadgroup_barrier"));
}
inline void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_simdgroup_barrier((int)flags, MSL_AT("simdgroup_barrier"));
}

#define MSL_REDUCE(name, expression)                                                               \
  template <class T> inline T simd_##name(T x, MSL_SITE) {                                         \
    msl::check_exchanged<T>();                                                                     \
    return msl::reduce(x, MSL_AT("simd_" #name), [](T a, T b) -> T { return expression; });        \
  }                                                                                                \
  template <class T> inline T quad_##name(T x, MSL_SITE) {                                         \
    msl::check_exchanged<T>();                                                                     \
    return msl::quad_reduce(x, MSL_AT("quad_" #name), [](T a, T b) -> T { return expression; });   \
  }
MSL_REDUCE(sum, a + b)
MSL_REDUCE(product, a* b)
MSL_REDUCE(max, metal::max(a, b))
MSL_REDUCE(min, metal::min(a, b))
MSL_REDUCE(and, a& b)
MSL_REDUCE(or, a | b)
MSL_REDUCE(xor, a ^ b)
#undef MSL_REDUCE

inline bool simd_all(bool x, MSL_SITE) {
  return msl::reduce((int)x, MSL_AT("simd_all"), [](int a, int b) { return a & b; });
}
inline bool simd_any(bool x, MSL_SITE) {
  return msl::reduce((int)x, MSL_AT("simd_any"), [](int a, int b) { return a | b; });
}
struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
};
inline simd_vote simd_ballot(bool x, MSL_SITE) {
  return {msl::reduce((ulong)x << msl::lane(), MSL_AT("simd_ballot"),
                      [](ulong a, ulong b) { return a | b; })};
}
inline bool simd_is_first() { return msl::lane() == 0; }

#define MSL_MOVE(name, parameter, source)                                                          \
  template <class T> inline T name(T x, ushort parameter, MSL_SITE) {                              \
    msl::check_exchanged<T>();                                                                     \
    return msl::from_lane(x, source, MSL_AT(#name));                                               \
  }
MSL_MOVE(simd_shuffle, from, from)
MSL_MOVE(simd_broadcast, from, from)
MSL_MOVE(simd_shuffle_xor, mask, msl::lane() ^ mask)
MSL_MOVE(simd_shuffle_rotate_down, n, (msl::lane() + n) % msl_self->lanes)
MSL_MOVE(simd_shuffle_rotate_up, n,
         (msl::lane() + msl_self->lanes - n % msl_self->lanes) % msl_self->lanes)
MSL_MOVE(quad_shuffle, from, msl::lane() / 4 * 4 + from % 4)
MSL_MOVE(quad_broadcast, from, msl::lane() / 4 * 4 + from % 4)
MSL_MOVE(quad_shuffle_xor, mask, msl::lane() ^ (mask & 3))
#undef MSL_MOVE
template <class T> inline T simd_broadcast_first(T x, MSL_SITE) {
  return msl::from_lane(x, 0, MSL_AT("simd_broadcast_first"));
}
// Beyond the edge the result is not defined in Metal: here it is all ones, NaN in floating point.
#define MSL_SHIFT(name, source)                                                                    \
  template <class T> inline T name(T x, ushort n, MSL_SITE) {                                      \
    msl::check_exchanged<T>();                                                                     \
    T undefined;                                                                                   \
    __builtin_memset(&undefined, 0xFF, sizeof(T));                                                 \
    return msl::from_lane_or(x, source, undefined, MSL_AT(#name));                                 \
  }
MSL_SHIFT(simd_shuffle_down, (int)msl::lane() + n)
MSL_SHIFT(simd_shuffle_up, (int)msl::lane() - n)
#undef MSL_SHIFT
template <class T> inline T simd_shuffle_and_fill_down(T x, T fill, ushort n, MSL_SITE) {
  return msl::from_lane_or(x, (int)msl::lane() + n, fill, MSL_AT("simd_shuffle_and_fill_down"));
}
template <class T> inline T simd_shuffle_and_fill_up(T x, T fill, ushort n, MSL_SITE) {
  return msl::from_lane_or(x, (int)msl::lane() - n, fill, MSL_AT("simd_shuffle_and_fill_up"));
}
#define MSL_SCAN(name, start, inclusive, expression)                                               \
  template <class T> inline T name(T x, MSL_SITE) {                                                \
    msl::check_exchanged<T>();                                                                     \
    return msl::scan(x, (T)(start), inclusive, MSL_AT(#name),                                      \
                     [](T a, T b) -> T { return expression; });                                    \
  }
MSL_SCAN(simd_prefix_inclusive_sum, 0, true, a + b)
MSL_SCAN(simd_prefix_exclusive_sum, 0, false, a + b)
MSL_SCAN(simd_prefix_inclusive_product, 1, true, a* b)
MSL_SCAN(simd_prefix_exclusive_product, 1, false, a* b)
#undef MSL_SCAN

} // namespace metal

#pragma clang attribute pop
