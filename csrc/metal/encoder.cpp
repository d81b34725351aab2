#include "encoder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace q4metal::mps {
namespace {

using plan::Segment;
using plan::Step;
using plan::StepKind;

static_assert(kBlockPositions == plan::kBlockPositions);

constexpr int64_t kAlignment = 256; // of each region in the workspace

Format format_of(const Segment& segment) {
  return std::visit([](const auto& m) { return mps::format_of(m); }, segment.matrix);
}

Kernel kernel_of(const Step& step, const plan::Shape& shape, int rows) {
  const auto format = [&](int i) { return format_of(step.segments[i]); };
  switch (step.kind) {
  case StepKind::embed:
    return embed_kernel(format(0));
  case StepKind::norm_qkv:
    return qkv_kernel(format(0), format(1), format(2), shape.kv_dtype, rows);
  case StepKind::attention:
    return attention_kernel(shape.kv_dtype, shape.head_dim);
  case StepKind::output:
  case StepKind::down:
    return residual_kernel(format(0), rows);
  case StepKind::norm_gate_up:
    return gate_up_kernel(format(0), format(1), rows);
  case StepKind::norm_head:
    return head_kernel(format(0), rows);
  case StepKind::argmax:
    return argmax_kernel();
  case StepKind::take_hidden:
  case StepKind::give_hidden:
    return copy_kernel();
  }
  return {};
}

// The argument struct, behind the buffers.
template <typename Args> void set_args(unsigned index, const Args& args, CommandSink& sink) {
  sink.bytes(index, &args, sizeof args);
}

} // namespace

Encoder::Encoder(plan::Plan plan, DeviceMemory memory, int64_t context, Compile compile)
    : plan_(std::move(plan)), memory_(std::move(memory)), context_(context),
      compile_(std::move(compile)) {
  const auto reserve = [&](int64_t bytes) {
    const int64_t offset = workspace_bytes_;
    workspace_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  };
  for (const auto& buffer : plan_.buffers)
    offsets_.push_back(reserve(buffer.bytes_per_row * plan::kMaxRows));
  if (needs_split(context_))
    chunks_offset_ = reserve(plan::kMaxRows * chunks_of(context_) * plan_.shape.heads *
                             (plan_.shape.head_dim + 2) * int64_t(sizeof(float)));
}

int64_t Encoder::offset_of(int buffer) const {
  return plan_.buffers.at(buffer).external ? -1 : offsets_[buffer];
}

std::string Encoder::kernel_names(size_t step, int rows, bool other_way) const {
  const auto& shape = plan_.shape;
  const Step& named = plan_.steps.at(step);
  if (!other_way)
    return kernel_of(named, shape, rows).name;
  if (named.kind == StepKind::argmax)
    return sample_kernel().name;
  if (named.kind != StepKind::attention || !needs_split(context_))
    return "";
  const int shared = shared_heads(shape.heads, shape.kv_heads);
  return attention_split_kernel(shape.kv_dtype, shape.head_dim, shared).name + " and " +
         attention_combine_kernel(shape.head_dim).name;
}

void Encoder::prepare(const Pass& pass) {
  const auto& shape = plan_.shape;
  if (pipelines_[pass.rows].empty()) {
    std::vector<Kernel> kernels;
    for (const Step& step : plan_.steps)
      kernels.push_back(kernel_of(step, shape, pass.rows));
    pipelines_[pass.rows] = compile_(kernels);
  }
  if (split_ == nullptr && needs_split(context_)) {
    const int shared = shared_heads(shape.heads, shape.kv_heads);
    const auto states = compile_({attention_split_kernel(shape.kv_dtype, shape.head_dim, shared),
                                  attention_combine_kernel(shape.head_dim)});
    split_ = states[0];
    combine_ = states[1];
  }
  if (sample_ == nullptr && pass.sampling != nullptr)
    sample_ = compile_({sample_kernel()})[0];
}

void Encoder::encode(const Pass& pass, Memory workspace, CommandSink& sink) const {
  for (size_t i = 0; i < plan_.steps.size(); ++i) {
    if (plan_.steps[i].kind == StepKind::argmax && pass.tokens.buffer == nullptr)
      continue;
    if (plan_.barrier_before[i])
      sink.barrier();
    encode_step(i, pass, workspace, sink);
  }
}

