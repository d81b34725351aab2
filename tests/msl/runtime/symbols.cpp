#include "symbols.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

namespace msl {

std::string source_line(uint64_t pc) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(pc), &info))
    return "";
  char command[1200];
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
           static_cast<unsigned long>(pc - reinterpret_cast<uint64_t>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe)
    return "";
  std::string found;
  char line[1024];
  while (fgets(line, sizeof line, pipe)) {
    line[strcspn(line, "\n(")] = 0;
    std::string text = line;
    while (text.starts_with("./"))
      text.erase(0, 2);
    while (!text.empty() && text.back() == ' ')
      text.pop_back();
    // The innermost place that isn't in our own header: what the kernel's text called.
    if (found.empty() && text.find("/msl/host/") == std::string::npos &&
        text.find('?') == std::string::npos)
      found = " at " + text;
  }
  pclose(pipe);
  return found;
}

} // namespace msl
