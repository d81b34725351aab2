// torch.ops.q4metal.decode_step on the CPU: checks the tensors and runs the plan behind a handle.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>

#include "executor_registry.h"

namespace q4metal::cpu {
namespace {

at::ScalarType torch_dtype(DType dtype) {
  return dtype == DType::f16 ? at::kHalf : dtype == DType::bf16 ? at::kBFloat16 : at::kFloat;
}

void check_contiguous(const at::Tensor& t, const char* name, at::ScalarType dtype,
                      at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.sizes() == shape && t.is_contiguous(), name,
                    " is ", t.scalar_type(), " ", t.sizes(), "; it must be contiguous ", dtype, " ",
                    shape);
}

// The largest number of blocks that a row's positions need must be in its table, and every entry
// that is used must lie in a slab.
void check_tables(const at::Tensor& tables, const int64_t* positions, int64_t blocks) {
  const auto* table = tables.const_data_ptr<int32_t>();
  for (int64_t m = 0; m < tables.size(0); ++m) {
    const int64_t used = positions[m] / plan::kBlockPositions + 1;
    TORCH_CHECK_VALUE(used <= tables.size(1), "position ", positions[m], " needs ", used,
                      " blocks; block_tables has ", tables.size(1), " a row");
    for (int64_t i = 0; i < used; ++i)
      TORCH_CHECK_INDEX(
          table[m * tables.size(1) + i] >= 0 && table[m * tables.size(1) + i] < blocks,
          "block_tables holds ", table[m * tables.size(1) + i], "; kv has ", blocks, " blocks");
  }
}

// A chunk of a prompt takes seconds: Ctrl-C is to end it. Does nothing on other threads than
// Python's main one.
void raise_signals() {
  pybind11::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() != 0)
    throw pybind11::error_already_set();
}

// More rows than a matvec takes are a part of one prompt.
void check_prompt(const int64_t* positions, int64_t rows, const at::Tensor& tables) {
  const auto* table = tables.const_data_ptr<int32_t>();
  for (int64_t m = 1; m < rows; ++m)
    TORCH_CHECK_VALUE(positions[m] == positions[0] + m &&
                          std::equal(table, table + positions[m] / plan::kBlockPositions + 1,
                                     table + m * tables.size(1)),
                      "row ", m, " of ", rows, " does not continue the text of row 0; more than ",
                      plan::kMaxRows, " rows must be consecutive positions of one text");
}

void decode_step(int64_t handle, const at::Tensor& input, const at::Tensor& positions,
                 const at::Tensor& rope, const at::Tensor& block_tables,
                 const std::optional<at::Tensor>& sampling, at::TensorList kv, at::Tensor& out) {
  const auto executor = find_executor(handle);
  const auto check_exists = [&](bool exists) {
    TORCH_CHECK_VALUE(exists, "decode plan ", handle, " does not exist, or its model was freed");
  };
  check_exists(executor != nullptr);
  TORCH_CHECK_VALUE(!sampling.has_value() || !sampling->defined(),
                    "sampling on the device is not built for the CPU; pass None");
  const auto& shape = executor->plan().shape;
  const bool embeds = executor->plan().embeds(), has_head = executor->plan().has_head();
  TORCH_CHECK_VALUE(input.dim() == (embeds ? 1 : 2) && input.size(0) >= 1 &&
                        input.size(0) <= plan::kMaxPromptRows,
                    "input has shape ", input.sizes(), "; this decode plan takes 1 to ",
                    plan::kMaxPromptRows, embeds ? " token ids" : " residual rows");
  const int64_t rows = input.size(0);
  if (embeds)
    check_contiguous(input, "input", at::kLong, {rows});
  else
    check_contiguous(input, "input", at::kFloat, {rows, shape.hidden_size});
  check_contiguous(positions, "positions", at::kLong, {rows});
  check_contiguous(rope, "rope", at::kFloat, {rows, 2, shape.head_dim});
  TORCH_CHECK_VALUE(block_tables.dim() == 2, "block_tables has shape ", block_tables.sizes(),
                    "; it must be [R, blocks]");
  check_contiguous(block_tables, "block_tables", at::kInt, {rows, block_tables.size(1)});
  const bool wants_tokens = has_head && out.scalar_type() == at::kLong;
  const bool is_prompt = rows > plan::kMaxRows;
  const int64_t out_rows = is_prompt && out.dim() > 0 ? std::min(out.size(0), rows) : rows;
  if (wants_tokens)
    check_contiguous(out, "out", at::kLong, {out_rows});
  else
    check_contiguous(out, "out", at::kFloat,
                     {out_rows, has_head ? shape.vocab_size : shape.hidden_size});

  const auto* ids = embeds ? input.const_data_ptr<int64_t>() : nullptr;
  const auto* at = positions.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < rows; ++m) {
    if (embeds)
      TORCH_CHECK_INDEX(ids[m] >= 0 && ids[m] < shape.vocab_size, "input holds ", ids[m],
                        "; the vocabulary has ", shape.vocab_size, " tokens");
    TORCH_CHECK_VALUE(at[m] >= 0 && at[m] < executor->context(), "positions holds ", at[m],
                      "; the plan was built for a context of ", executor->context());
  }
  TORCH_CHECK_VALUE(!kv.empty(), "kv is empty; it must hold the slabs of a KV pool");
  std::vector<KvSlab> slabs;
  int64_t blocks = 0;
  const int64_t slab_blocks = kv[0].dim() == 6 ? kv[0].size(2) : 0;
  for (const auto& slab : kv) {
    TORCH_CHECK_VALUE(
        slab.dim() == 6 && (slabs.empty() || slabs.back().blocks == slab_blocks),
        "kv holds a tensor of shape ", slab.sizes(),
        "; slabs are [2, layers, blocks, kv_heads, 32, head_dim], all but the last of one size");
    check_contiguous(
        slab, "kv", torch_dtype(shape.kv_dtype),
        {2, shape.layers, slab.size(2), shape.kv_heads, plan::kBlockPositions, shape.head_dim});
    slabs.push_back({static_cast<std::byte*>(slab.mutable_data_ptr()), slab.size(2)});
    blocks += slab.size(2);
  }
  check_tables(block_tables, at, blocks);
  if (is_prompt)
    check_prompt(at, rows, block_tables);

  at::Tensor rows_out = out;
  if (wants_tokens) // of few rows, the executor has room
    rows_out = is_prompt ? at::empty({out_rows, shape.vocab_size}, rope.options()) : at::Tensor();
  const bool exists = executor->run(
      {rows, ids, embeds ? nullptr : input.const_data_ptr<float>(), at,
       rope.const_data_ptr<float>(), block_tables.const_data_ptr<int32_t>(), block_tables.size(1),
       slabs.data(), slab_blocks, rows_out.defined() ? rows_out.mutable_data_ptr<float>() : nullptr,
       out_rows, wants_tokens ? out.mutable_data_ptr<int64_t>() : nullptr},
      at::get_num_threads(), raise_signals);
  check_exists(exists);
}

} // namespace
} // namespace q4metal::cpu

TORCH_LIBRARY_IMPL(q4metal, CPU, m) { m.impl("decode_step", &q4metal::cpu::decode_step); }
