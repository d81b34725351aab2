// What a pass of a decode plan is given, and where in the KV cache its rows read and write.
#pragma once

#include "../plan/plan.h"
#include "float_types.h"
#include "kernels.h"

namespace q4metal::cpu {

// Keys and values of `blocks` KV blocks: [2, layers, blocks, kv_heads, 32, head_dim].
struct KvSlab {
  std::byte* data;
  int64_t blocks;
};

// One pass: `rows` tokens, each with its own position and block table. Rows of one sequence come in
// the order of their positions.
struct TokenInputs {
  int64_t rows;
  const int64_t* ids;          // [rows], if the plan embeds
  const float* hidden;         // [rows, hidden_size], if it does not
  const int64_t* positions;    // [rows]
  const float* rope;           // [rows, 2, head_dim]: cos, sin
  const int32_t* block_tables; // [rows, table_stride]: row of the slab + slab_blocks * slab
  int64_t table_stride;
  const KvSlab* slabs;
  int64_t slab_blocks; // rows of every slab but the last
  float* out;          // logits [out_rows, vocab_size] or, without a head, residual rows; null if
                       // only tokens are wanted of few rows
  int64_t out_rows;    // the last so many rows are given out
  int64_t* tokens;     // [out_rows], argmax; or null

  // Block `index` of row m's keys (part 0) or values (part 1) of a head: [32, head_dim].
  std::byte* block(const plan::Shape& shape, int layer, int part, int64_t head, int64_t m,
                   int64_t index) const {
    const int64_t id = block_tables[m * table_stride + index];
    const KvSlab& slab = slabs[id / slab_blocks];
    const int64_t size = plan::kBlockPositions * shape.head_dim * size_of(shape.kv_dtype);
    const int64_t at = (part * shape.layers + layer) * slab.blocks + id % slab_blocks;
    return slab.data + (at * shape.kv_heads + head) * size;
  }

  // Writes keys (part 0) or values (part 1) [head_dim] of row m.
  void append(const plan::Shape& shape, int layer, int part, int64_t head, int64_t m,
              const float* values, const VectorKernels& vector) const {
    const int64_t position = positions[m], dim = shape.head_dim;
    std::byte* start = block(shape, layer, part, head, m, position / plan::kBlockPositions);
    const int64_t skipped = position % plan::kBlockPositions * dim * size_of(shape.kv_dtype);
    vector.narrow(values, dim, shape.kv_dtype, start + skipped);
  }
};

} // namespace q4metal::cpu
