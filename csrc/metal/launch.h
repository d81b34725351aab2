// What host code and .metal text agree on for the single operators: argument structs, variants,
// grids, kernel names. One text for C++20 (host, tests) and for the .metal files (C++14 with
// address spaces, no standard library); names are for the host only.
//
// How a kernel comes to be. A family is one file csrc/metal/<family>.metal that holds templates
// and instantiates nothing. Its complete text is that file with each line `#include "file"`
// replaced, once a file, by the text of that file (paths are relative to the including file);
// `#include <...>` lines stay. To it the host appends `Kernel::instantiation` of the kernels that
// it needs, one line each, and compiles the whole: nothing else is compiled. The pipeline is then
// found by `Kernel::name`. Compile with math mode "safe" and precise functions, language
// version 3.1.
//
// Buffers, by index (every one must be bound; where one is not used, bind any other buffer):
//   q4_matvec        0 weight  1 scales  2 biases  3 bias  4 x   5 y    6 MatvecArgs
//   q4_matmul        0 weight  1 scales  2 biases  3 bias  4 x   5 y    6 MatmulArgs
//   q4_matmul_plain  as q4_matmul
//   q4_embedding     0 weight  1 scales  2 biases  3 ids   4 out        5 ExpandArgs
//   q4_dequantize    as q4_embedding, ids not used
//   q4_quantize      0 w       1 weight  2 scales  3 biases             4 QuantizeArgs
// x, y, w and out are contiguous; x, w and out begin at multiples of 16 bytes, weight at one of 4,
// scales, biases, bias, y and ids at one of their element size. Scales and biases have one dtype.
// No dimension may be 0: dispatch nothing then.
#pragma once

#include "../layout.h"

#ifndef __METAL_VERSION__
#include <string>

#include "../matrix.h"
#endif

