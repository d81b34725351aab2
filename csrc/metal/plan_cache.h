// Where the keys and values of a KV block lie.
#pragma once

#include "plan_launch.h"
#include "q4.h"

// [32, head_dim] of block `index` of row `row`; part 0 holds keys, part 1 values.
template <typename T>
inline device T* block_of(constant Slab* slabs, device const int* block_tables,
                          constant CacheArgs& args, int part, uint kv_head, uint row, uint index) {
  const uint id = uint(block_tables[ulong(args.table_stride) * row + index]);
  const uint slab = id / args.slab_blocks;
  const ulong block =
      ulong(part * args.layers + args.layer) * slabs[slab].blocks + id % args.slab_blocks;
  return reinterpret_cast<device T*>(slabs[slab].data) +
         (block * args.kv_heads + kv_head) * (kBlockPositions * args.head_dim);
}
