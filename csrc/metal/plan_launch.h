// What host code and .metal text agree on for the decode plan's steps (plan/plan.h): argument
// structs, grids, kernel names. As launch.h: one text for C++ and Metal, names for the host only;
// kernels come to be in the same way.
//
// A matrix takes four buffers: weight, scales, biases, bias (float32 [N], or anything where the
// args say that there is none). A dense one has only the first; bind it to the others too. Dense
// matrices have K a multiple of 16 and begin at multiples of 16 bytes; so do all float32 buffers.
//   plan_embed       0-3 matrix (3 not used)  4 ids int64 [R]  5 hidden  6 EmbedArgs
//   plan_qkv         0-3 q  4-7 k  8-11 v  12 gamma  13 hidden  14 queries  15 rope  16 positions
//                    17 block_tables  18 slabs  19 QkvArgs
//   plan_attention   0 queries  1 positions  2 block_tables  3 slabs  4 out  5 AttentionArgs
//   plan_attention_split    as plan_attention, out is `partial`
//   plan_attention_combine  0 partial  1 positions  2 out  3 AttentionArgs
//   plan_residual    0-3 matrix  4 x  5 hidden  6 MatrixArgs        (output and down projection)
//   plan_gate_up     0-3 gate  4-7 up  8 gamma  9 hidden  10 activation  11 MatrixArgs
//   plan_head        0-3 matrix  4 gamma  5 hidden  6 logits  7 MatrixArgs
//   plan_argmax      0 logits  1 tokens int64 [R]  2 ArgmaxArgs
//   plan_sample      0 logits  1 sampling Sampling [R]  2 positions  3 tokens  4 ArgmaxArgs
//   plan_copy        0 from  1 to  2 CopyArgs                       (take_hidden and give_hidden)
//   read_probe       0 data  1 sums uint32  2 ProbeArgs             (no step: a measurement)
// float32, rows contiguous: hidden [R, H], queries and attention's out [R, heads * head_dim], rope
// [R, 2, head_dim] (cos, sin), activation [R, I], logits [R, V], partial [R, chunks, heads,
// head_dim + 2]. positions int64 [R], block_tables int32 [R, table_stride].
#pragma once

#include "launch.h"

