// What clang's instrumentation calls: ThreadSanitizer's hooks for loads and stores, and the
// handlers of the undefined-behaviour checks. Ours instead of the sanitizers' own run time, so the
// object stays an ordinary one.
#include <cstring>

#include "checker.h"
#include "executor.h"
#include "symbols.h"

namespace {

uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

} // namespace

#define HERE (address(__builtin_return_address(0)) - 1)
#define HOOK extern "C" __attribute__((visibility("hidden")))

namespace {

// The compiler calls the unaligned hooks where the type allows any address.
void aligned(const void* p, uint64_t size, bool write, uint64_t pc) {
  if (address(p) % size)
    msl::fail("misaligned " + std::string(write ? "write" : "read") + " of " +
              std::to_string(size) + " bytes at an address that is " +
              std::to_string(address(p) % size) + " modulo " + std::to_string(size) +
              msl::source_line(pc) + " by " + msl::who());
  msl::checker::access(address(p), size, write, pc);
}

} // namespace

#define HOOKS(n)                                                                                   \
  HOOK void __tsan_read##n(void* p) { aligned(p, n, false, HERE); }                                \
  HOOK void __tsan_write##n(void* p) { aligned(p, n, true, HERE); }                                \
  HOOK void __tsan_unaligned_read##n(void* p) {                                                    \
    msl::checker::access(address(p), n, false, HERE);                                              \
  }                                                                                                \
  HOOK void __tsan_unaligned_write##n(void* p) { msl::checker::access(address(p), n, true, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}

HOOK void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n)
    msl::checker::access(address(from), n, false, HERE);
  if (n)
    msl::checker::access(address(to), n, true, HERE);
  return memcpy(to, from, n);
}
HOOK void* __tsan_memmove(void* to, const void* from, size_t n) {
  if (n)
    msl::checker::access(address(from), n, false, HERE);
  if (n)
    msl::checker::access(address(to), n, true, HERE);
  return memmove(to, from, n);
}
HOOK void* __tsan_memset(void* to, int value, size_t n) {
  if (n)
    msl::checker::access(address(to), n, true, HERE);
  return memset(to, value, n);
}

namespace {

// The head of every handler's data: where in the source.
struct Location {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void undefined(const std::string& what, const Location& at) {
  msl::fail(what + " at " + at.file + ":" + std::to_string(at.line) + " by " + msl::who());
}

} // namespace

HOOK void __ubsan_handle_out_of_bounds_abort(Location* at, uint64_t index) {
  undefined("index " + std::to_string(static_cast<int64_t>(index)) + " outside of the array", *at);
}
HOOK void __ubsan_handle_shift_out_of_bounds_abort(Location* at, uint64_t, uint64_t by) {
  undefined("shift by " + std::to_string(static_cast<int64_t>(by)) +
                ", as many bits as there are or more",
            *at);
}
HOOK void __ubsan_handle_divrem_overflow_abort(Location* at, uint64_t, uint64_t) {
  undefined("integer division by zero or overflow", *at);
}
HOOK void __ubsan_handle_builtin_unreachable(Location* at) {
  undefined("unreachable code was reached", *at);
}
HOOK void __ubsan_handle_missing_return(Location* at) {
  undefined("a function ends without a value", *at);
}
