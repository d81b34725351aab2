// Tests kernel tables without torch: against float64, and bit for bit against ref where split.h
// defines the bits.
//
//   kernel_table [--quick] [NAME ...]     tests tables (all that this CPU supports)
//   kernel_table --time [--bits B] [--precision P] [--rows R] [--hot] [NAME ...]
//   kernel_table --list                   what was linked, and what this CPU supports
//
// Exits with 1 if a check failed, with 2 if a table is missing.
#include <cstring>

#include "checks.h"
#include "tables.h"

using namespace q4metal;
using namespace q4metal::cpu;
using namespace q4metal::cpu::tests;

namespace {

// Every width of K that has a tail of its own, at most 640 wide, few rows.
const Choices kQuick = {{32, 96, 160, 576, 640}, {1, 7, 70}, {1, 2, 3, 5, 8}, {9, 33}};

const Choices kAll = {{32, 64, 96, 160, 576, 640, 896, 1152, 2176, 4864},
                      {1, 7, 8, 9, 19, 100},
                      {1, 2, 3, 4, 5, 6, 7, 8},
                      {9, 16, 33, 64}};

bool test(const LinkedTable& linked, bool quick) {
  Report report;
  const KernelTable& table = *linked.table;
  uint32_t seed = 0;
  for (const Case& c : pairwise_cases(quick ? kQuick : kAll))
    check_products(table, c, ++seed, report);
  // Wider than any int32 or float sum of one block, and than what L1 holds of x.
  check_products(table, {{4, 64, DType::f16, 18944, 7}, 4, 9}, ++seed, report);
  check_products(table, {{3, 32, DType::bf16, 9632, 6}, 2, 9}, ++seed, report);
  check_largest_sums(table, report);
  check_vector_kernels(table, report);
  std::printf("%s: %s (%s), %lld cases, %lld checks, %lld failed\n", table.name,
              report.failed == 0 ? "ok" : "FAILED", linked.emulated ? "emulated" : "native",
              static_cast<long long>(report.cases), static_cast<long long>(report.checks),
              static_cast<long long>(report.failed));
  for (const std::string& failure : report.first_failures)
    std::printf("  %s\n", failure.c_str());
  std::fflush(stdout);
  return report.failed == 0;
}

[[noreturn]] void usage(const std::string& problem) {
  std::fprintf(stderr, "kernel_table: %s\n", problem.c_str());
  std::exit(2);
}

const LinkedTable& find(const std::vector<LinkedTable>& tables, const std::string& name) {
  for (const LinkedTable& linked : tables)
    if (name == linked.table->name) {
      if (!linked.supported)
        usage(name + " is not supported by this CPU");
      return linked;
    }
  usage("this build has no table " + name);
}

} // namespace

int main(int argc, char** argv) {
  const auto tables = linked_tables();
  bool quick = false, time = false;
  TimingOptions options;
  std::vector<LinkedTable> chosen;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&]() -> std::string {
      return i + 1 < argc ? argv[++i] : (usage(argument + " needs a value"), "");
    };
    if (argument == "--list") {
      for (const LinkedTable& linked : tables)
        std::printf("%s %s\n", linked.table->name,
                    !linked.supported ? "unsupported"
                    : linked.emulated ? "emulated"
                                      : "native");
      return 0;
    } else if (argument == "--quick") {
      quick = true;
    } else if (argument == "--time") {
      time = true;
    } else if (argument == "--hot") {
      options.hot = true;
    } else if (argument == "--bits") {
      options.bits = std::atoi(value().c_str());
    } else if (argument == "--rows") {
      options.rows = std::atoi(value().c_str());
    } else if (argument == "--precision") {
      const auto precision = precision_named(value());
      if (!precision)
        usage("--precision takes exact, fast or int8");
      options.precision = int(*precision);
    } else if (argument.rfind("--", 0) == 0) {
      usage("unknown option " + argument);
    } else {
      chosen.push_back(find(tables, argument));
    }
  }
  if (chosen.empty())
    for (const LinkedTable& linked : tables)
      if (linked.supported)
        chosen.push_back(linked);

  bool passed = true;
  for (const LinkedTable& linked : chosen)
    if (time)
      time_table(*linked.table, options);
    else
      passed &= test(linked, quick);
  return passed ? 0 : 1;
}
