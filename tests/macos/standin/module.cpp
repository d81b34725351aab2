// The Python module of the stand-in: what torch_q4metal._C has besides on a Mac.
#include "../../../csrc/metal/bindings.h"
#include "plan_records.h"

PYBIND11_MODULE(standin, m) {
  q4metal::mps::bind(m);
  standin::bind_records(m);
}
