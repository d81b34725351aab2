#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace q4metal::cpu {

#if defined(__x86_64__)

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// The tile registers are large: Linux gives them to a process that asks.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25; // leaf 7, edx: bf16, tile, int8
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kTiles) == kTiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_neon() { return false; }
bool has_i8mm() { return false; }

#else

bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_amx() { return false; }

#if defined(__aarch64__) && defined(__linux__)

bool has_neon() {
  constexpr unsigned long kDotprod = 1ul << 20; // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotprod) != 0;
}

bool has_i8mm() {
  constexpr unsigned long kI8mm = 1ul << 13; // HWCAP2_I8MM
  return has_neon() && (getauxval(AT_HWCAP2) & kI8mm) != 0;
}

#elif defined(__aarch64__) && defined(__APPLE__)

namespace {

bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value == 1;
}

} // namespace

bool has_neon() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_neon() && has_feature("hw.optional.arm.FEAT_I8MM"); }

#else

bool has_neon() { return false; }
bool has_i8mm() { return false; }

#endif

#endif

} // namespace q4metal::cpu
