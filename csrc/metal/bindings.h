// The Python face of decode plans on MPS; no Tensor here.
#pragma once

#include <pybind11/pybind11.h>

namespace q4metal::mps {

// Needs the types that plan/bindings.h binds.
void bind(pybind11::module_& m);

} // namespace q4metal::mps
