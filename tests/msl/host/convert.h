// Metal's constructors and casts of vectors. The rewriter calls these: clang's own functional cast
// of an ext_vector reinterprets the bits of a vector of the same size.
#pragma once

#include "types.h"

namespace msl {

template <class T, class U> constexpr T convert(U x) {
  if constexpr (!is_vector<T>) {
    return (T)x;
  } else if constexpr (!is_vector<U>) {
    return (T)((element<T>)x); // the same value in all lanes
  } else {
    static_assert(vector<T>::count == vector<U>::count,
                  "Metal: vectors of different lengths don't convert");
    return __builtin_convertvector(x, T);
  }
}

template <class E, class U> constexpr void append(E* out, int& at, U x) {
  if constexpr (is_vector<U>) {
    for (int i = 0; i < vector<U>::count; i++)
      out[at++] = (E)x[i];
  } else {
    out[at++] = (E)x;
  }
}

// T(...): one value for all lanes, a conversion, or parts in a row.
template <class T, class... A> constexpr T make(A... a) {
  if constexpr (!is_vector<T>) {
    return T(a...);
  } else if constexpr (sizeof...(A) == 0) {
    return T{};
  } else if constexpr (sizeof...(A) == 1) {
    return convert<T>(a...);
  } else {
    constexpr int count = vector<T>::count;
    static_assert((vector<A>::count + ...) == count,
                  "Metal: wrong number of components for the vector");
    element<T> parts[count] = {};
    int at = 0;
    (append(parts, at, a), ...);
    T result{};
    for (int i = 0; i < count; i++)
      result[i] = parts[i];
    return result;
  }
}

// (T)x is rewritten to Cast<T>{} ->* x: the operator binds nearly as tightly as the cast does.
template <class T> struct Cast {};
template <class T, class U> constexpr T operator->*(Cast<T>, U x) { return convert<T>(x); }

} // namespace msl

template <class T, class U> constexpr T as_type(U x) {
  static_assert(sizeof(T) == sizeof(U), "as_type between types of different sizes");
  return __builtin_bit_cast(T, x);
}
