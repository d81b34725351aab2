// What the dispatches of a decode plan have really read and written.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace standin {

struct Record {
  std::string kernel;
  std::vector<Access> accesses;
};

// Of the last submission, in the order in which it was encoded.
const std::vector<Record>& records();

// Records, and what the plan declares, for Python.
void bind_records(pybind11::module_& m);

} // namespace standin
