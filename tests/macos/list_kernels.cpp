// Prints the family, a tab and the instantiation of kernels of every kind, a line each: what a
// compiler has to accept of csrc/metal. Names, families and text come from launch.h itself.
#include <cstdio>

#include "../../csrc/metal/plan_launch.h"

using namespace q4metal;
using namespace q4metal::mps;

namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr int kBits[] = {2, 3, 4, 5, 6, 8};
constexpr int kGroupSizes[] = {32, 64, 128};

void print(const Kernel& kernel) {
  std::printf("%s\t%s%s", kernel.family, kernel.instantiation.c_str(),
              kernel.instantiation.empty() ? "\n" : "");
}

void print_operators(DType in, DType scales, int bits, int group_size) {
  for (const int rows : {1, 4, 8})
    print(kernel_of(matvec_key(in, scales, bits, group_size, rows)));
  for (const bool exact : {false, true}) {
    print(kernel_of(matmul_key(in, scales, bits, group_size, 9, true, exact)));
    print(kernel_of(matmul_key(in, scales, bits, group_size, 64, false, exact)));
  }
  print(kernel_of(embedding_key(scales, in, bits, group_size)));
  print(kernel_of(dequantize_key(scales, in, bits, group_size)));
  print(kernel_of(quantize_key(in, bits, group_size)));
}

void print_plan(const Format& format, DType kv) {
  print(embed_kernel(format));
  for (const int rows : {1, 8}) {
    print(qkv_kernel(format, format, format, kv, rows));
    print(residual_kernel(format, rows));
    print(gate_up_kernel(format, format, rows));
    print(head_kernel(format, rows));
  }
}

} // namespace

int main() {
  for (int i = 0; i < 18; ++i) { // every pair of bits and group size, each with some dtypes
    const int bits = kBits[i % 6], group_size = kGroupSizes[i / 6];
    const DType scales = kTypes[i % 3], in = kTypes[(i + i / 3) % 3];
    print_operators(in, scales, bits, group_size);
    print_plan({bits, group_size, scales}, scales);
  }
  for (const DType type : kTypes) {
    print_plan({0, 0, type}, type);
    for (const int head_dim : {64, 128}) {
      print(attention_kernel(type, head_dim));
      for (const int shared : {1, 3, 7, 8})
        print(attention_split_kernel(type, head_dim, shared));
    }
  }
  print(attention_combine_kernel(64));
  print(attention_combine_kernel(128));
  print(argmax_kernel());
  print(sample_kernel());
  print(copy_kernel());
  print(read_probe_kernel());
}
