// The Metal Shading Language (3.1, compute) for clang on a host. The rewritten text of a kernel
// comes after this.
#pragma once

#include "arguments.h"
#include "simdgroup_matrix.h"

// A `threadgroup` variable in the body of a kernel: one object for all threads of the threadgroup.
#define MSL_UNWRAP(...) __VA_ARGS__
#define MSL_THREADGROUP_VARIABLE(n, type, name, dimensions)                                        \
  static const char msl_key_##n = 0;                                                               \
  typedef MSL_UNWRAP type msl_type_##n dimensions;                                                 \
  MSL_THREADGROUP msl_type_##n& name =                                                             \
      *(MSL_THREADGROUP msl_type_##n*)(uintptr_t)msl_threadgroup_variable(                         \
          &msl_key_##n, sizeof(msl_type_##n), alignof(msl_type_##n), #name)

#define kernel
#define thread
#define device MSL_DEVICE
#define threadgroup MSL_THREADGROUP
#define constant const MSL_CONSTANT
