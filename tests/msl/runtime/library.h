// A compiled .metal library in a C++ program: the C interface of msl.h behind dlopen.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "msl.h"

namespace msl {

class Library {
public:
  // Throws std::runtime_error if `path` can't be loaded or isn't of this version.
  explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_)
      throw std::runtime_error(dlerror());
    if (find<decltype(msl_abi)>("msl_abi")() != MSL_ABI)
      throw std::runtime_error(path + " was built for another version of msl.h");
    run_ = find<decltype(msl_run)>("msl_run");
    touched_ = find<decltype(msl_touched)>("msl_touched");
  }

  bool checks() const { return find<decltype(msl_checks)>("msl_checks")(); }
  bool has(const std::string& kernel) const {
    return find<decltype(msl_kernel_find)>("msl_kernel_find")(kernel.c_str()) >= 0;
  }
  // How large a threadgroup of `kernel`, which exists, may be on every device.
  uint32_t max_threads(const std::string& kernel) const {
    const int k = find<decltype(msl_kernel_find)>("msl_kernel_find")(kernel.c_str());
    return find<decltype(msl_kernel_max_threads)>("msl_kernel_max_threads")(uint32_t(k));
  }
  // The n of [[function_constant(n)]], or -1.
  int constant(const std::string& name) const {
    return find<decltype(msl_constant_find)>("msl_constant_find")(name.c_str());
  }
  // The [[buffer(n)]] parameters of `kernel`, in the order of the text; empty for an unknown
  // kernel.
  std::vector<const msl_parameter*> parameters(const std::string& kernel) const {
    const int k = find<decltype(msl_kernel_find)>("msl_kernel_find")(kernel.c_str());
    std::vector<const msl_parameter*> all;
    if (k < 0)
      return all;
    const uint32_t count = find<decltype(msl_parameter_count)>("msl_parameter_count")(k);
    for (uint32_t i = 0; i < count; i++)
      all.push_back(find<decltype(msl_parameter_get)>("msl_parameter_get")(k, i));
    return all;
  }

  // Throws std::runtime_error with the one-line message of a dispatch that failed.
  void run(msl_dispatch& dispatch) const {
    if (run_(&dispatch))
      throw std::runtime_error(dispatch.error);
  }

  // Of the last run of a check build: byte ranges of buffer `n`.
  std::vector<msl_range> touched(uint32_t n, bool written) const {
    std::vector<msl_range> ranges(touched_(n, written, nullptr, 0));
    touched_(n, written, ranges.data(), static_cast<uint32_t>(ranges.size()));
    return ranges;
  }

private:
  template <class F> F* find(const char* name) const {
    void* p = dlsym(handle_, name);
    if (!p)
      throw std::runtime_error(std::string("no function ") + name + " in the library");
    return reinterpret_cast<F*>(p);
  }

  void* handle_; // never closed: fibers and threads may still hold its code
  decltype(&msl_run) run_;
  decltype(&msl_touched) touched_;
};

} // namespace msl
