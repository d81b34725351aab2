// The complete text of each kernel family, as csrc/metal/embed.py wrote it into the extension.
#pragma once

#include <string_view>

namespace q4metal::mps {

// Null where there is no such family.
const char* family_text(std::string_view family);

} // namespace q4metal::mps
