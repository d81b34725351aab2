#include "executor_pass.h"

#include <algorithm>
#include <array>

#include "embedding_row.h"
#include "kernels.h"
#include "prefetch.h"

namespace q4metal::cpu {
namespace {

using plan::kMaxRows;
using plan::Segment;
using plan::Step;
using plan::StepKind;

// Of a step's matrices, taken at a time: some 2 us, for which a thread may have to wait for another
// at the step's end. With 64 rows whatever their length it was 6 us of each of 120 waits a token.
constexpr int64_t kPieceBytes = 32 << 10;
constexpr int64_t kFewestRows = 16, kMostRows = 64;

// Of a matrix's weights, asked for ahead of a barrier: some 1 us of reading. 64 KB were no better.
constexpr int64_t kFetchedBytes = 16 << 10;

// One pass of one plan, seen by one thread.
class Pass {
public:
  Pass(const plan::Plan& plan, Workspace& workspace, const TokenInputs& inputs, int thread,
       int threads)
      : plan_(plan), shape_(plan.shape), w_(workspace), in_(inputs), thread_(thread),
        threads_(threads), table_(kernels()), matvec_(table_.matvec(plan.shape.precision)),
        own_(*workspace.threads[thread]), logits_(inputs.out != nullptr ? inputs.out : w_.logits) {
    own_.likeliest.fill({});
  }

  void run(int index) {
    const Step& step = plan_.steps[index];
    index_ = index;
    is_prepared_ = false;
    switch (step.kind) {
    case StepKind::embed:
      return embed(step);
    case StepKind::take_hidden:
      return copy_rows(in_.hidden, w_.hidden);
    case StepKind::norm_qkv:
      return norm_qkv(step);
    case StepKind::attention:
      return attention(step);
    case StepKind::output:
      return residual(step);
    case StepKind::norm_gate_up:
      return norm_gate_up(step);
    case StepKind::down:
      return residual(step);
    case StepKind::norm_head:
      return norm_head(step);
    case StepKind::argmax:
      return argmax();
    case StepKind::give_hidden:
      return copy_rows(w_.hidden, in_.out);
    }
  }

private:
  // Calls body(i) for this thread's share of [0, count).
  template <typename Body> void share(int64_t count, const Body& body) {
    w_.shares.share(index_, thread_, count, body);
  }

  // Calls body(begin, end) for this thread's share of a step's output features.
  template <typename Body> void share_rows(const Step& step, const Body& body) {
    const int64_t size = step.segments[0].out_features(), piece = piece_rows(step);
    share(pieces_of(step, piece),
          [&](int64_t i) { body(i * piece, std::min((i + 1) * piece, size)); });
  }

  // Rows of a step's matrices that a thread takes at a time.
  int64_t piece_rows(const Step& step) const {
    int64_t bytes = 0;
    for (const Segment& segment : step.segments)
      bytes += segment.bytes() / segment.out_features();
    const int64_t rows = kPieceBytes / bytes / kFewestRows * kFewestRows;
    return in_.rows > 1 ? kMostRows : std::clamp(rows, kFewestRows, kMostRows);
  }

  static int64_t pieces_of(const Step& step, int64_t piece) {
    return (step.segments[0].out_features() + piece - 1) / piece;
  }

  // ---- the input of a step's matrices, prepared once by every thread for itself: that costs about
  // as much as a barrier and leaves the prepared rows in the thread's own cache.

  void prepare_norm(const Step& step, const float* hidden) {
    if (is_prepared_)
      return;
    for (int64_t m = 0; m < in_.rows; ++m)
      inverse_rms_[m] =
          table_.vector.norm_gamma(hidden + m * shape_.hidden_size, step.norm, shape_.hidden_size,
                                   shape_.norm_eps, own_.input + m * shape_.hidden_size);
    prepare(step, own_.input);
  }

  void prepare(const Step& step, const float* input) {
    is_prepared_ = true;
    input_ = input;
    for (size_t s = 0; s < step.segments.size(); ++s) {
      const auto* packed = std::get_if<PackedMatrix>(&step.segments[s].matrix);
      if (packed == nullptr)
        continue;
      prepared_[s] = own_.prepared[s];
      for (size_t earlier = 0; earlier < s; ++earlier) {
        const auto* other = std::get_if<PackedMatrix>(&step.segments[earlier].matrix);
        if (other != nullptr && other->bits == packed->bits &&
            other->group_size == packed->group_size)
          prepared_[s] = prepared_[earlier];
      }
      if (prepared_[s] == own_.prepared[s])
        matvec_.prepare(*packed, input, in_.rows, prepared_[s]);
    }
  }

