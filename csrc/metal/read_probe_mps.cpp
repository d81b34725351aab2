// torch.ops.q4metal.metal_read_probe: reads a tensor on MPS as fast as its memory allows.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "pipelines.h"
#include "plan_launch.h"
#include "sink.h"

namespace q4metal::mps {
namespace {

constexpr int64_t kSums = int64_t(kProbeGroups) * kProbeThreads / kSimdWidth;

// One pass over `data`, queued and not waited for. Whole 16 bytes are read, from a multiple of 16
// on; `sums` int32 [kSums] are those of its 32-bit words.
void metal_read_probe(const at::Tensor& data, at::Tensor& sums) {
  TORCH_CHECK_VALUE(data.is_mps() && data.is_contiguous() && data.nbytes() / 16 < uint64_t(1) << 32,
                    "data is ", data.sizes(), " on ", data.device(),
                    "; it must be contiguous on MPS, of less than 64 GiB");
  TORCH_CHECK_VALUE(sums.is_mps() && sums.scalar_type() == at::kInt && sums.is_contiguous() &&
                        sums.numel() == kSums,
                    "sums is ", sums.scalar_type(), " ", sums.sizes(), " on ", sums.device(),
                    "; it must be int32 [", kSums, "] on MPS");
  const ProbeArgs args{uint32_t(data.nbytes() / 16)};
  const void* kernel = pipeline_states({read_probe_kernel()})[0];
  const Memory from{data.storage().data(), uint64_t(data.storage_offset()) * data.element_size()};
  const Memory to{sums.storage().data(), uint64_t(sums.storage_offset()) * sums.element_size()};
  submit([&](CommandSink& sink) {
    sink.pipeline(kernel);
    sink.buffer(0, from);
    sink.buffer(1, to);
    sink.bytes(2, &args, sizeof args);
    sink.dispatch(read_probe_launch());
  });
}

} // namespace
} // namespace q4metal::mps

TORCH_LIBRARY_FRAGMENT(q4metal, m) {
  m.def("metal_read_probe(Tensor data, Tensor(a!) sums) -> ()");
}

TORCH_LIBRARY_IMPL(q4metal, MPS, m) { m.impl("metal_read_probe", &q4metal::mps::metal_read_probe); }
