// The few aten operators that make MPS tensors usable with a torch that was built without MPS; all
// others run on the CPU through torch's boxed fallback, which notes their names.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "export.h"
#include "memory.h"
#include "queue.h"

namespace standin {
namespace {

const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(size, allocator(), kKeys, type, format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(size, stride, allocator(), kKeys, type);
}

// The same memory as a tensor that the CPU may touch.
at::Tensor on_cpu(const at::Tensor& t) {
  if (!t.device().is_mps())
    return t;
  return at::from_blob(bytes_of(t).data, t.sizes(), t.strides(), t.options().device(at::kCPU));
}

struct Uploads {
  std::mutex mutex;
  int64_t largest = 0, bytes = 0;

  static Uploads& instance() {
    static auto* uploads = new Uploads;
    return *uploads;
  }
};

// As torch's: between host and device it waits unless that is told not to, within it never does.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  const bool is_inside = self.device().is_mps() && from.device().is_mps();
  if (self.device().is_mps() && !from.device().is_mps()) {
    auto& uploads = Uploads::instance();
    const std::lock_guard lock(uploads.mutex);
    uploads.largest = std::max(uploads.largest, int64_t(from.nbytes()));
    uploads.bytes += int64_t(from.nbytes());
  }
  enqueue([to = self, from] { on_cpu(to).copy_(on_cpu(from)); });
  if (!is_inside && !non_blocking)
    wait_for_all();
  return self;
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return as_strided(self, size, stride, self.storage_offset());
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) {
    const auto made = empty(self.sizes(), to.scalar_type(), {}, {}, {}, {});
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
    to.unsafeGetTensorImpl()->set_storage_offset(0);
    to.unsafeGetTensorImpl()->set_sizes_contiguous(self.sizes());
  }
  auto target = to;
  return target.copy_(self);
}

struct Fallbacks {
  std::mutex mutex;
  std::string names;

  static Fallbacks& instance() {
    static auto* fallbacks = new Fallbacks;
    return *fallbacks;
  }
};

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  {
    auto& fallbacks = Fallbacks::instance();
    const std::lock_guard lock(fallbacks.mutex);
    fallbacks.names += op.schema().name() + "\n";
  }
  wait_for_all();
  at::native::cpu_fallback(op, stack);
}

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS>;
C10_REGISTER_GUARD_IMPL(MPS, Guard)

} // namespace
} // namespace standin

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", &standin::empty);
  m.impl("empty_strided", &standin::empty_strided);
  m.impl("copy_", &standin::copy_);
  m.impl("as_strided", &standin::as_strided);
  m.impl("_reshape_alias", &standin::reshape_alias);
  m.impl("view", &at::native::view);
  m.impl("_copy_from_and_resize", &standin::copy_from_and_resize);
}

TORCH_LIBRARY_IMPL(_, MPS, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&standin::fall_back>());
}

// Bytes of the largest copy from the host so far.
STANDIN_EXPORT int64_t standin_largest_upload() {
  auto& uploads = standin::Uploads::instance();
  const std::lock_guard lock(uploads.mutex);
  return uploads.largest;
}

// Bytes of all of them.
STANDIN_EXPORT int64_t standin_uploaded() {
  auto& uploads = standin::Uploads::instance();
  const std::lock_guard lock(uploads.mutex);
  return uploads.bytes;
}

// Names of the operators that ran on the CPU so far, one a line; valid until the next call.
STANDIN_EXPORT const char* standin_fallbacks() {
  static std::string names;
  auto& fallbacks = standin::Fallbacks::instance();
  const std::lock_guard lock(fallbacks.mutex);
  names = fallbacks.names;
  return names.c_str();
}
