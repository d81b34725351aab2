#include "memory.h"
#include "export.h"
#include "queue.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace standin {
namespace {

constexpr size_t kAlignment = 256; // of Metal's buffers

struct Contents {
  std::byte* data;
  size_t size;
  size_t mapped;
};

struct Buffers {
  std::mutex mutex;
  std::map<const void*, Contents> by_handle;
  std::vector<void*> released; // while work is waiting: Metal retains what commands use
  int64_t made = 0, bytes = 0, most = 0;

  static Buffers& instance() {
    static auto* buffers = new Buffers;
    return *buffers;
  }
};

void free_buffer(Buffers& buffers, void* handle) {
  const auto found = buffers.by_handle.find(handle);
  std::free(found->second.data);
  munmap(handle, found->second.mapped);
  buffers.bytes -= int64_t(found->second.size);
  buffers.by_handle.erase(found);
}

void release(void* handle) {
  auto& buffers = Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  if (is_busy())
    buffers.released.push_back(handle);
  else
    free_buffer(buffers, handle);
}

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    const c10::Device device(c10::DeviceType::MPS, 0);
    if (size == 0)
      return {nullptr, nullptr, &release_nothing, device};
    const size_t rounded = (size + kAlignment - 1) / kAlignment * kAlignment;
    const size_t mapped = (size + 4095) / 4096 * 4096;
    void* handle = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(handle != MAP_FAILED, "no address range for ", size, " bytes");
    auto* data = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    // Neither zero nor a plausible number in any dtype.
    std::fill(data, data + rounded, std::byte{0xFB});
    auto& buffers = Buffers::instance();
    const std::lock_guard lock(buffers.mutex);
    buffers.by_handle[handle] = {data, size, mapped};
    ++buffers.made;
    buffers.bytes += int64_t(size);
    buffers.most = std::max(buffers.most, buffers.bytes);
    return {handle, handle, &release, device};
  }

  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "buffers of the MPS stand-in are not copied by address");
  }

  static void release_nothing(void*) {}
};

} // namespace

at::Allocator* allocator() {
  static auto* one = new Allocator;
  return one;
}

Range bytes_of(const void* handle, uint64_t offset) {
  if (handle == nullptr)
    return {nullptr, 0};
  auto& buffers = Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  const auto found = buffers.by_handle.find(handle);
  TORCH_CHECK(found != buffers.by_handle.end(), "not a buffer of the MPS stand-in");
  TORCH_CHECK(offset <= found->second.size, "offset ", offset, " lies beyond a buffer of ",
              found->second.size, " bytes");
  return {found->second.data + offset, found->second.size - offset};
}

Range bytes_of(const at::TensorBase& tensor) {
  TORCH_CHECK(tensor.device().is_mps(), "a tensor on ", tensor.device(), " is not on MPS");
  auto range = bytes_of(tensor.storage().data(), tensor.storage_offset() * tensor.element_size());
  int64_t last = tensor.numel() == 0 ? -1 : 0;
  for (int64_t i = 0; i < tensor.dim() && last >= 0; ++i)
    last += (tensor.size(i) - 1) * tensor.stride(i);
  const uint64_t needed = (last + 1) * tensor.element_size();
  TORCH_CHECK(needed <= range.size, "a tensor reaches beyond its buffer");
  return {range.data, needed};
}

int64_t allocations() {
  auto& buffers = Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  return buffers.made;
}

void free_released() {
  auto& buffers = Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  for (void* handle : buffers.released)
    free_buffer(buffers, handle);
  buffers.released.clear();
}

} // namespace standin

STANDIN_EXPORT int64_t standin_bytes() {
  auto& buffers = standin::Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  return buffers.bytes;
}

// The most bytes that there were at a time since the last call.
STANDIN_EXPORT int64_t standin_most_bytes() {
  auto& buffers = standin::Buffers::instance();
  const std::lock_guard lock(buffers.mutex);
  return std::exchange(buffers.most, buffers.bytes);
}

STANDIN_EXPORT int64_t standin_allocations() { return standin::allocations(); }
