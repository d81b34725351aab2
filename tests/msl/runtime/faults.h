// Turns a signal that a kernel raises (bad address, misaligned vector, division by zero) into an
// error of the dispatch. The check build finds these before they happen; in the typed build they
// would end the process.
#pragma once

#include <csignal>

namespace msl {

class FaultGuard {
public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction before_[4];
  stack_t stack_before_;
};

} // namespace msl
