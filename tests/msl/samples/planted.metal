// Two kernels as a model would use them, and the same with one fault each: `kFault` chooses. The line that
// the checker should name carries the fault's number in a comment.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

struct Shape {
  uint rows, n, k;
};

constant constexpr uint kGroup = 64;

// y [rows, n] = x [rows, k] W^T, W of 4 bits: a simdgroup computes 4 outputs.
template <int kFault>
kernel void matvec(device const uint* weight [[buffer(0)]], device const half* scales [[buffer(1)]],
                   device const half* x [[buffer(2)]], device half* y [[buffer(3)]],
                   constant Shape& shape [[buffer(4)]], uint3 at [[threadgroup_position_in_grid]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]]) {
  const uint first = (at.x * 2 + simdgroup) * (kFault == 3 ? 3 : 4);
  if (first >= shape.n) return;
  const uint words = shape.k / 8, groups = shape.k / kGroup;
  float sums[4] = {0, 0, 0, 0};
  device const half4* xs = (device const half4*)(x + at.y * shape.k + (kFault == 4 ? 1 : 0));
  for (uint i = lane; i < words; i += 32) {
    const float4 low = float4(xs[2 * i]);  // 4
    const float4 high = float4(xs[2 * i + 1]);
    for (uint r = 0; r < 4; r++) {
      const uint row = kFault == 1 ? first + r : min(first + r, shape.n - 1);
      const uint q = weight[row * words + i];  // 1
      const float4 a = float4(q & 15, q >> 4 & 15, q >> 8 & 15, q >> 12 & 15);
      const uint top = kFault == 5 ? 28 + 4 * r : 28;
      const float4 b = float4(q >> 16 & 15, q >> 20 & 15, q >> 24 & 15, q >> top);  // 5
      const uint g = kFault == 6 ? i / 4 : i * 8 / kGroup;
      const float scale = scales[row * groups + g];  // 6
      const uint to = kFault == 7 ? r + 1 : r;
      sums[to] = fma(scale, dot(low, a) + dot(high, b), sums[to]);  // 7
    }
  }
  if (kFault == 8) ((device half*)x)[lane] = 0.0h;  // 8
  for (uint r = 0; r < 4; r++) {
    float sum = 0;
    if (kFault != 2 || lane < 16) sum = simd_sum(sums[r]);  // 2
    if (kFault == 9) sum += simd_shuffle(sum, lane + 1);  // 9
    if (lane != 0 || first + r >= shape.n) continue;
    device half* out = y + at.y * shape.n + first + r;
    *out = kFault == 10 ? *out + half(sum) : half(sum);  // 10
    if (kFault == 11) *out = half(int(sum) / int(lane));  // 11
  }
}

