// Binds the parameters of a kernel: the rewriter calls it with these, which convert to whatever it
// declares.
#pragma once

#include "atomic.h"

#pragma clang attribute push(__attribute__((no_sanitize("thread", "undefined"))),                  \
                             apply_to = function)

namespace msl {

struct Buffer {
  void* data;
  template <class T> operator MSL_DEVICE T*() const { return (MSL_DEVICE T*)(uintptr_t)data; }
  template <class T> operator MSL_DEVICE T&() const { return *(MSL_DEVICE T*)(uintptr_t)data; }
  template <class T> operator MSL_CONSTANT T*() const { return (MSL_CONSTANT T*)(uintptr_t)data; }
  template <class T> operator MSL_CONSTANT T&() const { return *(MSL_CONSTANT T*)(uintptr_t)data; }
};

struct Threadgroup {
  void* data;
  template <class T> operator MSL_THREADGROUP T*() const {
    return (MSL_THREADGROUP T*)(uintptr_t)data;
  }
  template <class T> operator MSL_THREADGROUP T&() const {
    return *(MSL_THREADGROUP T*)(uintptr_t)data;
  }
};

// A position or size, as long as the kernel wants it.
struct Extent {
  const msl_u32* n;
  operator uint() const { return n[0]; }
  operator uint2() const { return uint2{n[0], n[1]}; }
  operator uint3() const { return uint3{n[0], n[1], n[2]}; }
  operator ushort() const { return (ushort)n[0]; }
  operator ushort2() const { return ushort2{(ushort)n[0], (ushort)n[1]}; }
  operator ushort3() const { return ushort3{(ushort)n[0], (ushort)n[1], (ushort)n[2]}; }
};

namespace argument {

inline Buffer buffer(uint n) { return {msl_bound_buffer(n)}; }
inline Threadgroup threadgroup_(uint n) { return {msl_bound_threadgroup(n)}; }
inline Extent thread_position_in_grid() { return {msl_self->thread_in_grid}; }
inline Extent thread_position_in_threadgroup() { return {msl_self->thread_in_threadgroup}; }
inline Extent threadgroup_position_in_grid() { return {msl_self->threadgroup_in_grid}; }
inline Extent threads_per_threadgroup() { return {msl_self->threads_per_threadgroup}; }
inline Extent dispatch_threads_per_threadgroup() {
  return {msl_self->dispatch_threads_per_threadgroup};
}
inline Extent threadgroups_per_grid() { return {msl_self->threadgroups_per_grid}; }
inline Extent threads_per_grid() { return {msl_self->threads_per_grid}; }
inline uint thread_index_in_threadgroup() { return msl_self->thread_index; }
inline uint thread_index_in_simdgroup() { return msl_self->lane; }
inline uint simdgroup_index_in_threadgroup() { return msl_self->simdgroup; }
inline uint simdgroups_per_threadgroup() { return msl_self->simdgroups; }
inline uint threads_per_simdgroup() { return 32; }
inline uint thread_execution_width() { return 32; }
inline uint thread_index_in_quadgroup() { return msl_self->lane % 4; }
inline uint quadgroup_index_in_threadgroup() { return msl_self->thread_index / 4; }

} // namespace argument

// What the table of parameters says about a parameter's type.
template <class P> struct Parameter {
  static constexpr bool is_const = true;
  static constexpr uint size = 0;
};
template <class T> struct Parameter<MSL_DEVICE T*> {
  static constexpr bool is_const = false;
  static constexpr uint size = 0;
};
template <class T> struct Parameter<MSL_DEVICE const T*> {
  static constexpr bool is_const = true;
  static constexpr uint size = 0;
};
template <class T> struct Parameter<MSL_DEVICE T&> {
  static constexpr bool is_const = false;
  static constexpr uint size = sizeof(T);
};
template <class T> struct Parameter<MSL_DEVICE const T&> {
  static constexpr bool is_const = true;
  static constexpr uint size = sizeof(T);
};
template <class T> struct Parameter<MSL_CONSTANT const T&> {
  static constexpr bool is_const = true;
  static constexpr uint size = sizeof(T);
};

template <uint n, class First, class... Rest> struct Nth {
  using type = typename Nth<n - 1, Rest...>::type;
};
template <class First, class... Rest> struct Nth<0, First, Rest...> {
  using type = First;
};

template <uint n, class... P> constexpr bool parameter_is_const(void (*)(P...)) {
  return Parameter<typename Nth<n, P...>::type>::is_const;
}
template <uint n, class... P> constexpr uint parameter_size(void (*)(P...)) {
  return Parameter<typename Nth<n, P...>::type>::size;
}

} // namespace msl

#pragma clang attribute pop