  // Rows [begin, end) of a segment, into y [rows, N].
  void multiply(const Step& step, int s, float* y, int64_t begin, int64_t end) {
    const Segment& segment = step.segments[s];
    if (const auto* packed = std::get_if<PackedMatrix>(&segment.matrix))
      matvec_.run(*packed, prepared_[s], in_.rows, y, begin, end);
    else
      table_.vector.dense_matvec(std::get<DenseMatrix>(segment.matrix), input_, in_.rows, y, begin,
                                 end);
  }

  // y = y * inverse rms + bias on columns [begin, end) of row m.
  void finish(const Segment& segment, float* y, int64_t m, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      y[n] = y[n] * inverse_rms_[m] + (segment.bias == nullptr ? 0.0f : segment.bias[n]);
  }

public:
  // Asks for the first weights of this thread's part of the next step that has any: memory is idle
  // while threads wait for each other and prepare the input.
  void fetch_ahead(int index) const {
    const auto& steps = plan_.steps;
    while (index < int(steps.size()) && !has_matvec(steps[index].kind))
      ++index;
    if (index == int(steps.size()))
      return;
    const Step& step = steps[index];
    if (step.kind == StepKind::norm_qkv) {
      const auto [s, head] =
          head_of(w_.shares.first_of(shape_.heads + 2 * shape_.kv_heads, thread_));
      fetch(step.segments[s], head * shape_.head_dim);
    } else {
      const int64_t piece = piece_rows(step);
      const int64_t first = w_.shares.first_of(pieces_of(step, piece), thread_);
      for (const Segment& segment : step.segments)
        fetch(segment, first * piece);
    }
  }

private:
  static bool has_matvec(StepKind kind) {
    return kind == StepKind::norm_qkv || kind == StepKind::output ||
           kind == StepKind::norm_gate_up || kind == StepKind::down || kind == StepKind::norm_head;
  }

  static void fetch(const Segment& segment, int64_t row) {
    const auto* packed = std::get_if<PackedMatrix>(&segment.matrix);
    if (packed == nullptr)
      return;
    const int64_t left = (packed->out_features - row) * packed->row_stride();
    prefetch_lines(packed->weight + row * packed->row_stride(), std::min(kFetchedBytes, left));
  }

  // ---- steps

  // Segment and head of a unit of norm_qkv.
  std::pair<int, int64_t> head_of(int64_t unit) const {
    const int64_t heads = shape_.heads, kv_heads = shape_.kv_heads;
    const int s = unit < heads ? 0 : unit < heads + kv_heads ? 1 : 2;
    return {s, s == 0 ? unit : (unit - heads) % kv_heads};
  }

  void embed(const Step& step) {
    share(in_.rows, [&](int64_t m) {
      embedding_row(step.segments[0], in_.ids[m], w_.hidden + m * shape_.hidden_size);
    });
  }

  void copy_rows(const float* from, float* to) {
    const int64_t size = shape_.hidden_size;
    share(in_.rows, [&](int64_t m) { std::copy_n(from + m * size, size, to + m * size); });
  }

  // A head at a time: RoPE pairs stay together.
  void norm_qkv(const Step& step) {
    const int64_t dim = shape_.head_dim, heads = shape_.heads, kv_heads = shape_.kv_heads;
    share(heads + 2 * kv_heads, [&](int64_t unit) {
      prepare_norm(step, w_.hidden);
      const auto [s, head] = head_of(unit);
      const Segment& segment = step.segments[s];
      // Keys and values pass through scratch on their way to the cache.
      float* y = s == 0 ? w_.queries : s == 1 ? w_.rows_out : w_.rows_up;
      multiply(step, s, y, head * dim, (head + 1) * dim);
      for (int64_t m = 0; m < in_.rows; ++m) {
        float* row = y + m * segment.out_features();
        finish(segment, row, m, head * dim, (head + 1) * dim);
        const float* cos = in_.rope + m * 2 * dim;
        if (s < 2)
          table_.vector.rope(row + head * dim, cos, cos + dim, dim, row + head * dim);
        if (s > 0)
          in_.append(shape_, step.layer, s - 1, head, m, row + head * dim, table_.vector);
      }
    });
  }

  int64_t positions_of(int64_t m) const { return in_.positions[m] + 1; }

  struct BlockSource {
    const Pass* pass;
    int layer;
    int64_t head, row;
  };

  template <int kPart> static const void* block_at(const void* context, int64_t index) {
    const auto& source = *static_cast<const BlockSource*>(context);
    return source.pass->in_.block(source.pass->shape_, source.layer, kPart, source.head, source.row,
                                  index);
  }

