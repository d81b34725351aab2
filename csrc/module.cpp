// The Python module torch_q4metal._C: importing it registers the operators; its functions know no
// Tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/read_probe.h"
#include "cpu/token_draw.h"
#include "plan/bindings.h"
#ifdef __APPLE__
#include "metal/bindings.h"
#endif

namespace {

// For operators too: torch's own module translates with what is registered here.
void translate(std::exception_ptr error) {
  try {
    if (error)
      std::rethrow_exception(error);
  } catch (const q4metal::cpu::UnknownKernels& unknown) {
    const auto errors = pybind11::module_::import("torch_q4metal.errors");
    PyErr_SetString(errors.attr("InstructionSetError").ptr(), unknown.what());
  }
}

} // namespace

PYBIND11_MODULE(_C, m) {
  pybind11::register_exception_translator(translate);
  q4metal::plan::bind(m);
#ifdef __APPLE__
  q4metal::mps::bind(m);
#endif
  m.def(
      "cpu_kernels", [] { return q4metal::cpu::kernels().name; },
      "Name of the CPU kernel table in use.");
  m.def(
      "draw_token",
      [](uintptr_t logits, int64_t size, double temperature, double top_p, double min_p,
         int64_t top_k, double random) {
        return q4metal::cpu::draw_token(reinterpret_cast<const float*>(logits), size,
                                        {temperature, top_p, min_p, top_k}, random);
      },
      pybind11::arg("logits"), pybind11::arg("size"), pybind11::arg("temperature"),
      pybind11::arg("top_p"), pybind11::arg("min_p"), pybind11::arg("top_k"),
      pybind11::arg("random"),
      "A token of `size` float32 logits at an address, for a random number in [0, 1); -1 if none "
      "can be drawn.");
  m.def(
      "draw_token_as_device",
      [](uintptr_t logits, int64_t size, double temperature, double top_p, double min_p,
         int64_t top_k, uint64_t seed, uint64_t position) {
        return q4metal::cpu::draw_token(reinterpret_cast<const float*>(logits), size,
                                        {temperature, top_p, min_p, top_k},
                                        q4metal::cpu::Noise{seed, position});
      },
      pybind11::arg("logits"), pybind11::arg("size"), pybind11::arg("temperature"),
      pybind11::arg("top_p"), pybind11::arg("min_p"), pybind11::arg("top_k"), pybind11::arg("seed"),
      pybind11::arg("position"),
      "As draw_token, with the random numbers that a device's sampling kernel takes there.");
  m.def("read_probe", &q4metal::cpu::read_probe, pybind11::arg("bytes"), pybind11::arg("threads"),
        pybind11::arg("repeats"), pybind11::arg("prefetch"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Seconds of each pass of reading `bytes` bytes of memory with `threads` threads.");
}
