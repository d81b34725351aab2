// What kernels may use of Metal, each with a result that numpy can tell.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

// --- Vectors: constructors, conversions, swizzles, casts -------------------------------------------------

template <typename T>
T doubled(T x) {
  return T(2) * x;
}

kernel void vectors(device float* out [[buffer(0)]], device const packed_half4* packed [[buffer(1)]],
                    device const packed_float3* three [[buffer(2)]]) {
  float4 v = float4(1, 2, 3, 4);
  v.xy = v.yx;                                        // 2 1 3 4
  const half4 h = half4(v) + half4(0.5h);             // 2.5 1.5 3.5 4.5
  const uint4 u = uint4(h);                           // truncated, not reinterpreted: 2 1 3 4
  const int4 s = (int4)float4(-1.5, 2.5, -3.5, 4.5);  // -1 2 -3 4
  const float4 mixed = float4(v.xy, float2(h.zw));    // 2 1 3.5 4.5
  const float4 cast = static_cast<float4>(u) + float4(packed[1]);
  float4 sum = v + float4(h) + float4(u) + float4(s) + mixed + cast;
  for (int i = 0; i < 4; i++) out[i] = sum[i];
  out[4] = three[1].y;
  out[5] = doubled(metal::float2(3, 4)).y;
  out[6] = sizeof(packed_float3) * 100 + sizeof(float3) * 10 + sizeof(packed_half4);
  out[7] = as_type<float>(as_type<uint>(1.5f));
  out[8] = float(as_type<half2>(0x3c004000u).x);      // 2
  out[9] = 1 / 3.0 == 1 / 3.0f;                       // literals are float
  out[10] = float(bfloat(1.00390625f));               // to even: 1
  out[11] = float(half(2049.0f) + half(1.0h));        // half rounds: 2048 + 1 = 2049 -> 2048
  out[12] = dot(float3(1, 2, 3), float3(4, 5, 6)) + dot(half4(1.0h), half4(2.0h));
  out[13] = any(float2(1, 2) > float2(5, 1)) && !all(float2(1, 2) > float2(5, 1));
  out[14] = select(float2(1, 2), float2(3, 4), float2(1, 2) > float2(5, 1)).y;
  out[15] = vec<float, 2>(7).y + vec<half, 4>(1.0h).w;
}

// --- Math -------------------------------------------------------------------------------------------------

kernel void math(device const float* x [[buffer(0)]], device float* out [[buffer(1)]],
                 uint i [[thread_position_in_grid]]) {
  const float a = x[i];
  device float* o = out + i * 12;
  o[0] = exp(a);
  o[1] = rsqrt(a);
  o[2] = precise::tanh(a) + fast::cos(a);
  o[3] = clamp(a, 0.5f, 2.0f) + min(a, 1.0f) + max(a, 1.0f) + abs(-a) + fabs(-a);
  o[4] = fma(a, a, 1.0f) + floor(a) + ceil(a) + rint(a) + round(a) + trunc(a);
  o[5] = float(sqrt(half(a)));
  o[6] = pow(a, 2.0f) + powr(a, 0.5f) + exp2(a) + log2(a) + log(a);
  o[7] = float(popcount(uint(7))) + clz(1u) + ctz(8u) + extract_bits(0xabcdu, 4, 8) + mulhi(1u << 31, 6u);
  o[8] = sign(-a) + mix(0.0f, a, 0.5f) + step(1.0f, a) + saturate(a) + fract(a);
  o[9] = isnan(NAN) && isinf(INFINITY) && !isfinite(-INFINITY) && isnan(-NAN);
  o[10] = sin(float4(a)).w + float(exp(half2(1.0h)).y) + atan2(a, 2.0f) + fmod(a, 0.75f);
  o[11] = numeric_limits<float>::max() == FLT_MAX && is_same_v<half, half> && M_PI_F > 3.14f;
}

// --- Simdgroups and quads ---------------------------------------------------------------------------------

