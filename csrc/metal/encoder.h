// One pass of a decode plan as commands: which kernel, which buffers, which grid, where barriers.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "../plan/plan.h"
#include "command_sink.h"
#include "device_memory.h"
#include "plan_launch.h"

namespace q4metal::mps {

// What a pass reads and writes besides the plan's own memory.
struct Pass {
  int rows; // 1 to plan::kMaxRows
  // Of each row, known to the host: they decide how attention is split.
  const int64_t* positions;
  Memory input;        // ids int64 [rows], or residual rows float32 [rows, H]
  Memory rope;         // float32 [rows, 2, head_dim], cos and sin
  Memory block_tables; // int32 [rows, table_stride]
  uint32_t table_stride;
  std::vector<Slab> slabs; // addresses on the device
  std::vector<Memory> slab_memory;
  uint32_t slab_blocks;
  Memory output;            // logits float32 [rows, vocabulary], or residual rows
  Memory tokens;            // int64 [rows]; without a buffer logits only
  const Sampling* sampling; // of each row; null: the likeliest token
};

class Encoder {
public:
  // Compiles kernels, as `pipeline states` in the order given.
  using Compile = std::function<std::vector<const void*>(const std::vector<Kernel>&)>;

  // `context`: the most positions that a row may have.
  Encoder(plan::Plan plan, DeviceMemory memory, int64_t context, Compile compile);

  const plan::Plan& plan() const { return plan_; }
  int64_t context() const { return context_; }
  // Of the memory between steps, for up to plan::kMaxRows rows.
  int64_t workspace_bytes() const { return workspace_bytes_; }
  // Of one of the plan's buffers in the workspace, in bytes; -1: it is external.
  int64_t offset_of(int buffer) const;
  // Names of the kernels that a step runs for so many rows. `other_way`: long contexts in
  // attention, drawing in the choice of a token; none where the step has no other way.
  std::string kernel_names(size_t step, int rows, bool other_way) const;
  // Compiles what the pass needs and was not compiled yet.
  void prepare(const Pass& pass);
  // Commands of one pass that was prepared. Allocates nothing.
  void encode(const Pass& pass, Memory workspace, CommandSink& sink) const;

private:
  void encode_step(size_t index, const Pass& pass, Memory workspace, CommandSink& sink) const;
  void encode_qkv(const plan::Step& step, const Pass& pass, Memory workspace,
                  CommandSink& sink) const;
  // An isolated plan's steps go both ways.
  void encode_attention(const plan::Step& step, const Pass& pass, Memory workspace,
                        CommandSink& sink) const;
  void encode_split_attention(const plan::Step& step, const Pass& pass, int64_t longest,
                              Memory workspace, CommandSink& sink) const;
  void encode_token(const plan::Step& step, const Pass& pass, Memory workspace,
                    CommandSink& sink) const;
  void encode_sample(const plan::Step& step, const Pass& pass, Memory workspace,
                     CommandSink& sink) const;
  void bind(unsigned first, const plan::Segment& segment, CommandSink& sink) const;
  void bind_cache(unsigned tables, unsigned slabs, bool written, const Pass& pass,
                  CommandSink& sink) const;
  CacheArgs cache_args(const plan::Step& step, const Pass& pass) const;
  MatrixArgs matrix_args(const plan::Step& step) const;
  Memory memory_of(int buffer, const Pass& pass, Memory workspace) const;

  plan::Plan plan_;
  DeviceMemory memory_;
  int64_t context_;
  Compile compile_;
  int64_t workspace_bytes_ = 0;
  std::vector<int64_t> offsets_; // of the plan's buffers in the workspace
  int64_t chunks_offset_ = 0;    // of attention's partial results
  std::array<std::vector<const void*>, plan::kMaxRows + 1> pipelines_; // by rows, then by step
  const void* split_ = nullptr;   // attention beyond kSingleChunks
  const void* combine_ = nullptr; // and what follows it
  const void* sample_ = nullptr;  // in place of argmax
};

} // namespace q4metal::mps
