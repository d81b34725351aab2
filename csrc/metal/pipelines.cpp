#include "pipelines.h"

#include <chrono>
#include <mutex>
#include <unordered_map>

#include "kernel_text.h"
#include "library.h"

namespace q4metal::mps {
namespace {

using at::native::mps::MetalShaderLibrary;

struct Entry {
  std::string name;
  std::unique_ptr<MetalShaderLibrary> library;
};

// torch's libraries cache their pipelines without a lock of their own, so theirs is ours. Nothing
// here is ever destroyed: torch's Metal objects may be gone before static destructors run.
struct Cache {
  std::mutex mutex;
  std::unordered_map<uint64_t, Entry> entries; // by KernelKey::packed
  std::vector<Compiled> log;

  static Cache& instance() {
    static auto* cache = new Cache;
    return *cache;
  }
};

Entry compile(const Kernel& kernel, std::vector<Compiled>& log) {
  const char* text = family_text(kernel.family);
  TORCH_CHECK(text != nullptr, "the extension has no kernel family '", kernel.family,
              "'; build it again");
  const auto begin = std::chrono::steady_clock::now();
  Entry entry{kernel.name, make_library(text + kernel.instantiation)};
  try {
    entry.library->getKernelFunction(entry.name);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "the Metal kernel ", entry.name,
                " does not compile on this machine: ", error.what_without_backtrace());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  log.push_back({entry.name, seconds.count()});
  return entry;
}

} // namespace

std::shared_ptr<Function> pipeline(const KernelKey& key) {
  auto& cache = Cache::instance();
  const std::lock_guard lock(cache.mutex);
  auto found = cache.entries.find(key.packed());
  if (found == cache.entries.end())
    found = cache.entries.emplace(key.packed(), compile(kernel_of(key), cache.log)).first;
  return found->second.library->getKernelFunction(found->second.name);
}

std::vector<Compiled> compile_log() {
  auto& cache = Cache::instance();
  const std::lock_guard lock(cache.mutex);
  return cache.log;
}

} // namespace q4metal::mps
