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
             const DeviceMemory& memory, int64_t context, bool isolated,
             const std::vector<std::string>& kinds)
      : plan_(std::make_shared<DecodePlan>(
            chosen(plan::build(shape, embedding, layers, head), isolated, kinds), memory, context)),
        handle_(add_plan(plan_)) {}
  PlanHandle(const PlanHandle&) = delete;
  ~PlanHandle() { release(); }

  void release() {
    if (handle_ != 0)
      remove_plan(std::exchange(handle_, 0));
  }

  int64_t handle() const { return handle_; }
  const DecodePlan& plan() const { return *plan_; }

  // A step as Python sees it: kind, kernels, kernels of its other way, buffers read and written.
  // A buffer is (name, offset in the workspace or -1, bytes a row).
  using BufferView = std::tuple<std::string, int64_t, int64_t>;
  using StepView = std::tuple<std::string, std::string, std::string, std::vector<BufferView>,
                              std::vector<BufferView>>;
  std::vector<StepView> steps(int rows) const {
    const Encoder& encoder = plan_->encoder();
    const auto& plan = encoder.plan();
    const auto views = [&](const std::vector<int>& ids) {
      std::vector<BufferView> list;
      for (const int id : ids)
        list.emplace_back(plan.buffers[id].name, encoder.offset_of(id),
                          plan.buffers[id].bytes_per_row);
      return list;
    };
    std::vector<StepView> list;
    for (size_t i = 0; i < plan.steps.size(); ++i)
      list.emplace_back(plan::name_of(plan.steps[i].kind), encoder.kernel_names(i, rows, false),
                        encoder.kernel_names(i, rows, true), views(plan.steps[i].reads),
                        views(plan.steps[i].writes));
    return list;
  }

private:
  static plan::Plan chosen(const plan::Plan& whole, bool isolated,
                           const std::vector<std::string>& kinds) {
    const plan::Plan part = kinds.empty() ? whole : plan::only(whole, kinds);
    return isolated ? plan::isolate(part) : part;
  }

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
                    const DeviceMemory&, int64_t, bool, const std::vector<std::string>&>(),
           py::arg("shape"), py::arg("embedding"), py::arg("layers"), py::arg("head"),
           py::arg("memory"), py::arg("context"), py::arg("isolated") = false,
           py::arg("kinds") = std::vector<std::string>(),
           "`isolated`: each step on memory of its own (plan/plan.h). `kinds`: only such steps.")
      .def("release", &PlanHandle::release)
      .def_property_readonly("handle", &PlanHandle::handle)
      .def_property_readonly("weight_bytes",
                             [](const PlanHandle& p) { return p.plan().plan().weight_bytes(); })
      .def_property_readonly("workspace_bytes",
                             [](const PlanHandle& p) { return p.plan().workspace_bytes(); })
      .def_property_readonly("barriers",
                             [](const PlanHandle& p) { return p.plan().plan().barrier_before; })
      .def("steps", &PlanHandle::steps, py::arg("rows"),
           "(kind, kernels, kernels of its other way, buffers read, buffers written) of each step; "
           "a buffer is (name, offset in the workspace or -1, bytes a row).")
      .def("describe", [](const PlanHandle& p) { return p.plan().plan().describe(); });
}

} // namespace q4metal::mps
