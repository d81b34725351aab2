// The Python module of the stand-in: what torch_q4metal._C has besides on a Mac, and the queue,
// whose work may throw.
#include "../../../csrc/metal/bindings.h"
#include "memory.h"
#include "plan_records.h"
#include "queue.h"

PYBIND11_MODULE(standin, m) {
  q4metal::mps::bind(m);
  standin::bind_records(m);
  m.def("set_lazy", &standin::set_lazy);
  m.def("wait_for_all", &standin::wait_for_all);
  m.def("waits", &standin::waits);
  m.def("is_busy", &standin::is_busy);
  m.def("contents", [](uintptr_t handle) {
    return reinterpret_cast<uintptr_t>(standin::bytes_of(reinterpret_cast<void*>(handle), 0).data);
  });
  m.def("record_event", &standin::record_event);
  m.def("wait_for_event", &standin::wait_for_event);
}
