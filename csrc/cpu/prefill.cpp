#include "prefill.h"

#include <algorithm>
#include <array>
#include <variant>

#include "aligned_memory.h"
#include "embedding_row.h"
#include "kernels.h"
#include "likeliest.h"
#include "threads.h"

namespace q4metal::cpu {
namespace {

using plan::Segment;
using plan::Step;
using plan::StepKind;

// The wide rows between gate/up and down: so many bytes of them, in float32 and prepared.
constexpr int64_t kActivationBytes = 32 << 20;

// Queries that meet a widened KV block: rows of a tile times the query heads of a KV head.
constexpr int64_t kTileQueries = 96;

// Rows [begin, end) of W.
PackedMatrix slice(const PackedMatrix& w, int64_t begin, int64_t end) {
  const int64_t skipped = begin * w.groups() * size_of(w.scales_dtype);
  PackedMatrix part = w;
  part.weight = w.weight + begin * w.row_stride();
  part.scales = static_cast<const std::byte*>(w.scales) + skipped;
  part.biases = static_cast<const std::byte*>(w.biases) + skipped;
  part.out_features = end - begin;
  return part;
}

DenseMatrix slice(const DenseMatrix& w, int64_t begin, int64_t end) {
  const int64_t skipped = begin * w.in_features * size_of(w.dtype);
  return {static_cast<const std::byte*>(w.weight) + skipped, w.dtype, end - begin, w.in_features};
}

const PackedMatrix* packed(const Step& step, size_t segment) {
  return segment < step.segments.size() ? std::get_if<PackedMatrix>(&step.segments[segment].matrix)
                                        : nullptr;
}

bool is_mlp(const Step& step) {
  return step.kind == StepKind::norm_gate_up || step.kind == StepKind::down;
}

} // namespace

struct Prefill::Workspace {
  AlignedMemory shared, scratch;
  int64_t rows = 0; // that there is room for
  int threads = 0;
  int64_t piece = 0;                // the most output features that a thread takes at a time
  float *hidden, *normed, *queries; // [rows, ...]; attention puts its results in the queries' place
  float* activation;                // of the MLP's part of the rows
  std::byte* prepared;
  int64_t scratch_floats; // of one thread
};

namespace {

// One chunk on its way through the layers.
template <typename Workspace> class Chunk {
public:
  Chunk(const plan::Plan& plan, Workspace& workspace, const TokenInputs& inputs, int threads)
      : shape_(plan.shape), w_(workspace), in_(inputs), threads_(threads), table_(kernels()),
        gemm_(table_.gemm(plan.shape.precision)), matvec_(table_.matvec(plan.shape.precision)) {
    reserve(plan);
  }

  void run(const Step& step) {
    const int64_t size = shape_.hidden_size;
    switch (step.kind) {
    case StepKind::embed:
      return embed(step.segments[0]);
    case StepKind::take_hidden:
      std::copy_n(in_.hidden, in_.rows * size, w_.hidden);
      return;
    case StepKind::norm_qkv:
      return norm_qkv(step);
    case StepKind::attention:
      return attention(step);
    case StepKind::output:
      return residual(step, w_.queries, 0, in_.rows);
    case StepKind::norm_gate_up:
      gate_up_ = &step; // runs with `down`, a part of the rows at a time
      return;
    case StepKind::down:
      for (int64_t first = 0; first < in_.rows; first += mlp_rows())
        mlp(*gate_up_, step, first, std::min(mlp_rows(), in_.rows - first));
      return;
    case StepKind::norm_head:
      return norm_head(step);
    case StepKind::argmax:
      return argmax();
    case StepKind::give_hidden:
      std::copy_n(w_.hidden + (in_.rows - in_.out_rows) * size, in_.out_rows * size, in_.out);
      return;
    }
  }

private:
  // ---- memory

  int64_t mlp_rows() const {
    const int64_t row = shape_.intermediate_size * int64_t(sizeof(float) + sizeof(int16_t));
    const int64_t rows = std::max(kActivationBytes / row / kRowStep, int64_t(1)) * kRowStep;
    return std::min(w_.rows, rows);
  }
  int64_t tile_rows() const {
    return std::max<int64_t>(kTileQueries * shape_.kv_heads / shape_.heads, 1);
  }
  // Few logits are a matvec, as when decoding. Layers are GEMMs for any number of rows: the MLP's
  // last part may have few.
  bool is_matvec(const Step& step, int64_t rows) const {
    return step.kind == StepKind::norm_head && rows <= kMaxMatvecRows;
  }
  size_t bytes_for(const Step& step, const PackedMatrix& w, int64_t rows) const {
    const auto& kernel = is_matvec(step, rows) ? matvec_.prepared_bytes : gemm_.prepared_bytes;
    return aligned_size(kernel(w, rows));
  }
  size_t most_bytes_for(const Step& step, const PackedMatrix& w) const {
    size_t most = bytes_for(step, w, is_mlp(step) ? mlp_rows() : w_.rows);
    for (int64_t rows = 1; step.kind == StepKind::norm_head && rows <= kMaxMatvecRows; ++rows)
      most = std::max(most, bytes_for(step, w, rows));
    return most;
  }

  // Output features that a thread takes at a time.
  int64_t piece(const Step& step, int64_t rows) const {
    const PackedMatrix* w = packed(step, 0);
    return w == nullptr ? kGemmPiece : gemm_.piece(*w, rows);
  }

  void reserve(const plan::Plan& plan) {
    if (in_.rows > w_.rows) {
      w_.rows = in_.rows;
      w_.threads = 0;
      w_.piece = 0;
      int64_t prepared = 0;
      for (const Step& step : plan.steps) {
        w_.piece = std::max(w_.piece, piece(step, w_.rows));
        int64_t bytes = 0;
        for (size_t s = 0; s < step.segments.size() && step.kind != StepKind::embed; ++s)
          if (const PackedMatrix* w = packed(step, s))
            bytes += most_bytes_for(step, *w);
        prepared = std::max(prepared, bytes);
      }
      const int64_t size = shape_.hidden_size, query = shape_.heads * shape_.head_dim;
      const int64_t wide = mlp_rows() * shape_.intermediate_size;
      w_.shared.allocate((w_.rows * (2 * size + query) + wide) * sizeof(float) + prepared +
                         5 * kAlign);
      std::byte* at = w_.shared.data;
      w_.hidden = take<float>(at, w_.rows * size);
      w_.normed = take<float>(at, w_.rows * size);
      w_.queries = take<float>(at, w_.rows * query);
      w_.activation = take<float>(at, wide);
      w_.prepared = at;
    }
    if (threads_ > w_.threads) {
      w_.threads = threads_;
      const int64_t attention = AttentionRows::scratch_floats(
          tile_rows(), shape_.heads / shape_.kv_heads, shape_.head_dim);
      const int64_t products = 2 * w_.rows * std::max(w_.piece, shape_.head_dim);
      w_.scratch_floats = std::max(attention, products) + int64_t(kAlign);
      w_.scratch.allocate(threads_ * w_.scratch_floats * sizeof(float));
    }
  }

  // body(begin, end, scratch) for pieces of [0, size), on all threads.
  template <typename Body> void parallel(int64_t size, int64_t piece, const Body& body) {
    auto* scratch = reinterpret_cast<float*>(w_.scratch.data);
    parallel_pieces(threads_, size, piece, [&](int64_t begin, int64_t end, int thread) {
      body(begin, end, scratch + thread * w_.scratch_floats);
    });
  }

  // ---- products

  // Prepares x [rows, K], rows `first` and on of the chunk's, for a step's matrices: those of one
  // format share it. With a norm x is what `normed` gets of the residual rows.
  void prepare(const Step& step, const float* x, int64_t first, int64_t rows) {
    std::byte* next = w_.prepared;
    std::array<bool, 3> is_first{};
    for (size_t s = 0; s < step.segments.size(); ++s) {
      const PackedMatrix* w = packed(step, s);
      if (w == nullptr)
        continue;
      size_t same = 0;
      while (same < s && !(packed(step, same) != nullptr && packed(step, same)->bits == w->bits &&
                           packed(step, same)->group_size == w->group_size))
        ++same;
      is_first[s] = same == s;
      prepared_[s] = is_first[s] ? next : prepared_[same];
      next += is_first[s] ? bytes_for(step, *w, rows) : 0;
    }
    x_ = x;
    rows_ = rows;
    is_matvec_ = is_matvec(step, rows);
    parallel(rows, kRowStep, [&](int64_t begin, int64_t end, float*) {
      if (step.norm != nullptr)
        norm(step.norm, w_.hidden + first * shape_.hidden_size, begin, end);
      for (size_t s = 0; s < step.segments.size(); ++s)
        if (is_first[s] && !is_matvec_)
          gemm_.prepare(*packed(step, s), x, rows, begin, end, prepared_[s]);
    });
    for (size_t s = 0; s < step.segments.size(); ++s)
      if (is_first[s] && is_matvec_)
        matvec_.prepare(*packed(step, s), x, rows, prepared_[s]);
  }

  void norm(const float* gamma, const float* hidden, int64_t begin, int64_t end) {
    const int64_t size = shape_.hidden_size;
    for (int64_t m = begin; m < end; ++m) {
      float* out = w_.normed + m * size;
      const float inverse =
          table_.vector.norm_gamma(hidden + m * size, gamma, size, shape_.norm_eps, out);
      table_.vector.scale(out, inverse, size);
    }
  }

  // Columns [begin, end) of x W^T + bias, as y [rows, end - begin].
  void multiply(const Step& step, size_t s, int64_t begin, int64_t end, float* y) const {
    const Segment& segment = step.segments[s];
    const int64_t columns = end - begin;
    if (const auto* dense = std::get_if<DenseMatrix>(&segment.matrix)) {
      table_.vector.dense_matvec(slice(*dense, begin, end), x_, rows_, y, 0, columns);
    } else {
      const PackedMatrix part = slice(std::get<PackedMatrix>(segment.matrix), begin, end);
      if (is_matvec_)
        matvec_.run(part, prepared_[s], rows_, y, 0, columns);
      else
        gemm_.run(part, x_, prepared_[s], rows_, y, 0, columns);
    }
    if (segment.bias != nullptr)
      for (int64_t m = 0; m < rows_; ++m)
        table_.vector.add(segment.bias + begin, columns, y + m * columns);
  }

  // ---- steps

  void embed(const Segment& table) {
    parallel(in_.rows, kRowStep, [&](int64_t begin, int64_t end, float*) {
      for (int64_t m = begin; m < end; ++m)
        embedding_row(table, in_.ids[m], w_.hidden + m * shape_.hidden_size);
    });
  }

  // A head at a time: RoPE pairs stay together.
  void norm_qkv(const Step& step) {
    const int64_t dim = shape_.head_dim, heads = shape_.heads, kv_heads = shape_.kv_heads;
    prepare(step, w_.normed, 0, in_.rows);
    parallel(heads + 2 * kv_heads, 1, [&](int64_t unit, int64_t, float* y) {
      const int s = unit < heads ? 0 : unit < heads + kv_heads ? 1 : 2;
      const int64_t head = s == 0 ? unit : (unit - heads) % kv_heads;
      multiply(step, s, head * dim, (head + 1) * dim, y);
      for (int64_t m = 0; m < in_.rows; ++m) {
        float* row = y + m * dim;
        float* rotated = s == 0 ? w_.queries + (m * heads + head) * dim : row;
        const float* cos = in_.rope + m * 2 * dim;
        if (s < 2)
          table_.vector.rope(row, cos, cos + dim, dim, rotated);
        if (s > 0)
          in_.append(shape_, step.layer, s - 1, head, m, rotated, table_.vector);
      }
    });
  }

  struct BlockSource {
    const Chunk* chunk;
    int layer;
    int64_t head;
  };

  template <int kPart> static const void* block_at(const void* context, int64_t index) {
    const auto& source = *static_cast<const BlockSource*>(context);
    const Chunk& chunk = *source.chunk;
    return chunk.in_.block(chunk.shape_, source.layer, kPart, source.head, chunk.in_.rows - 1,
                           index);
  }

  void attention(const Step& step) {
    const int64_t group = shape_.heads / shape_.kv_heads, dim = shape_.head_dim;
    const int64_t tiles = (in_.rows + tile_rows() - 1) / tile_rows();
    const auto& attend = shape_.precision == Precision::exact ? table_.vector.attention_rows
                                                              : table_.vector.fast_attention_rows;
    parallel(tiles * shape_.kv_heads, 1, [&](int64_t unit, int64_t, float* scratch) {
      // The last rows see most: they come first, so that no thread ends long after the others.
      const int64_t tile = tiles - 1 - unit / shape_.kv_heads, head = unit % shape_.kv_heads;
      const int64_t m = tile * tile_rows(), rows = std::min(tile_rows(), in_.rows - m);
      const BlockSource source{this, step.layer, head};
      attend({w_.queries + (m * shape_.heads + head * group) * dim, shape_.heads * dim, rows, group,
              dim, in_.positions[m], shape_.attention_scale, shape_.kv_dtype, &source, block_at<0>,
              block_at<1>, scratch});
    });
  }

  // hidden += x W^T + bias, on `rows` rows from `first` on.
  void residual(const Step& step, const float* x, int64_t first, int64_t rows) {
    const int64_t size = shape_.hidden_size;
    prepare(step, x, first, rows);
    parallel(size, piece(step, rows), [&](int64_t begin, int64_t end, float* y) {
      const int64_t columns = end - begin;
      multiply(step, 0, begin, end, y);
      for (int64_t m = 0; m < rows; ++m)
        table_.vector.add(y + m * columns, columns, w_.hidden + (first + m) * size + begin);
    });
  }

  void mlp(const Step& gate_up, const Step& down, int64_t first, int64_t rows) {
    const int64_t width = shape_.intermediate_size;
    prepare(gate_up, w_.normed, first, rows);
    parallel(width, piece(gate_up, rows), [&](int64_t begin, int64_t end, float* gate) {
      const int64_t columns = end - begin;
      float* up = gate + rows * columns;
      multiply(gate_up, 0, begin, end, gate);
      multiply(gate_up, 1, begin, end, up);
      for (int64_t m = 0; m < rows; ++m)
        table_.vector.swiglu(gate + m * columns, up + m * columns, columns,
                             w_.activation + m * width + begin);
    });
    residual(down, w_.activation, first, rows);
  }

  // Logits of the rows that are wanted.
  void norm_head(const Step& step) {
    if (in_.out_rows == 0)
      return;
    const int64_t vocabulary = shape_.vocab_size, first = in_.rows - in_.out_rows;
    prepare(step, w_.normed, first, in_.out_rows);
    parallel(vocabulary, piece(step, in_.out_rows), [&](int64_t begin, int64_t end, float* y) {
      const int64_t columns = end - begin;
      multiply(step, 0, begin, end, y);
      for (int64_t m = 0; m < rows_; ++m)
        std::copy_n(y + m * columns, columns, in_.out + m * vocabulary + begin);
    });
  }

  void argmax() {
    if (in_.tokens == nullptr)
      return;
    for (int64_t m = 0; m < in_.out_rows; ++m) {
      const float* logits = in_.out + m * shape_.vocab_size;
      in_.tokens[m] = Likeliest::of(logits, 0, shape_.vocab_size).token;
    }
  }

  const plan::Shape& shape_;
  Workspace& w_;
  const TokenInputs& in_;
  const int threads_;
  const KernelTable& table_;
  const GemmKernel& gemm_;
  const MatvecKernel& matvec_;
  const Step* gate_up_ = nullptr;
  // The input of the products under way.
  const float* x_ = nullptr;
  int64_t rows_ = 0;
  bool is_matvec_ = false;
  std::array<std::byte*, 3> prepared_{};
};

} // namespace

Prefill::Prefill(const plan::Plan& plan) : plan_(plan), workspace_(std::make_unique<Workspace>()) {}

Prefill::~Prefill() = default;

int64_t Prefill::workspace_bytes() const {
  return int64_t(workspace_->shared.size + workspace_->scratch.size);
}

void Prefill::run(const TokenInputs& inputs, int threads, void (*interrupted)()) {
  Chunk chunk(plan_, *workspace_, inputs, threads);
  int layer = -1;
  for (const Step& step : plan_.steps) {
    if (step.layer != layer && interrupted != nullptr)
      interrupted();
    layer = step.layer;
    chunk.run(step);
  }
}

} // namespace q4metal::cpu
