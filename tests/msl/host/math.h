// Metal's math functions. float goes through libm, half is computed in float and rounded once.
#pragma once

#include "convert.h"

#define MSL_VECTOR_ONLY(V) class V, class = metal::enable_if_t<msl::is_vector<V>>

namespace metal {

// On floats only: bfloat arguments have to be converted, as in Metal 3.1.
#define MSL_UNARY(name, expression)                                                                \
  inline float name(float x) { return expression; }                                                \
  inline half name(half h) {                                                                       \
    float x = h;                                                                                   \
    return (half)(expression);                                                                     \
  }                                                                                                \
  template <MSL_VECTOR_ONLY(V)> inline V name(V v) {                                               \
    V r;                                                                                           \
    for (int i = 0; i < msl::vector<V>::count; i++)                                                \
      r[i] = name(v[i]);                                                                           \
    return r;                                                                                      \
  }
#define MSL_BINARY(name, expression)                                                               \
  inline float name(float x, float y) { return expression; }                                       \
  inline half name(half a, half b) {                                                               \
    float x = a, y = b;                                                                            \
    return (half)(expression);                                                                     \
  }                                                                                                \
  template <MSL_VECTOR_ONLY(V)> inline V name(V a, V b) {                                          \
    V r;                                                                                           \
    for (int i = 0; i < msl::vector<V>::count; i++)                                                \
      r[i] = name(a[i], b[i]);                                                                     \
    return r;                                                                                      \
  }
#define MSL_FLOAT_FUNCTIONS                                                                        \
  MSL_UNARY(exp, __builtin_expf(x))                                                                \
  MSL_UNARY(exp2, __builtin_exp2f(x))                                                              \
  MSL_UNARY(exp10, __builtin_exp10f(x))                                                            \
  MSL_UNARY(log, __builtin_logf(x))                                                                \
  MSL_UNARY(log2, __builtin_log2f(x))                                                              \
  MSL_UNARY(log10, __builtin_log10f(x))                                                            \
  MSL_UNARY(sqrt, __builtin_sqrtf(x))                                                              \
  MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                                                      \
  MSL_UNARY(sin, __builtin_sinf(x))                                                                \
  MSL_UNARY(cos, __builtin_cosf(x))                                                                \
  MSL_UNARY(tan, __builtin_tanf(x))                                                                \
  MSL_UNARY(asin, __builtin_asinf(x))                                                              \
  MSL_UNARY(acos, __builtin_acosf(x))                                                              \
  MSL_UNARY(atan, __builtin_atanf(x))                                                              \
  MSL_UNARY(sinh, __builtin_sinhf(x))                                                              \
  MSL_UNARY(cosh, __builtin_coshf(x))                                                              \
  MSL_UNARY(tanh, __builtin_tanhf(x))                                                              \
  MSL_UNARY(floor, __builtin_floorf(x))                                                            \
  MSL_UNARY(ceil, __builtin_ceilf(x))                                                              \
  MSL_UNARY(rint, __builtin_rintf(x))                                                              \
  MSL_UNARY(round, __builtin_roundf(x))                                                            \
  MSL_UNARY(trunc, __builtin_truncf(x))                                                            \
  MSL_UNARY(fabs, __builtin_fabsf(x))                                                              \
  MSL_UNARY(fract, x - __builtin_floorf(x))                                                        \
  MSL_BINARY(pow, __builtin_powf(x, y))                                                            \
  MSL_BINARY(powr, __builtin_powf(x, y))                                                           \
  MSL_BINARY(atan2, __builtin_atan2f(x, y))                                                        \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                                                          \
  MSL_BINARY(fmin, __builtin_fminf(x, y))                                                          \
  MSL_BINARY(fmax, __builtin_fmaxf(x, y))                                                          \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))                                                  \
  MSL_BINARY(fdim, __builtin_fdimf(x, y))
