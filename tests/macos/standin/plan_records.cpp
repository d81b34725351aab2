#include "plan_records.h"

#include <pybind11/stl.h>

#include "../../../csrc/metal/decode_plan.h"

namespace standin {
namespace {

namespace py = pybind11;
using q4metal::plan::Step;

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

// The addresses of a step's norm and of what its matrices consist of: the plan's own, which
// DeviceMemory gave. There is none where it is null.
std::vector<uintptr_t> weights_of(const Step& step) {
  std::vector<uintptr_t> addresses{number(step.norm)};
  for (const auto& segment : step.segments) {
    addresses.push_back(number(segment.bias));
    if (const auto* packed = std::get_if<q4metal::PackedMatrix>(&segment.matrix))
      for (const void* part :
           {static_cast<const void*>(packed->weight), packed->scales, packed->biases})
        addresses.push_back(number(part));
    else
      addresses.push_back(number(std::get<q4metal::DenseMatrix>(segment.matrix).weight));
  }
  std::erase(addresses, 0);
  return addresses;
}

std::shared_ptr<q4metal::mps::DecodePlan> plan_of(int64_t handle) {
  auto plan = q4metal::mps::find_plan(handle);
  if (plan == nullptr)
    throw py::key_error("no decode plan has this handle");
  return plan;
}

py::list steps(int64_t handle) {
  const auto plan = plan_of(handle);
  const auto names = [&](const std::vector<int>& buffers) {
    std::vector<std::string> list;
    for (const int buffer : buffers)
      list.push_back(plan->plan().buffers[buffer].name);
    return list;
  };
  py::list all;
  for (const Step& step : plan->plan().steps)
    all.append(py::make_tuple(name_of(step.kind), step.layer, names(step.reads), names(step.writes),
                              weights_of(step)));
  return all;
}

// Name, address on the host, and bytes of a row.
py::list workspace(int64_t handle) {
  const auto plan = plan_of(handle);
  const uintptr_t base = number(bytes_of(plan->workspace()).data);
  const auto& buffers = plan->plan().buffers;
  py::list all;
  for (int i = 0; i < int(buffers.size()); ++i)
    if (!buffers[i].external)
      all.append(py::make_tuple(buffers[i].name, base + plan->encoder().offset_of(i),
                                buffers[i].bytes_per_row));
  return all;
}

py::list recorded() {
  py::list all;
  for (const Record& record : records()) {
    py::list accesses;
    for (const Access& a : record.accesses)
      accesses.append(py::make_tuple(number(a.begin), number(a.end), a.written));
    all.append(py::make_tuple(record.kernel, accesses));
  }
  return all;
}

} // namespace

void bind_records(py::module_& m) {
  m.def("host_address", [](uintptr_t handle, uint64_t offset) {
    return number(bytes_of(reinterpret_cast<const void*>(handle), offset).data);
  });
  m.def("plan_logits", [](int64_t handle) {
    const auto row = bytes_of(plan_of(handle)->logits(1));
    return std::make_pair(number(row.data), row.size);
  });
  m.def("plan_steps", &steps);
  m.def("plan_workspace", &workspace);
  m.def("plan_workspace_end", [](int64_t handle) {
    const auto range = bytes_of(plan_of(handle)->workspace());
    return number(range.data + range.size);
  });
  m.def("plan_records", &recorded);
}

} // namespace standin
