// torch.ops.q4metal.decode_step on MPS: checks the tensors and encodes the plan behind a handle.
//
// `positions` is a CPU tensor: the host must know how long the rows are, and to ask the GPU would
// be to wait for it. `sampling` is one too, int32 [R, 6] with the bits of a struct Sampling
// (plan_launch.h) a row. What is in the other tensors stays unread here.
#include <ATen/core/Tensor.h>
#include <ATen/native/mps/MetalShaderLibrary.h>
#include <torch/library.h>

#include "decode_plan.h"
#include "sink.h"
#include "torch_dtype.h"

namespace q4metal::mps {
namespace {

// Slabs whose addresses fit into the 4096 bytes of a setBytes.
constexpr size_t kMaxSlabs = 4096 / sizeof(Slab);
constexpr int64_t kSamplingWords = sizeof(Sampling) / sizeof(int32_t);

void check(const at::Tensor& t, const char* name, c10::DeviceType device, at::ScalarType dtype,
           at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().type() == device && t.scalar_type() == dtype && t.sizes() == shape &&
                        t.is_contiguous(),
                    name, " is ", t.scalar_type(), " ", t.sizes(), " on ", t.device(),
                    "; it must be contiguous ", dtype, " ", shape, " on ",
                    c10::DeviceTypeName(device, true));
}

Memory memory_of(const at::Tensor& t) {
  return {t.storage().data(), uint64_t(t.storage_offset() * t.element_size())};
}

int64_t checked_rows(const plan::Plan& plan, const at::Tensor& input) {
  const int64_t rows = input.dim() > 0 ? input.size(0) : 0;
  TORCH_CHECK_VALUE(rows >= 1 && rows <= plan::kMaxRows, "input has shape ", input.sizes(),
                    "; a decode plan on MPS takes 1 to ", plan::kMaxRows, " rows");
  if (plan.embeds())
    check(input, "input", at::kMPS, at::kLong, {rows});
  else
    check(input, "input", at::kMPS, at::kFloat, {rows, plan.shape.hidden_size});
  return rows;
}

void check_positions(const at::Tensor& positions, int64_t rows, int64_t context,
                     const at::Tensor& tables) {
  check(positions, "positions", at::kCPU, at::kLong, {rows});
  TORCH_CHECK_VALUE(tables.dim() == 2, "block_tables has shape ", tables.sizes(),
                    "; it must be [R, blocks]");
  check(tables, "block_tables", at::kMPS, at::kInt, {rows, tables.size(1)});
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t at = positions.const_data_ptr<int64_t>()[m];
    TORCH_CHECK_VALUE(at >= 0 && at < context, "positions holds ", at,
                      "; the plan was built for a context of ", context);
    const int64_t used = at / kBlockPositions + 1;
    TORCH_CHECK_VALUE(used <= tables.size(1), "position ", at, " needs ", used,
                      " blocks; block_tables has ", tables.size(1), " a row");
  }
}

void take_slabs(const plan::Shape& shape, at::TensorList kv, Pass& pass) {
  TORCH_CHECK_VALUE(!kv.empty() && kv.size() <= kMaxSlabs, "kv holds ", kv.size(),
                    " slabs of a KV pool; it must hold 1 to ", kMaxSlabs);
  const int64_t slab_blocks = kv[0].dim() == 6 ? kv[0].size(2) : 0;
  for (const auto& slab : kv) {
    TORCH_CHECK_VALUE(
        slab.dim() == 6 && (pass.slabs.empty() || int64_t(pass.slabs.back().blocks) == slab_blocks),
        "kv holds a tensor of shape ", slab.sizes(),
        "; slabs are [2, layers, blocks, kv_heads, 32, head_dim], all but the last of one size");
    check(slab, "kv", at::kMPS, torch_dtype(shape.kv_dtype),
          {2, shape.layers, slab.size(2), shape.kv_heads, kBlockPositions, shape.head_dim});
    const void* address = at::native::mps::get_tensor_gpu_address(slab);
    pass.slabs.push_back({reinterpret_cast<uint64_t>(address), uint64_t(slab.size(2))});
    pass.slab_memory.push_back(memory_of(slab));
  }
  pass.slab_blocks = uint32_t(slab_blocks);
}

// Logits, residual rows or token ids: what `out` is decides.
void take_output(DecodePlan& plan, const at::Tensor& out, int64_t rows, Pass& pass) {
  const auto& shape = plan.plan().shape;
  if (!plan.plan().has_head()) {
    check(out, "out", at::kMPS, at::kFloat, {rows, shape.hidden_size});
    pass.output = memory_of(out);
  } else if (out.scalar_type() == at::kLong) {
    check(out, "out", at::kMPS, at::kLong, {rows});
    pass.output = memory_of(plan.logits(rows));
    pass.tokens = memory_of(out);
  } else {
    check(out, "out", at::kMPS, at::kFloat, {rows, shape.vocab_size});
    pass.output = memory_of(out);
  }
}

void decode_step(int64_t handle, const at::Tensor& input, const at::Tensor& positions,
                 const at::Tensor& rope, const at::Tensor& block_tables,
                 const std::optional<at::Tensor>& sampling, at::TensorList kv, at::Tensor& out) {
  const auto plan = find_plan(handle);
  TORCH_CHECK_VALUE(plan != nullptr, "decode plan ", handle,
                    " does not exist on MPS, or its model was freed");
  if (const auto failure = take_failure())
    TORCH_CHECK(false, "the GPU could not finish an earlier step: ", *failure);
  const auto& shape = plan->plan().shape;
  const int64_t rows = checked_rows(plan->plan(), input);
  check_positions(positions, rows, plan->context(), block_tables);
  check(rope, "rope", at::kMPS, at::kFloat, {rows, 2, shape.head_dim});
  Pass pass{};
  pass.rows = int(rows);
  pass.positions = positions.const_data_ptr<int64_t>();
  pass.input = memory_of(input);
  pass.rope = memory_of(rope);
  pass.block_tables = memory_of(block_tables);
  pass.table_stride = uint32_t(block_tables.size(1));
  take_slabs(shape, kv, pass);
  take_output(*plan, out, rows, pass);
  if (sampling.has_value() && sampling->defined()) {
    check(*sampling, "sampling", at::kCPU, at::kInt, {rows, kSamplingWords});
    TORCH_CHECK_VALUE(pass.tokens.buffer != nullptr, "sampling draws token ids, out is ",
                      out.scalar_type(), "; it must be int64 [R], of a plan with a head");
    pass.sampling = static_cast<const Sampling*>(sampling->const_data_ptr());
  }
  plan->run(pass);
}

// The memory itself, not a copy.
at::Tensor metal_workspace(int64_t handle) {
  const auto plan = find_plan(handle);
  TORCH_CHECK_VALUE(plan != nullptr, "decode plan ", handle,
                    " does not exist on MPS, or its model was freed");
  return plan->workspace();
}

} // namespace
} // namespace q4metal::mps

TORCH_LIBRARY_IMPL(q4metal, MPS, m) { m.impl("decode_step", &q4metal::mps::decode_step); }

TORCH_LIBRARY_FRAGMENT(q4metal, m) {
  m.def("metal_workspace(int plan) -> Tensor", &q4metal::mps::metal_workspace);
}
