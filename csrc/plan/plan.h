// The decode plan: what one token does to a model, as a list of steps. It is built once and
// executed once a token, by cpu/executor_pass.cpp here. A step names the buffers that it reads and
// writes; from these declarations alone `place_barriers` decides where all threads (or a GPU) must
// wait.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "../matrix.h"
#include "../precision.h"

namespace q4metal::plan {

constexpr int kMaxRows = 8;         // sequences, or draft tokens, that one pass decodes together
constexpr int kMaxPromptRows = 512; // of one text, that one pass reads
constexpr int kBlockPositions = 32; // of a KV block

// One matrix of a step: packed or left dense, with the layer's own bias [N] in float32, or none.
struct Segment {
  std::variant<PackedMatrix, DenseMatrix> matrix;
  const float* bias = nullptr;

  int64_t out_features() const;
  int64_t in_features() const;
  int64_t bytes() const; // weights that a token reads
};

enum class StepKind {
  embed,        // ids -> hidden
  take_hidden,  // in place of embed where another stage embeds: its residual rows -> hidden
  norm_qkv,     // hidden -> RMSNorm -> q, k, v + biases -> RoPE -> q, KV cache
  attention,    // q, KV cache -> partial results, one a split of the context
  output,       // partial results combined -> output projection -> added to hidden
  norm_gate_up, // hidden -> RMSNorm -> gate, up -> silu(gate) * up
  down,         // -> down projection -> added to hidden
  norm_head,    // hidden -> RMSNorm -> logits
  argmax,       // logits -> token ids
  give_hidden,  // in place of both where another stage has the head: hidden -> residual rows
};

const char* name_of(StepKind kind);

// A region of memory that steps share. External ones belong to the caller of each pass.
struct Buffer {
  std::string name;
  int64_t bytes_per_row; // 0 for external ones
  bool external = false;
};

struct Step {
  StepKind kind;
  int layer = -1;                 // -1: not part of a layer
  std::vector<Segment> segments;  // in the order of the kind's comment
  const float* norm = nullptr;    // RMSNorm weight [K], where the kind has one
  std::vector<int> reads, writes; // indices of Plan::buffers
};

// The shape of a model, as far as its steps need it.
struct Shape {
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t vocab_size;
  int64_t layers;
  float norm_eps;
  float attention_scale;
  DType kv_dtype;
  Precision precision;
};

// Two steps of which the later must wait for the earlier, without a barrier between them.
struct Hazard {
  int earlier, later;
  int buffer;
  const char* kind; // "read after write", "write after read", "write after write"
};

struct Plan {
  Shape shape;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<bool> barrier_before; // per step
  bool isolated = false;            // its steps share no memory: see `isolate`

  bool embeds() const;            // its input is token ids, not residual rows
  bool has_packed_layers() const; // nothing was left dense but the table, the head and the norms
  bool has_head() const;          // its output is logits, not residual rows
  int64_t weight_bytes() const;   // that a token reads, one row of the embedding included
  std::string describe() const;   // a line a step: shapes, bytes, buffers, barriers
};

// Where barriers belong: before a step that has a hazard with a step since the last barrier.
std::vector<bool> place_barriers(const std::vector<Step>& steps);

// Every hazard that these barriers leave open.
std::vector<Hazard> find_hazards(const std::vector<Step>& steps, const std::vector<bool>& barriers);

// What a model's layer is made of.
struct Layer {
  const float* input_norm;
  Segment q, k, v, output;
  const float* post_norm;
  Segment gate, up, down;
};

// Final norm and head of a model.
struct Head {
  const float* norm;
  Segment matrix;
};

// Steps, buffers and barriers of a whole model, or of a stage that has only some of its layers: the
// first stage has the embedding, the last one the head; others take and give the residual stream.
// Throws std::invalid_argument, naming the matrix, where shapes do not fit.
Plan build(const Shape& shape, const std::optional<Segment>& embedding,
           const std::vector<Layer>& layers, const std::optional<Head>& head);

// The plan's steps, each on buffers of its own, so that a wrong one spoils no other: for comparing
// single steps with known answers. Of steps of one kind on matrices of the same formats only the
// first is there. Ids and residual rows from outside are the same for all; the rest is no longer
// external. A step that uses the KV cache has a layer of its own in it, of shape.layers. Attention
// and the choice of a token, which can be computed in two ways, write a second buffer for the other
// one.
Plan isolate(const Plan& plan);

// Only the steps of these kinds, to be timed: all others' results are what happens to be in memory.
Plan only(const Plan& plan, const std::vector<std::string>& kinds);

} // namespace q4metal::plan
