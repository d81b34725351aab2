#include "bindings.h"

#include <pybind11/stl.h>

#include <utility>

#include "decode_plan.h"

namespace q4metal::mps {
namespace {

namespace py = pybind11;

// Owns a plan through its handle.
class PlanHandle {
public:
  PlanHandle(const plan::Shape& shape, const std::optional<plan::Segment>& embedding,
             const std::vector<plan::Layer>& layers, const std::optional<plan::Head>& head,
             const DeviceMemory& memory, int64_t context)
      : plan_(std::make_shared<DecodePlan>(plan::build(shape, embedding, layers, head), memory,
                                           context)),
        handle_(add_plan(plan_)) {}
  PlanHandle(const PlanHandle&) = delete;
  ~PlanHandle() { release(); }

  void release() {
    if (handle_ != 0)
      remove_plan(std::exchange(handle_, 0));
  }

  int64_t handle() const { return handle_; }
  const DecodePlan& plan() const { return *plan_; }

private:
  std::shared_ptr<DecodePlan> plan_;
  int64_t handle_;
};

} // namespace

void bind(py::module_& m) {
  py::class_<DeviceMemory>(m, "DeviceMemory", "Addresses in Metal buffers, for plans.")
      .def(py::init<>())
      .def(
          "address",
          [](DeviceMemory& memory, uintptr_t storage, uint64_t offset) {
            return memory.address(reinterpret_cast<const void*>(storage), offset);
          },
          py::arg("storage"), py::arg("offset"),
          "Address of a place `offset` bytes into the storage whose data_ptr() is `storage`.");
  py::class_<PlanHandle>(m, "MetalDecodePlan", "A decode plan that runs on MPS.")
      .def(py::init<const plan::Shape&, const std::optional<plan::Segment>&,
                    const std::vector<plan::Layer>&, const std::optional<plan::Head>&,
                    const DeviceMemory&, int64_t>(),
           py::arg("shape"), py::arg("embedding"), py::arg("layers"), py::arg("head"),
           py::arg("memory"), py::arg("context"))
      .def("release", &PlanHandle::release)
      .def_property_readonly("handle", &PlanHandle::handle)
      .def_property_readonly("weight_bytes",
                             [](const PlanHandle& p) { return p.plan().plan().weight_bytes(); })
      .def_property_readonly("workspace_bytes",
                             [](const PlanHandle& p) { return p.plan().workspace_bytes(); })
      .def_property_readonly("barriers",
                             [](const PlanHandle& p) { return p.plan().plan().barrier_before; })
      .def("describe", [](const PlanHandle& p) { return p.plan().plan().describe(); });
}

} // namespace q4metal::mps
