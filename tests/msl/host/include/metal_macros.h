// What Metal's headers define as macros. Only these are needed before the text is rewritten.
#pragma once

#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.40282347e+38f
#define FLT_MAX 3.40282347e+38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX ((half)65504.0f)
#define MAXHALF ((half)65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159274f
#define M_E_F 2.71828175f
#define M_LN2_F 0.693147182f
#define M_LOG2E_F 1.44269502f
#define M_SQRT2_F 1.41421354f
#define M_PI_H ((half)3.14159274f)
