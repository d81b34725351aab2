#include "pipelines.h"

#include <chrono>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

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
  std::unordered_map<std::string, const void*> states;
  std::vector<std::unique_ptr<MetalShaderLibrary>> libraries; // of the states
  std::vector<Compiled> log;

  static Cache& instance() {
    static auto* cache = new Cache;
    return *cache;
  }
};

// `use` asks the library for its kernels, which makes torch compile it.
template <typename Use>
std::unique_ptr<MetalShaderLibrary> compile(const char* family, const std::string& instantiations,
                                            const std::string& names, const Use& use) {
  const char* text = family_text(family);
  TORCH_CHECK(text != nullptr, "the extension has no kernel family '", family, "'; build it again");
  const auto begin = std::chrono::steady_clock::now();
  auto library = make_library(text + instantiations);
  try {
    use(*library);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, "the Metal kernel ", names,
                " does not compile on this machine: ", error.what_without_backtrace());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  Cache::instance().log.push_back({names, seconds.count()});
  return library;
}

// Metal drops a dispatch of larger threadgroups without an error.
void check_threads(const std::string& kernel, uint64_t wanted, uint64_t allowed) {
  TORCH_CHECK(allowed >= wanted, "the Metal kernel ", kernel, " needs threadgroups of ", wanted,
              " threads; on this GPU it may have ", allowed);
}

} // namespace

std::shared_ptr<Function> pipeline(const KernelKey& key) {
  auto& cache = Cache::instance();
  const std::lock_guard lock(cache.mutex);
  auto found = cache.entries.find(key.packed());
  if (found == cache.entries.end()) {
    const Kernel kernel = kernel_of(key);
    auto library = compile(kernel.family, kernel.instantiation, kernel.name,
                           [&](MetalShaderLibrary& made) { made.getKernelFunction(kernel.name); });
    found = cache.entries.emplace(key.packed(), Entry{kernel.name, std::move(library)}).first;
  }
  return found->second.library->getKernelFunction(found->second.name);
}

std::vector<const void*> pipeline_states(const std::vector<Kernel>& kernels) {
  auto& cache = Cache::instance();
  const std::lock_guard lock(cache.mutex);
  std::map<std::string, std::map<std::string, Kernel>> missing; // by family and name
  for (const Kernel& kernel : kernels)
    if (!cache.states.count(kernel.name))
      missing[kernel.family].emplace(kernel.name, kernel);
  for (const auto& [family, wanted] : missing) {
    std::string instantiations, names;
    for (const auto& [name, kernel] : wanted) {
      instantiations += kernel.instantiation;
      names += (names.empty() ? "" : " ") + name;
    }
    std::unordered_map<std::string, const void*> made;
    auto library =
        compile(family.c_str(), instantiations, names, [&](MetalShaderLibrary& compiled) {
          for (const auto& [name, kernel] : wanted)
            made[name] = pipeline_state(compiled, name);
        });
    for (const auto& [name, kernel] : wanted)
      check_threads(name, kernel.threads, max_threads(made.at(name)));
    cache.libraries.push_back(std::move(library));
    cache.states.merge(made);
  }
  std::vector<const void*> states;
  for (const Kernel& kernel : kernels)
    states.push_back(cache.states.at(kernel.name));
  return states;
}

std::vector<Compiled> compile_log() {
  auto& cache = Cache::instance();
  const std::lock_guard lock(cache.mutex);
  return cache.log;
}

} // namespace q4metal::mps