  void attention(const Step& step) {
    const int64_t group = shape_.heads / shape_.kv_heads, dim = shape_.head_dim;
    int64_t most = 0;
    for (int64_t m = 0; m < in_.rows; ++m)
      most = std::max(most, splits_of(positions_of(m)));
    // The query heads of a KV head share its blocks, unless there are too few such units to go
    // round. A query head's numbers are the same either way.
    const int64_t shared_units = in_.rows * shape_.kv_heads * most;
    const int64_t queries = shared_units < 4 * threads_ ? 1 : group;
    const int64_t parts = group / queries;
    share(shared_units * parts, [&](int64_t unit) {
      const int64_t part = unit % parts, split = unit / parts % most;
      const int64_t head = unit / parts / most % shape_.kv_heads;
      const int64_t m = unit / parts / most / shape_.kv_heads;
      const int64_t begin = split * kSplit, end = std::min(begin + kSplit, positions_of(m));
      if (begin >= end)
        return;
      const BlockSource source{this, step.layer, head, m};
      const int64_t query = head * group + part * queries;
      float* out = w_.partial + m * w_.partial_stride + (split * shape_.heads + query) * (dim + 2);
      table_.vector.attention_split({w_.queries + (m * shape_.heads + query) * dim, queries, dim,
                                     begin, end, shape_.attention_scale, shape_.kv_dtype, &source,
                                     block_at<0>, block_at<1>, out});
    });
  }

  void combine_heads(float* out) {
    const int64_t dim = shape_.head_dim;
    for (int64_t m = 0; m < in_.rows; ++m)
      for (int64_t head = 0; head < shape_.heads; ++head)
        table_.vector.attention_combine(w_.partial + m * w_.partial_stride + head * (dim + 2),
                                        splits_of(positions_of(m)), shape_.heads * (dim + 2), dim,
                                        out + (m * shape_.heads + head) * dim);
  }

  // hidden += W x + bias, for the output and the down projection.
  void residual(const Step& step) {
    const Segment& segment = step.segments[0];
    share_rows(step, [&](int64_t begin, int64_t end) {
      if (!is_prepared_) {
        const float* input = w_.activation;
        if (step.kind == StepKind::output) {
          combine_heads(own_.input);
          input = own_.input;
        }
        prepare(step, input);
      }
      multiply(step, 0, w_.rows_out, begin, end);
      for (int64_t m = 0; m < in_.rows; ++m) {
        const float* y = w_.rows_out + m * segment.out_features();
        float* hidden = w_.hidden + m * shape_.hidden_size;
        for (int64_t n = begin; n < end; ++n)
          hidden[n] += y[n] + (segment.bias == nullptr ? 0.0f : segment.bias[n]);
      }
    });
  }

  void norm_gate_up(const Step& step) {
    const int64_t width = shape_.intermediate_size;
    share_rows(step, [&](int64_t begin, int64_t end) {
      prepare_norm(step, w_.hidden);
      multiply(step, 0, w_.activation, begin, end);
      multiply(step, 1, w_.rows_up, begin, end);
      for (int64_t m = 0; m < in_.rows; ++m) {
        float *gate = w_.activation + m * width, *up = w_.rows_up + m * width;
        finish(step.segments[0], gate, m, begin, end);
        finish(step.segments[1], up, m, begin, end);
        table_.vector.swiglu(gate + begin, up + begin, end - begin, gate + begin);
      }
    });
  }

  void norm_head(const Step& step) {
    const int64_t vocabulary = shape_.vocab_size;
    share_rows(step, [&](int64_t begin, int64_t end) {
      prepare_norm(step, w_.hidden);
      multiply(step, 0, logits_, begin, end);
      for (int64_t m = 0; m < in_.rows; ++m) {
        float* logits = logits_ + m * vocabulary;
        finish(step.segments[0], logits, m, begin, end);
        if (in_.tokens != nullptr) // while they are in the cache
          own_.likeliest[m].join(Likeliest::of(logits, begin, end));
      }
    });
  }

  void argmax() {
    if (in_.tokens == nullptr)
      return;
    share(in_.rows, [&](int64_t m) {
      Likeliest all;
      for (int thread = 0; thread < threads_; ++thread)
        all.join(w_.threads[thread]->likeliest[m]);
      in_.tokens[m] = all.token;
    });
  }

  const plan::Plan& plan_;
  const plan::Shape& shape_;
  Workspace& w_;
  const TokenInputs& in_;
  const int thread_, threads_;
  const KernelTable& table_;
  const MatvecKernel& matvec_;
  Workspace::Thread& own_;
  float* const logits_;
  int index_ = 0;
  bool is_prepared_ = false;
  const float* input_ = nullptr;
  std::array<std::byte*, 3> prepared_{};
  std::array<float, kMaxRows> inverse_rms_{};
};

} // namespace

void run_pass(const plan::Plan& plan, Workspace& workspace, const TokenInputs& inputs,
              Barrier& barrier, int thread, int threads) {
  Pass pass(plan, workspace, inputs, thread, threads);
  for (int i = 0; i < int(plan.steps.size()); ++i) {
    if (plan.barrier_before[i]) {
      pass.fetch_ahead(i);
      barrier.wait();
    }
    pass.run(i);
  }
}

} // namespace q4metal::cpu
