// The packed layout of MLX's affine quantization; every kernel reads its constants from here. One
// text for C++ and for the .metal files (C++14 with address spaces).
//
// A matrix W [N, K] is stored as weight [N, K * bits / 32] words, scales and biases [N, K /
// group_size]. A row of weight is one little-endian bit stream: code k occupies bits [k * bits, (k
// + 1) * bits). W[n][k] = scales[n][k / group_size] * code[n][k] + biases[n][k / group_size].
#pragma once

// Metal's names for types are in namespace metal. Constants at namespace scope live in its constant
// address space.
#ifdef __METAL_VERSION__
#include <metal_stdlib>
using namespace metal;
#define Q4_CONSTANT constant constexpr
#else
#include <cstdint>
#define Q4_CONSTANT constexpr
#endif

namespace q4metal {

// 32 codes are `bits` whole words for every width: no group starts inside a word.
Q4_CONSTANT int kCodesPerRun = 32;

constexpr bool is_supported_bits(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 5 || bits == 6 || bits == 8;
}

constexpr bool is_supported_group_size(int64_t group_size) {
  return group_size == 32 || group_size == 64 || group_size == 128;
}

constexpr int64_t row_words(int64_t in_features, int64_t bits) { return in_features * bits / 32; }
constexpr int64_t row_bytes(int64_t in_features, int64_t bits) { return in_features * bits / 8; }

} // namespace q4metal
