// Atomics. The threads of the executor are fibers of one operating system thread, so plain reads
// and writes are atomic; the checker is told, so that a plain access of the same bytes counts as a
// race.
#pragma once

#include "simd.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T> struct atomic {
  T held;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

} // namespace metal

#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))),                  \
                             apply_to = function)

namespace msl {

template <class P> using held_type = plain<decltype(((P) nullptr)->held)>;

template <class P, class F> inline held_type<P> update(P p, const msl_site& site, F next) {
  msl_atomic_access((const volatile void*)(uintptr_t)p, sizeof(p->held), true, site);
  held_type<P> old = p->held;
  p->held = next(old);
  return old;
}

} // namespace msl

namespace metal {

template <class P> inline msl::held_type<P> atomic_load_explicit(P p, memory_order, MSL_SITE) {
  msl_atomic_access((const volatile void*)(uintptr_t)p, sizeof(p->held), false,
                    MSL_AT("atomic_load_explicit"));
  return p->held;
}
template <class P>
inline void atomic_store_explicit(P p, msl::held_type<P> value, memory_order, MSL_SITE) {
  msl::update(p, MSL_AT("atomic_store_explicit"), [=](auto) { return value; });
}
#define MSL_ATOMIC(name, expression)                                                               \
  template <class P>                                                                               \
  inline msl::held_type<P> name(P p, msl::held_type<P> value, memory_order, MSL_SITE) {            \
    return msl::update(p, MSL_AT(#name), [=](auto old) { return expression; });                    \
  }
MSL_ATOMIC(atomic_exchange_explicit, value)
MSL_ATOMIC(atomic_fetch_add_explicit, old + value)
MSL_ATOMIC(atomic_fetch_sub_explicit, old - value)
MSL_ATOMIC(atomic_fetch_or_explicit, old | value)
MSL_ATOMIC(atomic_fetch_and_explicit, old& value)
MSL_ATOMIC(atomic_fetch_xor_explicit, old ^ value)
MSL_ATOMIC(atomic_fetch_max_explicit, metal::max(old, value))
MSL_ATOMIC(atomic_fetch_min_explicit, metal::min(old, value))
#undef MSL_ATOMIC

template <class P>
inline bool atomic_compare_exchange_weak_explicit(P p, msl::held_type<P>* expected,
                                                  msl::held_type<P> desired, memory_order,
                                                  memory_order, MSL_SITE) {
  msl::held_type<P> want = *expected;
  *expected = msl::update(p, MSL_AT("atomic_compare_exchange_weak_explicit"),
                          [=](auto old) { return old == want ? desired : old; });
  return *expected == want;
}

} // namespace metal

#pragma clang attribute pop
