#include "faults.h"

#include <pthread.h>
#include <ucontext.h>

#include "executor.h"
#include "symbols.h"

namespace msl {

namespace {

alignas(16) char signal_stack[64 * 1024]; // a fiber that overran its own stack has none left
uint64_t fault_address, fault_pc;
int fault_signal;
pthread_t thread; // that runs the dispatch

[[noreturn]] void leave() {
  const char* what = fault_signal == SIGFPE ? "integer division by zero"
                     : fault_signal == SIGILL
                         ? "an instruction that this CPU lacks, or code that must not be reached"
                         : "access to memory that is not there, or a misaligned vector,";
  char hex[32];
  snprintf(hex, sizeof hex, "0x%lx", static_cast<unsigned long>(fault_address));
  fail(std::string(what) +
       (fault_signal == SIGSEGV || fault_signal == SIGBUS ? std::string(" at address ") + hex
                                                          : std::string()) +
       source_line(fault_pc) + " by " + who() + "; the check build says more");
}

void handle(int signal, siginfo_t* info, void* context) {
  auto* uc = static_cast<ucontext_t*>(context);
  auto& registers = uc->uc_mcontext.gregs;
  if (!executor->in_fibers || !pthread_equal(pthread_self(), thread)) {
    std::signal(signal, SIG_DFL); // not a kernel's: the instruction runs again and ends the process
    return;
  }
  fault_signal = signal;
  fault_address = reinterpret_cast<uint64_t>(info->si_addr);
  fault_pc = static_cast<uint64_t>(registers[REG_RIP]);
  // Goes on in leave(), on a stack that is no longer needed for anything else (16-aligned as after
  // a call).
  const uint32_t lane = executor->current;
  registers[REG_RSP] =
      static_cast<greg_t>(executor->stacks.begin() + (lane + 1) * Stacks::kSize - 72);
  registers[REG_RIP] = reinterpret_cast<greg_t>(leave);
}

} // namespace

FaultGuard::FaultGuard() {
  thread = pthread_self();
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 4; i++)
    sigaction(kSignals[i], &action, &before_[i]);
}

FaultGuard::~FaultGuard() {
  for (int i = 0; i < 4; i++)
    sigaction(kSignals[i], &before_[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

} // namespace msl
