#include "library.h"

#import <Metal/Metal.h>

#include <utility>

namespace q4metal::mps {

std::unique_ptr<at::native::mps::MetalShaderLibrary> make_library(std::string source) {
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init]; // the library's, for good
  options.languageVersion = MTLLanguageVersion3_1;
  // mathMode came with macOS 15, and with its SDK. @available would pull in a runtime library of
  // Apple's compiler.
#if __MAC_OS_X_VERSION_MAX_ALLOWED >= 150000
  if ([options respondsToSelector:@selector(setMathMode:)])
    options.mathMode = MTLMathModeSafe;
  else
#endif
    options.fastMathEnabled = NO;
  return std::make_unique<at::native::mps::MetalShaderLibrary>(std::move(source), 0u, options);
}

// The pipeline's type is part of torch's symbols, so plain C++ could not ask for it.
const void* pipeline_state(at::native::mps::MetalShaderLibrary& library,
                           const std::string& kernel) {
  return library.getPipelineStateForFunc(kernel);
}

} // namespace q4metal::mps
