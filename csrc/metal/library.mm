#include "library.h"

#import <Metal/Metal.h>

#include <utility>

namespace q4metal::mps {

std::unique_ptr<at::native::mps::MetalShaderLibrary> make_library(std::string source) {
  MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
  options.languageVersion = MTLLanguageVersion3_1;
  // mathMode came with macOS 15. @available would pull in a runtime library of Apple's compiler.
  if ([options respondsToSelector:@selector(setMathMode:)])
    options.mathMode = MTLMathModeSafe;
  else
    options.fastMathEnabled = NO;
  return std::make_unique<at::native::mps::MetalShaderLibrary>(std::move(source), 0u, options);
}

} // namespace q4metal::mps
