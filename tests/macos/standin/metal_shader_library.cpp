// Stand-in for torch's Metal classes on a machine without Metal: the methods of
// ATen/native/mps/MetalShaderLibrary.h that csrc/metal uses, with the same names and duties. The
// header is torch's own, so that a method that does not exist there does not link here.
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <c10/util/Exception.h>

#include "../../../csrc/metal/library.h"
#include "kernels.h"
#include "queue.h"

namespace standin {
namespace {

constexpr uint64_t kMaxThreads = 1024; // of a threadgroup, as on every Apple GPU

// What lies behind MetalKernelFunction's two opaque pointers.
struct Encoding {
  Pipeline pipeline;
  bool in_block = false;
  std::vector<Argument> arguments;

  Argument& at(unsigned index) {
    if (arguments.size() <= index)
      arguments.resize(index + 1);
    arguments[index] = {};
    arguments[index].bound = true;
    return arguments[index];
  }
};

Pipeline pipeline(void* library, const std::string& name) {
  const auto& program = *static_cast<std::shared_ptr<Program>*>(library);
  TORCH_CHECK(program->library().has(name), "no kernel is called ", name);
  return {program, name};
}

// The library's handle is for its own class and for those that derive from it.
struct Opened : at::native::mps::MetalShaderLibrary {
  using MetalShaderLibrary::MetalShaderLibrary;
  void* handle() { return getLibrary(); }
};

} // namespace
} // namespace standin

namespace at::native::mps {

using q4metal::mps::max_threads;
using standin::Encoding;

MetalKernelFunction::MetalKernelFunction(MTLComputePipelineState_t pipeline, MTLFunction_t function)
    : cps(pipeline), func(function) {}

MetalKernelFunction::~MetalKernelFunction() { delete static_cast<Encoding*>(cps); }

uint64_t MetalKernelFunction::getMaxThreadsPerThreadgroup() const {
  return max_threads(&static_cast<Encoding*>(cps)->pipeline);
}

void MetalKernelFunction::runCommandBlock(std::function<void(void)> block) {
  auto& encoding = *static_cast<Encoding*>(cps);
  encoding.in_block = true;
  block();
  encoding.in_block = false;
}

void MetalKernelFunction::startEncoding() {
  TORCH_CHECK(static_cast<Encoding*>(cps)->in_block, "startEncoding outside of runCommandBlock");
  encoder = cps;
}

void MetalKernelFunction::setArg(unsigned index, const at::TensorBase& tensor) {
  TORCH_CHECK(encoder != nullptr, "setArg before startEncoding");
  static_cast<Encoding*>(encoder)->at(index).memory = standin::bytes_of(tensor);
}

void MetalKernelFunction::setArg(unsigned index, const void* data, uint64_t size) {
  TORCH_CHECK(encoder != nullptr, "setArg before startEncoding");
  TORCH_CHECK(size > 0 && size <= 4096, "setBytes takes 1 to 4096 bytes, not ", size);
  const auto* bytes = static_cast<const std::byte*>(data);
  static_cast<Encoding*>(encoder)->at(index).bytes.assign(bytes, bytes + size);
}

void MetalKernelFunction::dispatch(uint64_t length, std::optional<uint64_t> group) {
  const uint64_t lengths[] = {length}, groups[] = {group.value_or(standin::kMaxThreads)};
  dispatch(c10::ArrayRef<uint64_t>(lengths), c10::OptionalArrayRef<uint64_t>(groups));
}

void MetalKernelFunction::dispatch(c10::ArrayRef<uint64_t> length,
                                   c10::OptionalArrayRef<uint64_t> group) {
  TORCH_CHECK(encoder != nullptr, "dispatch before startEncoding");
  TORCH_CHECK(!length.empty() && length.size() < 4 && group.has_value() &&
                  group->size() == length.size(),
              "dispatch takes 1 to 3 sizes, as many of threadgroups as of the grid");
  uint64_t threads[] = {1, 1, 1}, groups[] = {1, 1, 1};
  std::copy(length.begin(), length.end(), threads);
  std::copy(group->begin(), group->end(), groups);
  TORCH_CHECK(groups[0] * groups[1] * groups[2] <= standin::kMaxThreads, "threadgroups of ",
              groups[0] * groups[1] * groups[2], " threads are too large");
  auto& encoding = *static_cast<Encoding*>(encoder);
  standin::Call call{encoding.pipeline, encoding.arguments, {}, {}, {}, true};
  std::copy_n(threads, 3, call.threads);
  std::copy_n(groups, 3, call.group);
  try {
    standin::wait_for_all(); // what waits comes first
    standin::run(call);
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
}

void* get_tensor_gpu_address(const at::TensorBase& tensor) {
  return standin::bytes_of(tensor).data;
}

// torch never destroys a library that is in use, and neither do the tests.
MetalShaderLibrary::~MetalShaderLibrary() = default;

MTLLibrary_t MetalShaderLibrary::getLibrary() {
  try {
    if (library == nullptr)
      library = new std::shared_ptr(std::make_shared<standin::Program>(shaderSource));
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
  return library;
}

MTLLibrary_t MetalShaderLibrary::getLibrary(const std::initializer_list<std::string>&) {
  TORCH_CHECK(false, "csrc/metal does not use parameters in Metal text");
}

std::shared_ptr<MetalKernelFunction>
MetalShaderLibrary::getKernelFunction(const std::string& name) {
  const auto pipeline = standin::pipeline(getLibrary(), name);
  return std::make_shared<MetalKernelFunction>(new Encoding{pipeline, false, {}}, nullptr);
}

} // namespace at::native::mps

std::unique_ptr<at::native::mps::MetalShaderLibrary>
q4metal::mps::make_library(std::string source) {
  return std::make_unique<standin::Opened>(std::move(source));
}

const void* q4metal::mps::pipeline_state(at::native::mps::MetalShaderLibrary& library,
                                         const std::string& kernel) {
  void* handle = static_cast<standin::Opened&>(library).handle();
  return new standin::Pipeline(standin::pipeline(handle, kernel));
}

uint64_t q4metal::mps::max_threads(const void* pipeline_state) {
  const auto& pipeline = *static_cast<const standin::Pipeline*>(pipeline_state);
  return pipeline.program->library().max_threads(pipeline.name);
}
