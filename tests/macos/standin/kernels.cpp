#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

namespace standin {
namespace {

// Returns the path of the library, or a diagnosis that begins with '!'. The answer is copied into
// `answer`.
using Compiler = void (*)(const char* text, char* answer, int64_t capacity);

Compiler compiler = nullptr;
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

std::shared_ptr<msl::Library> compile(const std::string& text) {
  if (compiler == nullptr)
    throw std::runtime_error("the test has set no Metal compiler");
  std::vector<char> answer(1 << 14);
  compiler(text.c_str(), answer.data(), int64_t(answer.size()));
  if (answer[0] == '!')
    throw std::runtime_error(answer.data() + 1);
  return std::make_shared<msl::Library>(answer.data());
}

void run(const Pipeline& pipeline, std::vector<Argument>& arguments, const uint64_t threads[3],
         const uint64_t group[3]) {
  note(pipeline.name, threads, group);
  std::vector<msl_buffer> buffers(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& a = arguments[i];
    if (!a.bound)
      continue;
    buffers[i] = a.bytes.empty() ? msl_buffer{a.memory.data, a.memory.size, 0, 0}
                                 : msl_buffer{a.bytes.data(), a.bytes.size(), MSL_READ_ONLY, 0};
  }
  // Operators write into memory that they have just made: what it held before means nothing.
  for (const auto* parameter : pipeline.library->parameters(pipeline.name))
    if (!parameter->is_const && parameter->index < buffers.size())
      buffers[parameter->index].flags |= MSL_UNWRITTEN;
  msl_dispatch dispatch{};
  dispatch.kernel = pipeline.name.c_str();
  std::copy_n(threads, 3, dispatch.threads);
  std::copy_n(group, 3, dispatch.threads_per_threadgroup);
  dispatch.buffers = buffers.data();
  dispatch.buffer_count = uint32_t(buffers.size());
  pipeline.library->run(dispatch);
}

} // namespace standin

extern "C" void standin_set_compiler(standin::Compiler compiler) { standin::compiler = compiler; }

// Kernel, threads and threads of a threadgroup of each dispatch so far; valid until the next call.
extern "C" const char* standin_dispatches() {
  static std::string copy;
  const std::lock_guard lock(standin::mutex);
  copy = standin::dispatches;
  return copy.c_str();
}
