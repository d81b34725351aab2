#include "plan.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <stdexcept>

namespace q4metal::plan {
namespace {

bool overlap(const std::vector<int>& a, const std::vector<int>& b, int* shared) {
  for (const int x : a)
    if (std::find(b.begin(), b.end(), x) != b.end()) {
      *shared = x;
      return true;
    }
  return false;
}

// The hazard of two steps that nothing separates, if there is one.
std::optional<Hazard> hazard_of(const std::vector<Step>& steps, int earlier, int later) {
  const Step &a = steps[earlier], &b = steps[later];
  Hazard h{earlier, later, -1, nullptr};
  if (overlap(a.writes, b.reads, &h.buffer))
    h.kind = "read after write";
  else if (overlap(a.writes, b.writes, &h.buffer))
    h.kind = "write after write";
  else if (overlap(a.reads, b.writes, &h.buffer))
    h.kind = "write after read";
  return h.kind == nullptr ? std::nullopt : std::optional(h);
}

void require_shape(const Segment& segment, int64_t out_features, int64_t in_features,
                   const std::string& name) {
  if (segment.out_features() == out_features && segment.in_features() == in_features)
    return;
  throw std::invalid_argument(name + " is [" + std::to_string(segment.out_features()) + ", " +
                              std::to_string(segment.in_features()) + "], the plan needs [" +
                              std::to_string(out_features) + ", " + std::to_string(in_features) +
                              "]");
}

// Whether one kernel computes both.
bool is_same_format(const Segment& a, const Segment& b) {
  const auto* packed = std::get_if<PackedMatrix>(&a.matrix);
  const auto* other = std::get_if<PackedMatrix>(&b.matrix);
  if (packed == nullptr || other == nullptr)
    return packed == other &&
           std::get<DenseMatrix>(a.matrix).dtype == std::get<DenseMatrix>(b.matrix).dtype;
  return packed->bits == other->bits && packed->group_size == other->group_size &&
         packed->scales_dtype == other->scales_dtype;
}

bool is_same_kernel(const Step& a, const Step& b) {
  return a.kind == b.kind && std::equal(a.segments.begin(), a.segments.end(), b.segments.begin(),
                                        b.segments.end(), is_same_format);
}

std::string described(const Segment& segment) {
  const std::string shape = "[" + std::to_string(segment.out_features()) + ", " +
                            std::to_string(segment.in_features()) + "]";
  if (const auto* packed = std::get_if<PackedMatrix>(&segment.matrix))
    return shape + " " + std::to_string(packed->bits) + "b/g" + std::to_string(packed->group_size);
  return shape + " dense";
}

} // namespace

int64_t Segment::out_features() const {
  return std::visit([](const auto& m) { return m.out_features; }, matrix);
}

int64_t Segment::in_features() const {
  return std::visit([](const auto& m) { return m.in_features; }, matrix);
}

int64_t Segment::bytes() const {
  const int64_t own = std::visit([](const auto& m) { return m.bytes(); }, matrix);
  return own + (bias == nullptr ? 0 : out_features() * int64_t(sizeof(float)));
}

const char* name_of(StepKind kind) {
  switch (kind) {
  case StepKind::embed:
    return "embed";
  case StepKind::take_hidden:
    return "take_hidden";
  case StepKind::norm_qkv:
    return "norm_qkv_rope_append";
  case StepKind::attention:
    return "attention";
  case StepKind::output:
    return "output_residual";
  case StepKind::norm_gate_up:
    return "norm_gate_up_swiglu";
  case StepKind::down:
    return "down_residual";
  case StepKind::norm_head:
    return "norm_head";
  case StepKind::argmax:
    return "argmax";
  case StepKind::give_hidden:
    return "give_hidden";
  }
  return "";
}

std::vector<bool> place_barriers(const std::vector<Step>& steps) {
  std::vector<bool> barriers(steps.size(), false);
  int since = 0; // first step after the last barrier
  for (int later = 0; later < int(steps.size()); ++later)
    for (int earlier = since; earlier < later; ++earlier)
      if (hazard_of(steps, earlier, later)) {
        barriers[later] = true;
        since = later;
        break;
      }
  return barriers;
}

std::vector<Hazard> find_hazards(const std::vector<Step>& steps,
                                 const std::vector<bool>& barriers) {
  std::vector<Hazard> found;
  int since = 0;
  for (int later = 0; later < int(steps.size()); ++later) {
    if (barriers[later])
      since = later;
    for (int earlier = since; earlier < later; ++earlier)
      if (const auto hazard = hazard_of(steps, earlier, later))
        found.push_back(*hazard);
  }
  return found;
}

bool Plan::embeds() const { return steps.front().kind == StepKind::embed; }

bool Plan::has_packed_layers() const {
  return std::all_of(steps.begin(), steps.end(), [](const Step& step) {
    return step.layer < 0 || std::all_of(
                                 step.segments.begin(), step.segments.end(),
                                 [](const Segment& segment) {
                                   return std::holds_alternative<PackedMatrix>(segment.matrix);
                                 });
  });
}

bool Plan::has_head() const { return steps.back().kind == StepKind::argmax; }

int64_t Plan::weight_bytes() const {
  int64_t total = 0;
  for (const Step& step : steps)
    for (const Segment& segment : step.segments)
      total +=
          step.kind == StepKind::embed ? segment.bytes() / segment.out_features() : segment.bytes();
  return total;
}

std::string Plan::describe() const {
  std::string text;
  char line[160];
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    std::string matrices;
    int64_t bytes = 0;
    for (const Segment& segment : step.segments) {
      matrices += (matrices.empty() ? "" : " + ") + described(segment);
      bytes += segment.bytes();
    }
    const auto names = [&](const std::vector<int>& ids) {
      std::string list;
      for (const int id : ids)
        list += (list.empty() ? "" : ",") + buffers[id].name;
      return list;
    };
    std::snprintf(line, sizeof line, "%s%4zu %-22s layer %3d %9.3f MB  ",
                  barrier_before[i] ? "---- barrier\n" : "", i, name_of(step.kind), step.layer,
                  bytes / 1e6);
    text +=
        line + matrices + "  reads " + names(step.reads) + " writes " + names(step.writes) + "\n";
  }
  return text;
}