void Encoder::encode_step(size_t index, const Pass& pass, Memory workspace,
                          CommandSink& sink) const {
  const Step& step = plan_.steps[index];
  const auto& shape = plan_.shape;
  const auto read = [&](int i) { return memory_of(step.reads[i], pass, workspace); };
  const auto written = [&](int i) { return memory_of(step.writes[i], pass, workspace); };
  const auto buffers = [&](unsigned first, std::initializer_list<Memory> list) {
    for (const Memory& memory : list)
      sink.buffer(first++, memory);
  };
  sink.pipeline(pipelines_[pass.rows][index]);
  switch (step.kind) {
  case StepKind::embed:
    bind(0, step.segments[0], sink);
    buffers(4, {read(0), written(0)});
    set_args(6, EmbedArgs{uint32_t(shape.hidden_size), uint32_t(shape.vocab_size)}, sink);
    return sink.dispatch(embed_launch(pass.rows, shape.hidden_size));
  case StepKind::norm_qkv:
    return encode_qkv(step, pass, workspace, sink);
  case StepKind::attention:
    return encode_attention(step, pass, workspace, sink);
  case StepKind::output:
  case StepKind::down:
    bind(0, step.segments[0], sink);
    buffers(4, {read(0), written(0)});
    set_args(6, matrix_args(step), sink);
    return sink.dispatch(residual_launch(shape.hidden_size));
  case StepKind::norm_gate_up:
    bind(0, step.segments[0], sink);
    bind(4, step.segments[1], sink);
    buffers(8, {memory_.at(step.norm), read(0), written(0)});
    set_args(11, matrix_args(step), sink);
    return sink.dispatch(gate_up_launch(shape.intermediate_size));
  case StepKind::norm_head:
    bind(0, step.segments[0], sink);
    buffers(4, {memory_.at(step.norm), read(0), written(0)});
    set_args(7, matrix_args(step), sink);
    return sink.dispatch(head_launch(shape.vocab_size));
  case StepKind::argmax:
    return encode_token(step, pass, workspace, sink);
  case StepKind::take_hidden:
  case StepKind::give_hidden:
    buffers(0, {read(0), written(0)});
    set_args(2, CopyArgs{uint32_t(pass.rows * shape.hidden_size)}, sink);
    return sink.dispatch(copy_launch(pass.rows * shape.hidden_size));
  }
}

void Encoder::encode_qkv(const Step& step, const Pass& pass, Memory workspace,
                         CommandSink& sink) const {
  const auto& shape = plan_.shape;
  for (unsigned i = 0; i < 3; ++i)
    bind(4 * i, step.segments[i], sink);
  sink.buffer(12, memory_.at(step.norm));
  sink.buffer(13, memory_of(step.reads[0], pass, workspace));
  sink.buffer(14, memory_of(step.writes[0], pass, workspace));
  sink.buffer(15, pass.rope);
  sink.bytes(16, pass.positions, pass.rows * sizeof(int64_t));
  bind_cache(17, 18, true, pass, sink);
  set_args(19, QkvArgs{cache_args(step, pass), matrix_args(step), uint32_t(shape.heads)}, sink);
  sink.dispatch(qkv_launch(shape.heads, shape.kv_heads, shape.head_dim));
}

void Encoder::encode_attention(const Step& step, const Pass& pass, Memory workspace,
                               CommandSink& sink) const {
  const auto& shape = plan_.shape;
  const int64_t longest = *std::max_element(pass.positions, pass.positions + pass.rows) + 1;
  if (!needs_split(longest)) {
    const AttentionArgs args{cache_args(step, pass), uint32_t(shape.heads), 0,
                             shape.attention_scale};
    sink.buffer(0, memory_of(step.reads[0], pass, workspace));
    sink.bytes(1, pass.positions, pass.rows * sizeof(int64_t));
    bind_cache(2, 3, false, pass, sink);
    sink.buffer(4, memory_of(step.writes[0], pass, workspace));
    set_args(5, args, sink);
    sink.dispatch(attention_launch(pass.rows, shape.heads));
  }
  if (needs_split(longest) || (plan_.isolated && split_ != nullptr))
    encode_split_attention(step, pass, longest, workspace, sink);
}

