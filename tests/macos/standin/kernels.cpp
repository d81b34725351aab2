#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "export.h"

namespace standin {
namespace {

// Compiles a check build or a typed one. Copies the path of the library into `answer`, or a
// diagnosis that begins with '!'.
using Compiler = void (*)(const char* text, bool checks, char* answer, int64_t capacity);

Compiler compiler = nullptr;
std::atomic<bool> checks = false; // whether check builds are run
std::mutex mutex;
std::string dispatches; // a line each

void note(const std::string& name, const uint64_t threads[3], const uint64_t group[3]) {
  std::string line = name;
  for (int i = 0; i < 3; ++i)
    line += ' ' + std::to_string(threads[i]);
  for (int i = 0; i < 3; ++i)
    line += ' ' + std::to_string(group[i]);
  const std::lock_guard lock(mutex);
  dispatches += line + '\n';
}

} // namespace

const msl::Library& Program::library() {
  static std::mutex building;
  const std::lock_guard lock(building);
  const bool checks = standin::checks;
  auto& build = builds_[checks];
  if (build == nullptr) {
    if (compiler == nullptr)
      throw std::runtime_error("the test has set no Metal compiler");
    std::vector<char> answer(1 << 14);
    compiler(text_.c_str(), checks, answer.data(), int64_t(answer.size()));
    if (answer[0] == '!')
      throw std::runtime_error(answer.data() + 1);
    build = std::make_unique<msl::Library>(answer.data());
  }
  return *build;
}

std::vector<Access> run(Call& call) {
  note(call.pipeline.name, call.threads, call.group);
  const auto& library = call.pipeline.program->library();
  std::vector<msl_buffer> buffers(call.arguments.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    auto& a = call.arguments[i];
    if (a.bound)
      buffers[i] = a.bytes.empty() ? msl_buffer{a.memory.data, a.memory.size, 0, 0}
                                   : msl_buffer{a.bytes.data(), a.bytes.size(), MSL_READ_ONLY, 0};
  }
  const auto parameters = library.parameters(call.pipeline.name);
  for (const auto* parameter : parameters)
    if (call.has_fresh_outputs && !parameter->is_const && parameter->index < buffers.size())
      buffers[parameter->index].flags |= MSL_UNWRITTEN;
  std::vector<msl_buffer> resident;
  for (const Range& range : call.resident)
    resident.push_back({range.data, range.size, 0, 0});
  msl_dispatch dispatch{};
  dispatch.kernel = call.pipeline.name.c_str();
  std::copy_n(call.threads, 3, dispatch.threads);
  std::copy_n(call.group, 3, dispatch.threads_per_threadgroup);
  dispatch.buffers = buffers.data();
  dispatch.buffer_count = uint32_t(buffers.size());
  dispatch.resident = resident.data();
  dispatch.resident_count = uint32_t(resident.size());
  library.run(dispatch);

  std::vector<Access> accesses;
  const auto add = [&](size_t n, uint64_t begin, uint64_t end, bool written) {
    if (n < buffers.size() && !call.arguments[n].bytes.empty())
      return; // a copy that only this call has
    const auto& buffer = n < buffers.size() ? buffers[n] : resident[n - buffers.size()];
    const auto* data = static_cast<const std::byte*>(buffer.data);
    accesses.push_back({data + begin, data + end, written});
  };
  const size_t count = buffers.size() + resident.size();
  for (size_t n = 0; n < count && library.checks(); ++n)
    for (const bool written : {false, true})
      for (const auto& range : library.touched(uint32_t(n), written))
        add(n, range.begin, range.end, written);
  if (!library.checks())
    for (const auto* parameter : parameters)
      if (parameter->index < buffers.size() && buffers[parameter->index].data != nullptr)
        add(parameter->index, 0, 1, !parameter->is_const);
  return accesses;
}

} // namespace standin

STANDIN_EXPORT void standin_set_compiler(standin::Compiler compiler) {
  standin::compiler = compiler;
}

// From now on check builds are run, or typed ones.
STANDIN_EXPORT void standin_set_checks(bool checks) { standin::checks = checks; }

// Kernel, threads and threads of a threadgroup of each dispatch so far; valid until the next call.
STANDIN_EXPORT const char* standin_dispatches() {
  static std::string copy;
  const std::lock_guard lock(standin::mutex);
  copy = standin::dispatches;
  return copy.c_str();
}
