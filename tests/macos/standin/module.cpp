// The Python module of the stand-in: what torch_q4metal._C has besides on a Mac.
#include "../../../csrc/metal/bindings.h"

PYBIND11_MODULE(standin, m) { q4metal::mps::bind(m); }
