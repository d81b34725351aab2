// Scalars, vectors, address spaces and type traits of Metal, for clang.
#pragma once

// clang's own address spaces: a pointer into the wrong one is a compile error, as in Metal. x86-64
// code is the same for all numbers below 256.
#define MSL_DEVICE __attribute__((address_space(1)))
#define MSL_CONSTANT __attribute__((address_space(2)))
#define MSL_THREADGROUP __attribute__((address_space(3)))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __INT8_TYPE__ int8_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __INT16_TYPE__ int16_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double x) { return (half)x; }
constexpr half operator"" H(long double x) { return (half)x; }
constexpr half operator""h(unsigned long long x) { return (half)x; }
constexpr bfloat operator"" bf(long double x) { return (bfloat)x; }
constexpr bfloat operator"" BF(long double x) { return (bfloat)x; }

// float -> bfloat, to nearest even; gcc 12's libgcc has none. Every rounding to bfloat calls this.
extern "C" __attribute__((visibility("hidden"), used)) inline bfloat __truncsfbf2(float x) {
  uint bits = __builtin_bit_cast(uint, x);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  uint rounded = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_bit_cast(bfloat, (ushort)rounded);
}

// packed_T2 and packed_T4 are the same vectors with the alignment of one element.
#define MSL_VECTORS(T)                                                                             \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                              \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                              \
  typedef T T##4 __attribute__((ext_vector_type(4)));                                              \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(sizeof(T))));                 \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(sizeof(T))));                 \
  namespace metal {                                                                                \
  using ::T##2, ::T##3, ::T##4;                                                                    \
  }
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)
#undef MSL_VECTORS

// What comparing 32-bit vectors gives in clang: 0 and -1 in lanes of int.
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;

// packed_T3 is 3 elements long where T3 has the size of 4. Its elements can be read and written one
// by one.
#define MSL_PACKED3(T)                                                                             \
  struct packed_##T##3 { T x, y, z; };
MSL_PACKED3(float)
MSL_PACKED3(half)
MSL_PACKED3(bfloat)
MSL_PACKED3(int)
MSL_PACKED3(uint)
#undef MSL_PACKED3

namespace metal {

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

template <class T, T v> struct integral_constant {
  static constexpr T value = v;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool b, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> {
  using type = T;
};
template <bool b, class T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool b, class T, class F> struct conditional {
  using type = T;
};
template <class T, class F> struct conditional<false, T, F> {
  using type = F;
};
template <bool b, class T, class F> using conditional_t = typename conditional<b, T, F>::type;

template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> constexpr bool is_same_v = __is_same(A, B);
template <class T> using remove_cv_t = __remove_cv(T);
template <class T> struct remove_cv {
  using type = __remove_cv(T);
};
template <class T> using remove_const_t = __remove_const(T);
template <class T> using remove_reference_t = __remove_reference_t(T);
template <class T> struct remove_addrspace {
  using type = T;
};
template <class T> struct remove_addrspace<MSL_DEVICE T> {
  using type = T;
};
template <class T> struct remove_addrspace<MSL_CONSTANT T> {
  using type = T;
};
template <class T> struct remove_addrspace<MSL_THREADGROUP T> {
  using type = T;
};
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
constexpr bool is_floating_point_v =
    __is_floating_point(T) || is_same_v<remove_cv_t<T>, half> || is_same_v<remove_cv_t<T>, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr bool is_integral_v = __is_integral(T);
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> constexpr bool is_signed_v = __is_signed(T);
template <class T> constexpr bool is_unsigned_v = __is_unsigned(T);

template <class T> struct numeric_limits;
#define MSL_LIMITS(T, lo, hi, least, eps, inf, nan)                                                \
  template <> struct numeric_limits<T> {                                                           \
    static constexpr T lowest() { return (T)(lo); }                                                \
    static constexpr T max() { return (T)(hi); }                                                   \
    static constexpr T min() { return (T)(least); }                                                \
    static constexpr T epsilon() { return (T)(eps); }                                              \
    static constexpr T infinity() { return (T)(inf); }                                             \
    static constexpr T quiet_NaN() { return (T)(nan); }                                            \
  };
#define MSL_FLOAT_LIMITS(T, hi, least, eps)                                                        \
  MSL_LIMITS(T, -(hi), hi, least, eps, __builtin_inff(), __builtin_nanf(""))
#define MSL_INT_LIMITS(T, lo, hi) MSL_LIMITS(T, lo, hi, lo, 0, 0, 0)
MSL_FLOAT_LIMITS(float, 3.40282347e+38f, 1.17549435e-38f, 1.1920929e-7f)
MSL_FLOAT_LIMITS(half, 65504.0f, 6.103515625e-5f, 9.765625e-4f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e+38f, 1.17549435e-38f, 7.8125e-3f)
MSL_INT_LIMITS(char, -128, 127)
MSL_INT_LIMITS(uchar, 0, 255)
MSL_INT_LIMITS(short, -32768, 32767)
MSL_INT_LIMITS(ushort, 0, 65535)
MSL_INT_LIMITS(int, -2147483647 - 1, 2147483647)
MSL_INT_LIMITS(uint, 0, 4294967295u)
MSL_INT_LIMITS(long, -9223372036854775807l - 1, 9223372036854775807l)
MSL_INT_LIMITS(ulong, 0, 18446744073709551615ul)
#undef MSL_FLOAT_LIMITS
#undef MSL_INT_LIMITS
#undef MSL_LIMITS

} // namespace metal

namespace msl {

template <class T> struct vector {
  using element = T;
  static constexpr int count = 1;
};
template <class T> struct vector<T __attribute__((ext_vector_type(2)))> {
  using element = T;
  static constexpr int count = 2;
};
template <class T> struct vector<T __attribute__((ext_vector_type(3)))> {
  using element = T;
  static constexpr int count = 3;
};
template <class T> struct vector<T __attribute__((ext_vector_type(4)))> {
  using element = T;
  static constexpr int count = 4;
};
template <class T> constexpr bool is_vector = vector<T>::count > 1;
template <class T> using element = typename vector<T>::element;

template <class T>
using plain =
    metal::remove_cv_t<metal::remove_addrspace_t<metal::remove_cv_t<metal::remove_reference_t<T>>>>;

} // namespace msl
