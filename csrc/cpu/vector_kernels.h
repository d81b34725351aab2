// The table of vector_math.h, attention.h and prompt_attention.h. Every instruction set's file
// includes it, last, so that it is compiled under that file's target.
#pragma once

#include "attention.h"
#include "prompt_attention.h"
#include "vector_math.h"

namespace q4metal::cpu {
namespace {

constexpr VectorKernels vector_kernels = {norm_gamma,     scale,          add,
                                          rope,           swiglu,         sum_exp,
                                          narrow_row,     dense_matvec,   attention_split,
                                          attention_rows, attention_rows, attention_combine};

} // namespace
} // namespace q4metal::cpu
