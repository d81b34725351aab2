// Metal libraries as torch compiles them, with our own compile options.
#pragma once

#include <ATen/native/mps/MetalShaderLibrary.h>

#include <memory>
#include <string>

// With ARC a pair of objects is returned in memory and released by who gets it. torch was compiled
// without: it returns its pipelines in registers and goes on owning them.
#ifdef __OBJC__
static_assert(!__has_feature(objc_arc), "compile without -fobjc-arc, as torch was");
#endif

namespace q4metal::mps {

// Compiled on first use. Math mode "safe": no reassociation, infinities and NaN kept, so that two
// rows of a batch give the bits that one gives. Precise functions: a fast logarithm's error beside
// 1 is absolute, and plan_sample takes the logarithm of one. Language version 3.1, which has
// bfloat: macOS 14.
std::unique_ptr<at::native::mps::MetalShaderLibrary> make_library(std::string source);

// The id<MTLComputePipelineState> of a kernel; it lives as long as the library.
const void* pipeline_state(at::native::mps::MetalShaderLibrary& library, const std::string& kernel);

// How large its threadgroups may be on this GPU.
uint64_t max_threads(const void* pipeline_state);

} // namespace q4metal::mps