#define MATVEC(fault) \
  template [[host_name("matvec_" #fault)]] [[kernel]] decltype(matvec<fault>) matvec<fault>;
MATVEC(0)
#ifndef WITHOUT_FAULTS
MATVEC(1) MATVEC(2) MATVEC(3) MATVEC(4) MATVEC(5) MATVEC(6) MATVEC(7) MATVEC(8) MATVEC(9)
MATVEC(10) MATVEC(11)
#endif

// The same product by 32 x 32 tiles and four simdgroups.
template <int kFault>
kernel void matmul(device const uint* weight [[buffer(0)]], device const half* scales [[buffer(1)]],
                   device const half* x [[buffer(2)]], device half* y [[buffer(3)]],
                   constant Shape& shape [[buffer(4)]], uint3 at [[threadgroup_position_in_grid]],
                   uint thread_at [[thread_index_in_threadgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup half4 x_tile[32][10];
  threadgroup half w_tile[kFault == 20 ? 31 : 32][40];
  threadgroup float y_tile[32][kFault == 21 ? 256 : 32];
  const uint column0 = at.x * 32, row0 = at.y * 32;
  simdgroup_float8x8 sums[4];
  for (uint i = 0; i < 4; i++) sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  const uint r = thread_at / 4, c = thread_at % 4 * 8;
  const uint row = row0 + r, column = column0 + r;
  const uint tile_row = simdgroup / 2 * 16, tile_column = simdgroup % 2 * 16;
  for (uint k = 0; k < shape.k; k += 32) {
    threadgroup half4* to = &x_tile[r][c / 4];
    if (kFault == 22) to = (threadgroup half4*)&w_tile[r][c];
    device const half4* from = (device const half4*)(x + row * shape.k + k + c);
    to[0] = row < shape.rows ? from[0] : half4(0.0h);  // 22
    if (kFault != 23 || row < shape.rows) to[1] = row < shape.rows ? from[1] : half4(0.0h);
    uint q = 0;
    half scale = 0.0h;
    if (column < shape.n) {
      q = weight[column * (shape.k / 8) + (k + c) / 8];
      scale = scales[column * (shape.k / kGroup) + k / kGroup];
    }
    for (uint j = 0; j < 8; j++) w_tile[r][c + j] = scale * half(q >> 4 * j & 15);  // 20
    if (kFault == 24) simdgroup_barrier(mem_flags::mem_threadgroup);
    else if (kFault == 25) threadgroup_barrier(mem_flags::mem_device);
    else if (kFault != 26) threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint kk = 0; kk < 32; kk += 8) {
      simdgroup_half8x8 a[2], b[2];
      for (uint i = 0; i < 2; i++) {
        simdgroup_load(a[i], (threadgroup const half*)&x_tile[tile_row + 8 * i][0] + kk, 40);  // 23
        simdgroup_load(b[i], &w_tile[tile_column + 8 * i][kk], 40, ulong2(0, 0), true);
      }
      for (uint i = 0; i < 4; i++)
        if (kFault != 27 || thread_at % 32 < 16)
          simdgroup_multiply_accumulate(sums[i], a[i / 2], b[i % 2], sums[i]);  // 27
    }
    if (kFault == 28 && k + 32 >= shape.k && row >= shape.rows) continue;
    if (kFault != 29) threadgroup_barrier(mem_flags::mem_threadgroup);  // 28
  }
  for (uint i = 0; i < 4; i++)
    simdgroup_store(sums[i], &y_tile[tile_row + i / 2 * 8][tile_column + i % 2 * 8], kFault == 21 ? 256 : 32);
  if (kFault != 30) threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_at; e < 32 * 32; e += 128) {
    const uint out_row = row0 + e / 32, out_column = column0 + e % 32;
    const bool row_fits = kFault == 31 || out_row < shape.rows;
    const bool column_fits = kFault == 32 || out_column < shape.n;
    if (row_fits && column_fits) y[out_row * shape.n + out_column] = half(y_tile[e / 32][e % 32]);  // 31 32
  }
}

#define MATMUL(fault) \
  template [[host_name("matmul_" #fault)]] [[kernel]] decltype(matmul<fault>) matmul<fault>;
MATMUL(0)
#ifndef WITHOUT_FAULTS
MATMUL(20) MATMUL(21) MATMUL(22) MATMUL(23) MATMUL(24) MATMUL(25) MATMUL(26) MATMUL(27)
MATMUL(28) MATMUL(29) MATMUL(30) MATMUL(31) MATMUL(32)
#endif

// Neighbours hand values on through device memory; `go_on` counts by atomics.
template <int kFault>
kernel void hand_on(device float* values [[buffer(0)]], device atomic_uint* count [[buffer(1)]],
                    device const float* constant* table [[buffer(2)]],
                    uint thread_at [[thread_index_in_threadgroup]],
                    uint at [[thread_position_in_grid]], uint size [[threads_per_threadgroup]]) {
  values[at] = float(thread_at);  // 41
  threadgroup_barrier(kFault == 40 ? mem_flags::mem_threadgroup : mem_flags::mem_device);
  const uint next = kFault == 41 ? at + 1 : at - thread_at + (thread_at + 1) % size;
  const float theirs = values[next];  // 40
  threadgroup_barrier(mem_flags::mem_device);
  values[at] = theirs + table[0][kFault == 42 ? 4 : 3];  // 42
  if (kFault == 43 && at == 0) *(device uint*)count = 0;  // 43
  if (kFault == 44 && at == size - 2) values[at] = *(device uint*)count;
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);  // 44
}

#define HAND_ON(fault) \
  template [[host_name("hand_on_" #fault)]] [[kernel]] decltype(hand_on<fault>) hand_on<fault>;
HAND_ON(0) HAND_ON(40) HAND_ON(41) HAND_ON(42) HAND_ON(43) HAND_ON(44)