void Encoder::encode_split_attention(const Step& step, const Pass& pass, int64_t longest,
                                     Memory workspace, CommandSink& sink) const {
  const auto& shape = plan_.shape;
  const Memory chunks = workspace.at(chunks_offset_);
  const AttentionArgs args{cache_args(step, pass), uint32_t(shape.heads),
                           uint32_t(chunks_of(longest)), shape.attention_scale};
  sink.pipeline(split_);
  sink.buffer(0, memory_of(step.reads[0], pass, workspace));
  sink.bytes(1, pass.positions, pass.rows * sizeof(int64_t));
  bind_cache(2, 3, false, pass, sink);
  sink.buffer(4, chunks);
  set_args(5, args, sink);
  sink.dispatch(attention_split_launch(pass.rows, shape.heads, shape.kv_heads, longest));

  sink.barrier();
  sink.pipeline(combine_);
  sink.buffer(0, chunks);
  sink.bytes(1, pass.positions, pass.rows * sizeof(int64_t));
  sink.buffer(2, memory_of(step.writes.back(), pass, workspace));
  set_args(3, args, sink);
  sink.dispatch(attention_combine_launch(pass.rows, shape.heads));
}

void Encoder::encode_token(const Step& step, const Pass& pass, Memory workspace,
                           CommandSink& sink) const {
  if (pass.sampling == nullptr || plan_.isolated) {
    sink.buffer(0, memory_of(step.reads[0], pass, workspace));
    sink.buffer(1, memory_of(step.writes[0], pass, workspace));
    set_args(2, ArgmaxArgs{uint32_t(plan_.shape.vocab_size)}, sink);
    sink.dispatch(argmax_launch(pass.rows));
  }
  if (pass.sampling != nullptr)
    encode_sample(step, pass, workspace, sink);
}

void Encoder::encode_sample(const Step& step, const Pass& pass, Memory workspace,
                            CommandSink& sink) const {
  sink.pipeline(sample_);
  sink.buffer(0, memory_of(step.reads[0], pass, workspace));
  sink.bytes(1, pass.sampling, pass.rows * sizeof(Sampling));
  sink.bytes(2, pass.positions, pass.rows * sizeof(int64_t));
  sink.buffer(3, memory_of(step.writes.back(), pass, workspace));
  set_args(4, ArgmaxArgs{uint32_t(plan_.shape.vocab_size)}, sink);
  sink.dispatch(sample_launch(pass.rows));
}

// Four buffers: weight, scales, biases, bias. Where there is none the weight takes its place, for
// every buffer that a kernel names must be bound.
void Encoder::bind(unsigned first, const Segment& segment, CommandSink& sink) const {
  const void *scales = nullptr, *biases = nullptr, *weight = nullptr;
  if (const auto* packed = std::get_if<PackedMatrix>(&segment.matrix)) {
    weight = packed->weight;
    scales = packed->scales;
    biases = packed->biases;
  } else {
    weight = std::get<DenseMatrix>(segment.matrix).weight;
  }
  for (const void* address : {weight, scales, biases, static_cast<const void*>(segment.bias)})
    sink.buffer(first++, memory_.at(address == nullptr ? weight : address));
}

void Encoder::bind_cache(unsigned tables, unsigned slabs, bool written, const Pass& pass,
                         CommandSink& sink) const {
  sink.buffer(tables, pass.block_tables);
  sink.bytes(slabs, pass.slabs.data(), pass.slabs.size() * sizeof(Slab));
  for (const Memory& slab : pass.slab_memory)
    sink.resident(slab, written);
}

CacheArgs Encoder::cache_args(const Step& step, const Pass& pass) const {
  const auto& shape = plan_.shape;
  return {uint32_t(step.layer),     uint32_t(shape.layers), uint32_t(shape.kv_heads),
          uint32_t(shape.head_dim), pass.table_stride,      pass.slab_blocks};
}

MatrixArgs Encoder::matrix_args(const Step& step) const {
  uint32_t has_bias = 0;
  for (size_t i = 0; i < step.segments.size(); ++i)
    has_bias |= uint32_t(step.segments[i].bias != nullptr) << i;
  const auto& first = step.segments[0];
  return {uint32_t(first.in_features()), uint32_t(first.out_features()), has_bias,
          plan_.shape.norm_eps};
}

Memory Encoder::memory_of(int buffer, const Pass& pass, Memory workspace) const {
  const auto& name = plan_.buffers[buffer].name;
  if (!plan_.buffers[buffer].external)
    return workspace.at(offsets_[buffer]);
  if (name == "ids" || name == "input")
    return pass.input;
  if (name == "logits" || name == "output")
    return pass.output;
  if (name == "tokens")
    return pass.tokens;
  throw std::logic_error("no pass has a buffer '" + name + "' to bind");
}

} // namespace q4metal::mps