namespace q4metal {
namespace mps {

// ---- argument structs, passed by value (setBytes)

// The dtype of an optional float vector that a kernel reads: int32_t(DType), or kNoVector.
Q4_CONSTANT int32_t kNoVector = -1;
Q4_CONSTANT int32_t kFloat32 = 0;
Q4_CONSTANT int32_t kFloat16 = 1;
Q4_CONSTANT int32_t kBFloat16 = 2;

// y [rows, N] = x [rows, K] W^T + bias [N]; the number of rows is part of the kernel.
struct MatvecArgs {
  uint32_t in_features;  // K
  uint32_t out_features; // N
  int32_t bias_dtype;
};
static_assert(sizeof(MatvecArgs) == 12, "the host and the kernels must agree");

// q4_matmul: y [rows, N] = x [rows, K] W^T + bias [N].
// q4_matmul_plain: y [rows, K] = x [rows, N] W + bias [K].
struct MatmulArgs {
  uint32_t rows;
  uint32_t in_features;
  uint32_t out_features;
  int32_t bias_dtype;
};
static_assert(sizeof(MatmulArgs) == 16, "the host and the kernels must agree");

// q4_embedding: out [rows, K] = W[ids]; an id outside [0, N) gives a row of NaN.
// q4_dequantize: out [rows, K] = W, rows = N.
struct ExpandArgs {
  uint32_t rows;
  uint32_t in_features;
  uint32_t out_features;
  uint32_t id_bytes; // 4 or 8: ids are int32 or int64
};
static_assert(sizeof(ExpandArgs) == 16, "the host and the kernels must agree");

struct QuantizeArgs {
  uint32_t groups; // of the whole matrix: N * K / group_size
};
static_assert(sizeof(QuantizeArgs) == 4, "the host and the kernels must agree");

// ---- variants

Q4_CONSTANT int kSimdWidth = 32;
Q4_CONSTANT int kCodesPerLane = 16; // that a lane takes at a time

// A matvec threadgroup is 2 simdgroups that compute 4 output features each (KERNELS.md's variant
// A, the shape that streams at 91 % of an M5 Max's bandwidth in MLX).
Q4_CONSTANT int kMatvecSimdgroups = 2;
Q4_CONSTANT int kMatvecFeatures = 4;
Q4_CONSTANT int kMaxMatvecRows = 8;

// A matmul threadgroup is 4 simdgroups that compute tile_rows x 64 numbers.
Q4_CONSTANT int kTileColumns = 64;
Q4_CONSTANT int kTileThreads = 128;

Q4_CONSTANT int kExpandThreads = 64; // x kCodesPerLane codes of one row
Q4_CONSTANT int kQuantizeThreads = 64;

#ifndef __METAL_VERSION__

// ---- grids

// Rows of a matmul's tile. The order of addition is the same in all of them.
constexpr int tile_rows(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Threadgroups, and threads in each. MetalKernelFunction::dispatch counts threads: `total`.
struct Launch {
  uint32_t groups[3];
  uint32_t threads[3];

  constexpr uint64_t total(int axis) const { return uint64_t(groups[axis]) * threads[axis]; }
};

constexpr uint32_t div_up(uint64_t a, uint64_t b) { return uint32_t((a + b - 1) / b); }

constexpr Launch matvec_launch(int64_t out_features) {
  return Launch{{div_up(out_features, kMatvecSimdgroups * kMatvecFeatures), 1, 1},
                {uint32_t(kSimdWidth * kMatvecSimdgroups), 1, 1}};
}

// Row tiles run fastest: threadgroups that share a tile of W run side by side. `columns` of y: N,
// or K for q4_matmul_plain.
constexpr Launch matmul_launch(int64_t rows, int64_t columns) {
  return Launch{{div_up(rows, tile_rows(rows)), div_up(columns, kTileColumns), 1},
                {uint32_t(kTileThreads), 1, 1}};
}

constexpr Launch expand_launch(int64_t rows, int64_t in_features) {
  return Launch{{div_up(in_features, kExpandThreads * kCodesPerLane), uint32_t(rows), 1},
                {uint32_t(kExpandThreads), 1, 1}};
}

constexpr Launch quantize_launch(int64_t groups) {
  return Launch{{div_up(groups, kQuantizeThreads), 1, 1}, {uint32_t(kQuantizeThreads), 1, 1}};
}

// ---- names

static_assert(int32_t(DType::f32) == kFloat32 && int32_t(DType::f16) == kFloat16 &&
                  int32_t(DType::bf16) == kBFloat16,
              "kernels read dtypes as these numbers");

enum class Op : uint8_t { matvec, matmul, matmul_plain, embedding, dequantize, quantize };

// One instantiation of a kernel. Small and comparable, so that a cache can be keyed by `packed`.
struct KernelKey {
  Op op;
  DType in;     // of x, of w
  DType scales; // and of biases
  DType out;    // of y, of the expanded rows
  DType tile;   // in which a matmul multiplies
  int bits;
  int group_size;
  int rows; // of a matvec, of a matmul's tile

  constexpr uint64_t packed() const {
    return uint64_t(op) | uint64_t(in) << 8 | uint64_t(scales) << 12 | uint64_t(out) << 16 |
           uint64_t(tile) << 20 | uint64_t(bits) << 24 | uint64_t(group_size) << 32 |
           uint64_t(rows) << 48;
  }
};

struct Kernel {
  const char* family; // the file, without its suffix
  std::string name;
  std::string instantiation;
  uint32_t threads = 256; // of its threadgroups, at most
};

// promote(x, scales).
constexpr DType result_dtype(DType x, DType scales) { return x == scales ? x : DType::f32; }

// 1 to kMaxMatvecRows rows; float32 arithmetic whatever the precision.
constexpr KernelKey matvec_key(DType x, DType scales, int bits, int group_size, int rows) {
  return {Op::matvec, x, scales, result_dtype(x, scales), DType::f32, bits, group_size, rows};
}

// Any number of rows. Tiles are float32 where that is asked for (`exact`) or where the result is
// float32; otherwise they have the dtype of x.
constexpr KernelKey matmul_key(DType x, DType scales, int bits, int group_size, int64_t rows,
                               bool transpose, bool exact) {
  const DType out = result_dtype(x, scales);
  return {transpose ? Op::matmul : Op::matmul_plain,
          x,
          scales,
          out,
          exact ? DType::f32 : out,
          bits,
          group_size,
          tile_rows(rows)};
}

constexpr KernelKey embedding_key(DType scales, DType out, int bits, int group_size) {
  return {Op::embedding, scales, scales, out, out, bits, group_size, 1};
}

constexpr KernelKey dequantize_key(DType scales, DType out, int bits, int group_size) {
  return {Op::dequantize, scales, scales, out, out, bits, group_size, 1};
}

// Scales and biases get the dtype of w.
constexpr KernelKey quantize_key(DType w, int bits, int group_size) {
  return {Op::quantize, w, w, w, w, bits, group_size, 1};
}

constexpr const char* short_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

constexpr const char* metal_type(DType dtype) {
  return dtype == DType::f32 ? "float" : dtype == DType::f16 ? "half" : "bfloat";
}

// The line that makes `function<arguments>` known as `name`.
inline std::string instantiation_line(const std::string& name, const std::string& function) {
  return "template [[host_name(\"" + name + "\")]] [[kernel]] decltype(" + function + ") " +
         function + ";\n";
}

inline Kernel kernel_of(const KernelKey& key) {
  const auto number = [](int value) { return std::to_string(value); };
  const std::string format = "_b" + number(key.bits) + "_g" + number(key.group_size);
  const std::string numbers = number(key.bits) + ", " + number(key.group_size);
  const std::string in = metal_type(key.in), scales = metal_type(key.scales);
  const auto make = [&](const char* family, const std::string& op, const std::string& suffix,
                        const std::string& arguments) -> Kernel {
    const std::string name = op + suffix;
    return {family, name, instantiation_line(name, op + "<" + arguments + ">")};
  };
  const auto names = [](DType a, DType b) {
    return std::string("_") + short_name(a) + "_" + short_name(b);
  };
  switch (key.op) {
  case Op::matvec:
    return make("q4_matvec", "q4_matvec",
                names(key.in, key.scales) + format + "_r" + number(key.rows),
                in + ", " + scales + ", " + numbers + ", " + number(key.rows));
  case Op::matmul:
  case Op::matmul_plain:
    return make("q4_matmul", key.op == Op::matmul ? "q4_matmul" : "q4_matmul_plain",
                names(key.in, key.scales) + format + "_m" + number(key.rows) + "_" +
                    short_name(key.tile),
                in + ", " + scales + ", " + metal_type(key.tile) + ", " + numbers + ", " +
                    number(key.rows));
  case Op::embedding:
  case Op::dequantize:
    return make(key.op == Op::embedding ? "q4_embedding" : "q4_codec",
                key.op == Op::embedding ? "q4_embedding" : "q4_dequantize",
                names(key.scales, key.out) + format,
                scales + ", " + metal_type(key.out) + ", " + numbers);
  case Op::quantize:
    return make("q4_codec", "q4_quantize", std::string("_") + short_name(key.in) + format,
                in + ", " + numbers);
  }
  return {};
}

#endif

} // namespace mps
} // namespace q4metal
