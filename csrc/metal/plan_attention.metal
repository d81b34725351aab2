// Grouped-query attention of one position to those before it and itself, over a cache of blocks.
//
// A chunk of positions is the work of one simdgroup: 32 keys at a time, a lane each, then the
// values, each lane with its share of the head's dimensions. Chunks have their own maximum and sum
// and are added up in their order, by the same text whether they lie in threadgroup memory (one
// threadgroup did all) or in device memory.
#include "plan_cache.h"

// Attention of kHeads queries to positions [begin, end), which share a KV head. out[g *
// (kDim + 2)]: sums of values, then the maximum score and the sum of weights.
template <typename T, int kDim, int kHeads, typename Out>
inline void attend(device const float* queries, constant Slab* slabs,
                   device const int* block_tables, constant AttentionArgs& args, uint kv_head,
                   uint row, uint begin, uint end, uint lane, Out out) {
  enum { kDims = (kDim + kSimdWidth - 1) / kSimdWidth }; // of a lane
  float top[kHeads], total[kHeads], sums[kHeads][kDims] = {};
  for (int g = 0; g < kHeads; ++g) {
    top[g] = -INFINITY;
    total[g] = 0.0f;
  }
  for (uint first = begin; first < end; first += kBlockPositions) {
    const uint index = first / kBlockPositions, count = min(end - first, uint(kBlockPositions));
    // Lanes past the end look at the last key and give it no weight.
    device const T* key = block_of<T>(slabs, block_tables, args.cache, 0, kv_head, row, index) +
                          min(lane, count - 1) * kDim;
    float4 products[kHeads] = {};
    for (uint d = 0; d < kDim; d += 4) {
      const float4 k = load4(key, d);
      for (int g = 0; g < kHeads; ++g)
        products[g] = fma(load4(queries + g * kDim, d), k, products[g]);
    }
    float weights[kHeads];
    for (int g = 0; g < kHeads; ++g) {
      const float score = lane < count ? sum_of(products[g]) * args.scale : -INFINITY;
      const float largest = max(top[g], simd_max(score));
      const float rescale = exp(top[g] - largest);
      weights[g] = exp(score - largest);
      top[g] = largest;
      total[g] = fma(total[g], rescale, simd_sum(weights[g]));
      for (int i = 0; i < kDims; ++i)
        sums[g][i] *= rescale;
    }
    device const T* values = block_of<T>(slabs, block_tables, args.cache, 1, kv_head, row, index);
    for (uint p = 0; p < count; ++p)
      for (int i = 0; i < kDims; ++i) {
        const uint d = lane + i * kSimdWidth;
        const float v = d < kDim ? float(values[p * kDim + d]) : 0.0f;
        for (int g = 0; g < kHeads; ++g)
          sums[g][i] = fma(simd_shuffle(weights[g], ushort(p)), v, sums[g][i]);
      }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int i = 0; i < kDims; ++i)
      if (lane + i * kSimdWidth < kDim)
        out[g * (kDim + 2) + lane + i * kSimdWidth] = sums[g][i];
    if (lane == 0) {
      out[g * (kDim + 2) + kDim] = top[g];
      out[g * (kDim + 2) + kDim + 1] = total[g];
    }
  }
}

// Dimension d of the attention of a head from its chunks, `stride` apart.
template <int kDim, typename In>
inline float add_chunks(In chunks, uint count, uint stride, uint d) {
  float top = -INFINITY;
  for (uint c = 0; c < count; ++c)
    top = max(top, chunks[c * stride + kDim]);
  float sum = 0.0f, total = 0.0f;
  for (uint c = 0; c < count; ++c) {
    const float weight = exp(chunks[c * stride + kDim] - top);
    sum = fma(chunks[c * stride + d], weight, sum);
    total = fma(chunks[c * stride + kDim + 1], weight, total);
  }
  return sum / total;
}

// out [R, heads * kDim] for contexts of at most kSingleChunks chunks.
template <typename T, int kDim>
kernel void plan_attention(device const float* queries [[buffer(0)]],
                           constant long* positions [[buffer(1)]],
                           device const int* block_tables [[buffer(2)]],
                           constant Slab* slabs [[buffer(3)]], device float* out [[buffer(4)]],
                           constant AttentionArgs& args [[buffer(5)]],
                           uint3 threadgroup_at [[threadgroup_position_in_grid]],
                           uint thread_at [[thread_index_in_threadgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]]) {
  enum { kStride = kDim + 2 };
  threadgroup float chunks[kSingleChunks * kStride];
  const uint head = threadgroup_at.x, row = threadgroup_at.y;
  const uint kv_head = head / (args.heads / args.cache.kv_heads);
  const uint end = uint(positions[row]) + 1, begin = simdgroup * kChunkPositions;
  const ulong query = (ulong(args.heads) * row + head) * kDim;
  if (begin < end)
    attend<T, kDim, 1>(queries + query, slabs, block_tables, args, kv_head, row, begin,
                       min(end, begin + kChunkPositions), lane,
                       static_cast<threadgroup float*>(chunks) + simdgroup * kStride);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint count = (end + kChunkPositions - 1) / kChunkPositions;
  for (uint d = thread_at; d < kDim; d += kSimdWidth * kSingleChunks)
    out[query + d] =
        add_chunks<kDim>(static_cast<threadgroup const float*>(chunks), count, kStride, d);
}

// partial [R, chunks, heads, kDim + 2] for any context; kHeads query heads read a chunk together.
template <typename T, int kDim, int kHeads>
kernel void plan_attention_split(
    device const float* queries [[buffer(0)]], constant long* positions [[buffer(1)]],
    device const int* block_tables [[buffer(2)]], constant Slab* slabs [[buffer(3)]],
    device float* partial [[buffer(4)]], constant AttentionArgs& args [[buffer(5)]],
    uint3 threadgroup_at [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const uint chunk = threadgroup_at.x * kSplitSimdgroups + simdgroup;
  const uint head = threadgroup_at.y * kHeads, row = threadgroup_at.z;
  const uint end = uint(positions[row]) + 1, begin = chunk * kChunkPositions;
  if (begin >= end)
    return;
  device float* out =
      partial + ((ulong(args.chunks) * row + chunk) * args.heads + head) * (kDim + 2);
  attend<T, kDim, kHeads>(queries + (ulong(args.heads) * row + head) * kDim, slabs, block_tables,
                          args, head / (args.heads / args.cache.kv_heads), row, begin,
                          min(end, begin + kChunkPositions), lane, out);
}

// out [R, heads * kDim] from partial.
template <int kDim>
kernel void plan_attention_combine(device const float* partial [[buffer(0)]],
                                   constant long* positions [[buffer(1)]],
                                   device float* out [[buffer(2)]],
                                   constant AttentionArgs& args [[buffer(3)]],
                                   uint3 threadgroup_at [[threadgroup_position_in_grid]],
                                   uint lane [[thread_index_in_simdgroup]]) {
  const uint head = threadgroup_at.x, row = threadgroup_at.y;
  const uint count = uint(positions[row]) / kChunkPositions + 1;
  device const float* chunks =
      partial + (ulong(args.chunks) * row * args.heads + head) * (kDim + 2);
  for (uint d = lane; d < kDim; d += kSimdWidth)
    out[(ulong(args.heads) * row + head) * kDim + d] =
        add_chunks<kDim>(chunks, count, args.heads * (kDim + 2), d);
}