namespace q4metal {
namespace mps {

// ---- argument structs

// A slab of the KV pool [2, layers, blocks, kv_heads, 32, head_dim]. The host writes its
// gpuAddress and makes it resident.
struct Slab {
#ifdef __METAL_VERSION__
  device uchar* data;
#else
  uint64_t data;
#endif
  uint64_t blocks;
};
static_assert(sizeof(Slab) == 16, "the host and the kernels must agree");

struct EmbedArgs {
  uint32_t in_features;  // H
  uint32_t out_features; // vocabulary
};
static_assert(sizeof(EmbedArgs) == 8, "the host and the kernels must agree");

// One or two matrices [N, K] that are multiplied by the same rows.
struct MatrixArgs {
  uint32_t in_features;
  uint32_t out_features;
  uint32_t has_bias; // bit i: of matrix i
  float norm_eps;
};
static_assert(sizeof(MatrixArgs) == 16, "the host and the kernels must agree");

// Where a layer's keys and values lie.
struct CacheArgs {
  uint32_t layer;
  uint32_t layers;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t table_stride;
  uint32_t slab_blocks; // of every slab but the last
};
static_assert(sizeof(CacheArgs) == 24, "the host and the kernels must agree");

struct QkvArgs {
  CacheArgs cache;
  MatrixArgs matrix; // its out_features is not used; bits 0 to 2 of has_bias are q, k, v
  uint32_t heads;
};
static_assert(sizeof(QkvArgs) == 44, "the host and the kernels must agree");

struct AttentionArgs {
  CacheArgs cache;
  uint32_t heads;
  uint32_t chunks; // room in `partial` of a row
  float scale;
};
static_assert(sizeof(AttentionArgs) == 36, "the host and the kernels must agree");

struct ArgmaxArgs {
  uint32_t vocab_size;
};
static_assert(sizeof(ArgmaxArgs) == 4, "the host and the kernels must agree");

// How a row's token is drawn (sampling.py). Filters look at the probabilities as they are, the
// temperature comes last. Ties at the edge of a filter are all kept. The random numbers are
// Philox's at (token, position) under the seed: a position draws the same however it is reached.
struct Sampling {
  float temperature; // 0: the likeliest token
  float top_p;       // 0 or 1: all
  float min_p;       // 0: all
  uint32_t top_k;    // 0: all
  uint32_t seed_low;
  uint32_t seed_high;
};
static_assert(sizeof(Sampling) == 24, "the host and the kernels must agree");

struct CopyArgs {
  uint32_t count; // floats
};
static_assert(sizeof(CopyArgs) == 4, "the host and the kernels must agree");

struct ProbeArgs {
  uint32_t count; // of 16 bytes each
};
static_assert(sizeof(ProbeArgs) == 4, "the host and the kernels must agree");

// ---- variants

Q4_CONSTANT int kBlockPositions = 32; // of a KV block

// Attention goes over a context in chunks of positions, each the work of one simdgroup, and adds
// up chunks in their order. Up to kSingleChunks one threadgroup a query head does all of it;
// beyond, threadgroups share chunks out and leave partial results to a combining step. A row's
// numbers are the same either way.
Q4_CONSTANT int kChunkPositions = 128;
Q4_CONSTANT int kSingleChunks = 8;
Q4_CONSTANT int kSplitSimdgroups = 4; // chunks of a threadgroup beyond
Q4_CONSTANT int kMaxSharedHeads = 8;  // query heads that read a chunk together

Q4_CONSTANT int kPairFeatures = 2;    // of gate, and of up, a simdgroup
Q4_CONSTANT int kTokenThreads = 1024; // of plan_argmax and plan_sample, which take one row each
Q4_CONSTANT int kCopyThreads = 256;
Q4_CONSTANT int kProbeThreads = 256;
Q4_CONSTANT int kProbeGroups = 1024; // enough for the largest GPU to hide its memory's latency

#ifndef __METAL_VERSION__

constexpr int64_t chunks_of(int64_t positions) { return div_up(positions, kChunkPositions); }

// Whether rows of at most `positions` need the split kernels.
constexpr bool needs_split(int64_t positions) {
  return positions > int64_t(kSingleChunks) * kChunkPositions;
}

// Query heads that share a threadgroup in plan_attention_split.
constexpr int shared_heads(int64_t heads, int64_t kv_heads) {
  const int64_t group = heads / kv_heads;
  int shared = 1;
  for (int candidate = 1; candidate <= kMaxSharedHeads; ++candidate)
    if (group % candidate == 0)
      shared = candidate;
  return shared;
}

// ---- grids

constexpr Launch embed_launch(int64_t rows, int64_t in_features) {
  return expand_launch(rows, in_features);
}

// A simdgroup computes two RoPE pairs of a head.
constexpr Launch qkv_launch(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return matvec_launch((heads + 2 * kv_heads) * head_dim);
}

constexpr Launch attention_launch(int64_t rows, int64_t heads) {
  return Launch{{uint32_t(heads), uint32_t(rows), 1}, {uint32_t(kSimdWidth * kSingleChunks), 1, 1}};
}

// `positions`: the most that a row has.
constexpr Launch attention_split_launch(int64_t rows, int64_t heads, int64_t kv_heads,
                                        int64_t positions) {
  return Launch{{div_up(chunks_of(positions), kSplitSimdgroups),
                 uint32_t(heads / shared_heads(heads, kv_heads)), uint32_t(rows)},
                {uint32_t(kSimdWidth * kSplitSimdgroups), 1, 1}};
}

constexpr Launch attention_combine_launch(int64_t rows, int64_t heads) {
  return Launch{{uint32_t(heads), uint32_t(rows), 1}, {uint32_t(kSimdWidth), 1, 1}};
}

constexpr Launch residual_launch(int64_t out_features) { return matvec_launch(out_features); }

constexpr Launch gate_up_launch(int64_t out_features) {
  return Launch{{div_up(out_features, kMatvecSimdgroups * kPairFeatures), 1, 1},
                {uint32_t(kSimdWidth * kMatvecSimdgroups), 1, 1}};
}

constexpr Launch head_launch(int64_t vocab_size) { return matvec_launch(vocab_size); }

constexpr Launch argmax_launch(int64_t rows) {
  return Launch{{uint32_t(rows), 1, 1}, {uint32_t(kTokenThreads), 1, 1}};
}

constexpr Launch sample_launch(int64_t rows) { return argmax_launch(rows); }

constexpr Launch copy_launch(int64_t count) {
  return Launch{{div_up(count, kCopyThreads), 1, 1}, {uint32_t(kCopyThreads), 1, 1}};
}

constexpr Launch read_probe_launch() {
  return Launch{{uint32_t(kProbeGroups), 1, 1}, {uint32_t(kProbeThreads), 1, 1}};
}

// ---- names

// How a matrix is stored: packed with bits, group size and the scales' dtype, or dense (bits 0).
struct Format {
  int bits;
  int group_size;
  DType dtype;
};

inline Format format_of(const PackedMatrix& m) { return {m.bits, m.group_size, m.scales_dtype}; }
inline Format format_of(const DenseMatrix& m) { return {0, 0, m.dtype}; }

inline std::string format_name(const Format& f) {
  return (f.bits == 0 ? std::string("_dense")
                      : "_b" + std::to_string(f.bits) + "_g" + std::to_string(f.group_size)) +
         "_" + short_name(f.dtype);
}

inline std::string format_type(const Format& f) {
  if (f.bits == 0)
    return std::string("Dense<") + metal_type(f.dtype) + ">";
  return "Packed<" + std::to_string(f.bits) + ", " + std::to_string(f.group_size) + ", " +
         metal_type(f.dtype) + ">";
}

inline Kernel plan_kernel(const char* family, const char* function, const std::string& suffix,
                          const std::string& arguments) {
  const std::string name = function + suffix;
  return {family, name, instantiation_line(name, std::string(function) + "<" + arguments + ">")};
}

inline Kernel embed_kernel(const Format& table) {
  return plan_kernel("plan_embed", "plan_embed", format_name(table), format_type(table));
}

inline Kernel qkv_kernel(const Format& q, const Format& k, const Format& v, DType kv, int rows) {
  return plan_kernel("plan_qkv", "plan_qkv",
                     format_name(q) + format_name(k) + format_name(v) + "_kv_" + short_name(kv) +
                         "_r" + std::to_string(rows),
                     format_type(q) + ", " + format_type(k) + ", " + format_type(v) + ", " +
                         metal_type(kv) + ", " + std::to_string(rows));
}

inline Kernel attention_kernel(DType kv, int64_t head_dim) {
  return plan_kernel("plan_attention", "plan_attention",
                     std::string("_") + short_name(kv) + "_d" + std::to_string(head_dim),
                     std::string(metal_type(kv)) + ", " + std::to_string(head_dim));
}

inline Kernel attention_split_kernel(DType kv, int64_t head_dim, int shared) {
  return plan_kernel("plan_attention", "plan_attention_split",
                     std::string("_") + short_name(kv) + "_d" + std::to_string(head_dim) + "_h" +
                         std::to_string(shared),
                     std::string(metal_type(kv)) + ", " + std::to_string(head_dim) + ", " +
                         std::to_string(shared));
}

inline Kernel attention_combine_kernel(int64_t head_dim) {
  return plan_kernel("plan_attention", "plan_attention_combine", "_d" + std::to_string(head_dim),
                     std::to_string(head_dim));
}

inline Kernel residual_kernel(const Format& matrix, int rows) {
  return plan_kernel("plan_matvec", "plan_residual",
                     format_name(matrix) + "_r" + std::to_string(rows),
                     format_type(matrix) + ", " + std::to_string(rows));
}

inline Kernel gate_up_kernel(const Format& gate, const Format& up, int rows) {
  return plan_kernel("plan_matvec", "plan_gate_up",
                     format_name(gate) + format_name(up) + "_r" + std::to_string(rows),
                     format_type(gate) + ", " + format_type(up) + ", " + std::to_string(rows));
}

inline Kernel head_kernel(const Format& matrix, int rows) {
  return plan_kernel("plan_matvec", "plan_head", format_name(matrix) + "_r" + std::to_string(rows),
                     format_type(matrix) + ", " + std::to_string(rows));
}

// Not templates: the family's text holds them as they are.
inline Kernel argmax_kernel() { return {"plan_token", "plan_argmax", "", kTokenThreads}; }
inline Kernel sample_kernel() { return {"plan_sample", "plan_sample", "", kTokenThreads}; }
inline Kernel copy_kernel() { return {"plan_token", "plan_copy", ""}; }
inline Kernel read_probe_kernel() { return {"read_probe", "read_probe", ""}; }

#endif

} // namespace mps
} // namespace q4metal
