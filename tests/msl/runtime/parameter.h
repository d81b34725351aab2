// One [[buffer(n)]] parameter of a kernel. Plain C without library headers: the kernels' text
// includes it too.
#pragma once

typedef struct msl_parameter {
  const char* name;
  const char* declaration; // "device const float* x"
  unsigned index;          // n of [[buffer(n)]]
  unsigned is_const;       // the kernel can't write it
  unsigned size;           // bytes that a reference needs; 0 for a pointer
  unsigned optional;       // bound only where a function constant says so
} msl_parameter;
