// The Python face of decode plans: builds and describes them from addresses and shapes; no Tensor
// here.
#pragma once

#include <pybind11/pybind11.h>

namespace q4metal::plan {

void bind(pybind11::module_& m);

} // namespace q4metal::plan