Plan build(const Shape& shape, const std::optional<Segment>& embedding,
           const std::vector<Layer>& layers, const std::optional<Head>& head) {
  Plan plan{shape, {}, {}, {}};
  const int64_t query = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
  const auto buffer = [&](std::string name, int64_t floats_per_row, bool external = false) {
    plan.buffers.push_back({std::move(name), floats_per_row * int64_t(sizeof(float)), external});
    return int(plan.buffers.size()) - 1;
  };
  const int input = buffer(embedding ? "ids" : "input", 0, true), cache = buffer("kv", 0, true);
  const int hidden = buffer("hidden", shape.hidden_size);
  const int queries = buffer("q", query);
  const int partial = buffer("partial", query);
  const int activation = buffer("activation", shape.intermediate_size);

  if (embedding) {
    require_shape(*embedding, shape.vocab_size, shape.hidden_size, "embed_tokens");
    plan.steps.push_back({StepKind::embed, -1, {*embedding}, nullptr, {input}, {hidden}});
  } else {
    plan.steps.push_back({StepKind::take_hidden, -1, {}, nullptr, {input}, {hidden}});
  }
  for (int i = 0; i < int(layers.size()); ++i) {
    const Layer& layer = layers[i];
    const std::string at = "layer " + std::to_string(i) + ": ";
    require_shape(layer.q, query, shape.hidden_size, at + "q_proj");
    require_shape(layer.k, kv, shape.hidden_size, at + "k_proj");
    require_shape(layer.v, kv, shape.hidden_size, at + "v_proj");
    require_shape(layer.output, shape.hidden_size, query, at + "o_proj");
    require_shape(layer.gate, shape.intermediate_size, shape.hidden_size, at + "gate_proj");
    require_shape(layer.up, shape.intermediate_size, shape.hidden_size, at + "up_proj");
    require_shape(layer.down, shape.hidden_size, shape.intermediate_size, at + "down_proj");
    plan.steps.push_back({StepKind::norm_qkv,
                          i,
                          {layer.q, layer.k, layer.v},
                          layer.input_norm,
                          {hidden},
                          {queries, cache}});
    plan.steps.push_back({StepKind::attention, i, {}, nullptr, {queries, cache}, {partial}});
    plan.steps.push_back(
        {StepKind::output, i, {layer.output}, nullptr, {partial, hidden}, {hidden}});
    plan.steps.push_back({StepKind::norm_gate_up,
                          i,
                          {layer.gate, layer.up},
                          layer.post_norm,
                          {hidden},
                          {activation}});
    plan.steps.push_back(
        {StepKind::down, i, {layer.down}, nullptr, {activation, hidden}, {hidden}});
  }
  if (head) {
    require_shape(head->matrix, shape.vocab_size, shape.hidden_size, "lm_head");
    const int logits = buffer("logits", 0, true), tokens = buffer("tokens", 0, true);
    plan.steps.push_back({StepKind::norm_head, -1, {head->matrix}, head->norm, {hidden}, {logits}});
    plan.steps.push_back({StepKind::argmax, -1, {}, nullptr, {logits}, {tokens}});
  } else {
    const int output = buffer("output", 0, true);
    plan.steps.push_back({StepKind::give_hidden, -1, {}, nullptr, {hidden}, {output}});
  }
  plan.barrier_before = place_barriers(plan.steps);
  return plan;
}

