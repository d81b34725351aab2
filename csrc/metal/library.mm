#include "library.h"

#import <Metal/Metal.h>

#include <utility>

namespace q4metal::mps {

std::unique_ptr<at::native::mps::MetalShaderLibrary> make_library(std::string source) {
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init]; // the library's, for good
  options.languageVersion = MTLLanguageVersion3_1;
  // On every macOS this is mathMode "safe" and the precise functions. The properties that took its
  // place in macOS 15 are two, and mathMode alone leaves exp and log to the fast functions; older
  // SDKs do not have them.
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
  options.fastMathEnabled = NO;
#pragma clang diagnostic pop
  return std::make_unique<at::native::mps::MetalShaderLibrary>(std::move(source), 0u, options);
}

// The pipeline's type is part of torch's symbols, so plain C++ could not ask for it.
const void* pipeline_state(at::native::mps::MetalShaderLibrary& library,
                           const std::string& kernel) {
  return library.getPipelineStateForFunc(kernel);
}

uint64_t max_threads(const void* pipeline_state) {
  return ((id<MTLComputePipelineState>)pipeline_state).maxTotalThreadsPerThreadgroup;
}

} // namespace q4metal::mps