MSL_FLOAT_FUNCTIONS
namespace precise {
MSL_FLOAT_FUNCTIONS
}
namespace fast {
MSL_FLOAT_FUNCTIONS
}
#undef MSL_FLOAT_FUNCTIONS
#undef MSL_UNARY
#undef MSL_BINARY

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) {
  return (half)__builtin_fma((double)a, (double)b, (double)c);
}
template <MSL_VECTOR_ONLY(V)> inline V fma(V a, V b, V c) {
  V r;
  for (int i = 0; i < msl::vector<V>::count; i++)
    r[i] = fma(a[i], b[i], c[i]);
  return r;
}
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }

template <class T> inline T abs(T x) {
  if constexpr (msl::is_vector<T>) {
    T r;
    for (int i = 0; i < msl::vector<T>::count; i++)
      r[i] = abs(x[i]);
    return r;
  } else if constexpr (is_floating_point_v<T>) {
    return (T)__builtin_fabsf((float)x);
  } else {
    return x < 0 ? (T)-x : x;
  }
}

// Both arguments of one type: where Metal finds its overloads ambiguous, so is this an error.
// Of a NaN and a number they give the number.
#define MSL_CHOOSE(name, condition)                                                                \
  template <class T> inline T name(T a, T b) {                                                     \
    if constexpr (msl::is_vector<T>) {                                                             \
      T r;                                                                                         \
      for (int i = 0; i < msl::vector<T>::count; i++)                                              \
        r[i] = name(a[i], b[i]);                                                                   \
      return r;                                                                                    \
    } else {                                                                                       \
      return (condition) || a != a ? b : a;                                                        \
    }                                                                                              \
  }
MSL_CHOOSE(min, b < a)
MSL_CHOOSE(max, a < b)
#undef MSL_CHOOSE
template <class T> inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> inline T saturate(T x) { return clamp(x, (T)0.0f, (T)1.0f); }
template <class T> inline T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> inline T step(T edge, T x) { return x < edge ? (T)0.0f : (T)1.0f; }
template <class T> inline T sign(T x) { return x > 0 ? (T)1.0f : x < 0 ? (T)-1.0f : (T)0.0f; }

template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class V, class C, class = enable_if_t<msl::is_vector<V> && msl::is_vector<C>>>
inline V select(V a, V b, C c) {
  V r;
  for (int i = 0; i < msl::vector<V>::count; i++)
    r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <MSL_VECTOR_ONLY(V)> inline bool any(V v) {
  bool r = false;
  for (int i = 0; i < msl::vector<V>::count; i++)
    r |= v[i] != 0;
  return r;
}
template <MSL_VECTOR_ONLY(V)> inline bool all(V v) {
  bool r = true;
  for (int i = 0; i < msl::vector<V>::count; i++)
    r &= v[i] != 0;
  return r;
}

template <MSL_VECTOR_ONLY(V)> inline msl::element<V> dot(V a, V b) {
  msl::element<V> sum = a[0] * b[0];
  for (int i = 1; i < msl::vector<V>::count; i++)
    sum += a[i] * b[i];
  return sum;
}
template <MSL_VECTOR_ONLY(V)> inline msl::element<V> length_squared(V v) { return dot(v, v); }
template <MSL_VECTOR_ONLY(V)> inline msl::element<V> length(V v) { return sqrt(dot(v, v)); }

inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

inline uint popcount(uint x) { return (uint)__builtin_popcount(x); }
inline uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32; }
inline uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
inline uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n); }
inline uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
inline int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
inline uint mul24(uint a, uint b) { return (a & 0xffffff) * (b & 0xffffff); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (0xffffffffu >> (32 - bits));
}
inline uint insert_bits(uint base, uint insert, uint offset, uint bits) {
  if (bits == 0)
    return base;
  uint mask = (0xffffffffu >> (32 - bits)) << offset;
  return (base & ~mask) | (insert << offset & mask);
}

inline float4 unpack_unorm4x8_to_float(uint x) {
  return float4{(x & 255) / 255.0f, (x >> 8 & 255) / 255.0f, (x >> 16 & 255) / 255.0f,
                (x >> 24) / 255.0f};
}

} // namespace metal

#undef MSL_VECTOR_ONLY