Plan isolate(const Plan& plan) {
  const auto& shape = plan.shape;
  Plan own{shape, {}, {}, {}, true};
  own.shape.layers = 0;
  const auto add = [&](Buffer buffer) {
    if (buffer.name == "logits")
      buffer = {buffer.name, shape.vocab_size * int64_t(sizeof(float))};
    else if (buffer.name == "tokens")
      buffer = {buffer.name, sizeof(int64_t)};
    else if (buffer.name == "output")
      buffer = {buffer.name, shape.hidden_size * int64_t(sizeof(float))};
    own.buffers.push_back(std::move(buffer));
    return int(own.buffers.size()) - 1;
  };
  for (Step step : plan.steps) {
    if (std::any_of(own.steps.begin(), own.steps.end(),
                    [&](const Step& other) { return is_same_kernel(step, other); }))
      continue;
    if (step.kind == StepKind::norm_qkv || step.kind == StepKind::attention)
      step.layer = int(own.shape.layers++);
    std::map<int, int> copies;
    for (auto* list : {&step.reads, &step.writes})
      for (int& id : *list) {
        if (copies.count(id) == 0)
          copies[id] = add(plan.buffers[id]);
        id = copies[id];
      }
    if (step.kind == StepKind::attention || step.kind == StepKind::argmax)
      step.writes.push_back(add(own.buffers[step.writes[0]]));
    own.steps.push_back(std::move(step));
  }
  own.barrier_before = place_barriers(own.steps);
  return own;
}

Plan only(const Plan& plan, const std::vector<std::string>& kinds) {
  Plan rest = plan;
  rest.steps.clear();
  std::copy_if(plan.steps.begin(), plan.steps.end(), std::back_inserter(rest.steps),
               [&](const Step& step) {
                 return std::find(kinds.begin(), kinds.end(), name_of(step.kind)) != kinds.end();
               });
  if (rest.steps.empty())
    throw std::invalid_argument("the plan has no step of kind '" +
                                (kinds.empty() ? std::string() : kinds[0]) + "'");
  rest.barrier_before = place_barriers(rest.steps);
  return rest;
}

} // namespace q4metal::plan