kernel void simd(device const int* x [[buffer(0)]], device int* out [[buffer(1)]],
                 uint lane [[thread_index_in_simdgroup]], uint group [[simdgroup_index_in_threadgroup]],
                 uint groups [[simdgroups_per_threadgroup]], uint width [[threads_per_simdgroup]]) {
  const uint i = group * width + lane;
  const int v = x[i];
  device int* o = out + i * 24;
  o[0] = simd_sum(v);
  o[1] = simd_max(v);
  o[2] = simd_min(v);
  o[3] = simd_product(v % 3 + 1);
  o[4] = simd_shuffle(v, ushort(31 - lane));
  o[5] = simd_shuffle_xor(v, 5);
  o[6] = lane < 28 ? 1 : 0;
  const int down = simd_shuffle_down(v, 4);
  if (lane < 28) o[6] = down;
  o[7] = simd_shuffle_and_fill_up(v, -1, 3);
  o[8] = simd_broadcast(v, 9) + simd_broadcast_first(v);
  o[9] = simd_prefix_inclusive_sum(v);
  o[10] = simd_prefix_exclusive_sum(v);
  o[11] = simd_all(v >= 0) + 2 * simd_any(v > 90) + 4 * simd_is_first();
  o[12] = int(ulong(simd_ballot(v > 50)) & 0xffff);
  o[13] = quad_sum(v);
  o[14] = quad_shuffle_xor(v, 1);
  o[15] = quad_broadcast(v, 2);
  o[16] = simd_shuffle_rotate_down(v, 5);
  o[17] = simd_and(v | 3) + simd_or(v & 12) + simd_xor(v);
  o[18] = simd_sum(int4(v)).z;
  o[19] = int(groups);
  o[20] = int(simd_sum(half2(1.0h)).x);
  o[21] = simd_shuffle_up(v, 0);
  o[22] = quad_max(v);
  o[23] = simd_shuffle_rotate_up(v, 5);
}

// --- Matrices of a simdgroup ------------------------------------------------------------------------------

template <typename T>
kernel void matrices(device const T* a [[buffer(0)]], device const T* b [[buffer(1)]],
                     device float* out [[buffer(2)]]) {
  simdgroup_matrix<T, 8, 8> ma, mb, unit = simdgroup_matrix<T, 8, 8>(T(1.0f));
  simdgroup_load(ma, a, 16, ulong2(8, 1));
  simdgroup_load(mb, b, 8, ulong2(0, 0), true);
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(2.0f), product;
  simdgroup_multiply_accumulate(sum, ma, mb, sum);
  simdgroup_multiply(product, ma, unit);
  simdgroup_store(sum, out, 8);
  simdgroup_store(product, out + 64, 16, ulong2(8, 0), true);
}
template [[host_name("matrices_float")]] kernel void matrices<float>(device const float*, device const float*,
                                                                     device float*);
template [[host_name("matrices_half")]] [[kernel]] decltype(matrices<half>) matrices<half>;
template [[host_name("matrices_bfloat")]] [[kernel]] decltype(matrices<bfloat>) matrices<bfloat>;

// --- Positions, threadgroup arguments and sizes -----------------------------------------------------------

struct Position {
  uint3 grid, group, in_group, groups, threads, size, full;
  uint index;
};

[[kernel]] void positions(device uint* out [[buffer(0)]], uint3 grid [[thread_position_in_grid]],
                          ushort3 group [[threadgroup_position_in_grid]],
                          uint3 in_group [[thread_position_in_threadgroup]],
                          uint3 groups [[threadgroups_per_grid]], uint3 threads [[threads_per_grid]],
                          uint3 size [[threads_per_threadgroup]],
                          uint3 full [[dispatch_threads_per_threadgroup]],
                          uint index [[thread_index_in_threadgroup]]) {
  const uint i = (grid.z * threads.y + grid.y) * threads.x + grid.x;
  const uint3 all[7] = {grid, uint3(group), in_group, groups, threads, size, full};
  for (uint p = 0; p < 7; p++)
    for (uint d = 0; d < 3; d++) out[i * 22 + p * 3 + d] = all[p][d];
  out[i * 22 + 21] = index;
}

kernel void shared_sum(device const float* x, device float* out, threadgroup float* scratch [[threadgroup(0)]],
                       uint i [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  scratch[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint half_n = n / 2; half_n > 0; half_n /= 2) {
    if (i < half_n) scratch[i] += scratch[i + half_n];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (i == 0) out[0] = scratch[0];
}

// --- Function constants -----------------------------------------------------------------------------------

constant uint kWidth [[function_constant(0)]];
constant bool kScaled [[function_constant(1)]];
constant bool kHasBias [[function_constant(2)]];
constant bool kBias = is_function_constant_defined(kHasBias) ? kHasBias : false;
constant uint kTwice = 2 * kWidth;
constant float kTable[3] = {0.5f, 1.5f, 2.5f};

kernel void constants(device float* out [[buffer(0)]],
                      device const float* bias [[buffer(1), function_constant(kBias)]],
                      constant float& factor [[buffer(2)]]) {
  out[0] = kWidth;
  out[1] = kScaled ? factor : 1.0f;
  out[2] = kBias ? bias[0] : -1.0f;
  out[3] = kTwice + kTable[1];
}

// --- Order: which thread came last ------------------------------------------------------------------------

kernel void last(device atomic_uint* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  atomic_store_explicit(out, i, memory_order_relaxed);
  atomic_fetch_add_explicit(out + 1, 1u, memory_order_relaxed);
  atomic_fetch_max_explicit(out + 2, i, memory_order_relaxed);
}

// --- What starts as NaN -----------------------------------------------------------------------------------

kernel void unset(device float* out [[buffer(0)]]) {
  threadgroup float never[4];
  out[0] = never[2];
}
