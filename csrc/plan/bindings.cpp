#include "bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <utility>

#include "../cpu/executor_registry.h"
#include "plan.h"

namespace q4metal::plan {
namespace {

namespace py = pybind11;

template <typename T> const T* at(uintptr_t address) { return reinterpret_cast<const T*>(address); }

Segment packed_segment(uintptr_t weight, uintptr_t scales, uintptr_t biases, DType scales_dtype,
                       int64_t out_features, int64_t in_features, int group_size, int bits,
                       uintptr_t bias) {
  return {PackedMatrix{at<uint8_t>(weight), at<void>(scales), at<void>(biases), scales_dtype,
                       out_features, in_features, group_size, bits},
          at<float>(bias)};
}

Segment dense_segment(uintptr_t weight, DType dtype, int64_t out_features, int64_t in_features,
                      uintptr_t bias) {
  return {DenseMatrix{at<void>(weight), dtype, out_features, in_features}, at<float>(bias)};
}

// Owns an executor through its handle.
class DecodePlan {
public:
  DecodePlan(const Shape& shape, const std::optional<Segment>& embedding,
             const std::vector<Layer>& layers, const std::optional<Head>& head, int64_t context)
      : executor_(std::make_shared<cpu::Executor>(build(shape, embedding, layers, head), context)),
        handle_(cpu::add_executor(executor_)) {}
  DecodePlan(const DecodePlan&) = delete;
  ~DecodePlan() { release(); }

  // Ends the handle and waits for passes under way; they need no Python lock.
  void release() {
    if (handle_ != 0)
      cpu::remove_executor(std::exchange(handle_, 0));
  }

  int64_t handle() const { return handle_; }
  const Plan& plan() const { return executor_->plan(); }
  int64_t workspace_bytes() const { return executor_->workspace_bytes(); }

  // (earlier step, later step, buffer, kind) of what these barriers would leave open.
  std::vector<std::tuple<int, int, std::string, std::string>>
  hazards(const std::vector<bool>& barriers) const {
    if (barriers.size() != plan().steps.size())
      throw std::invalid_argument("there must be one barrier flag a step, " +
                                  std::to_string(plan().steps.size()));
    std::vector<std::tuple<int, int, std::string, std::string>> found;
    for (const Hazard& h : find_hazards(plan().steps, barriers))
      found.emplace_back(h.earlier, h.later, plan().buffers[h.buffer].name, h.kind);
    return found;
  }

private:
  std::shared_ptr<cpu::Executor> executor_;
  int64_t handle_;
};

} // namespace

void bind(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::f32)
      .value("float16", DType::f16)
      .value("bfloat16", DType::bf16);
  py::enum_<Precision>(m, "Precision")
      .value("exact", Precision::exact)
      .value("fast", Precision::fast)
      .value("int8", Precision::int8);
  py::class_<Segment>(m, "Segment");
  m.def("packed_segment", &packed_segment, py::arg("weight"), py::arg("scales"), py::arg("biases"),
        py::arg("scales_dtype"), py::arg("out_features"), py::arg("in_features"),
        py::arg("group_size"), py::arg("bits"), py::arg("bias"));
  m.def("dense_segment", &dense_segment, py::arg("weight"), py::arg("dtype"),
        py::arg("out_features"), py::arg("in_features"), py::arg("bias"));
  py::class_<Layer>(m, "Layer")
      .def(py::init([](uintptr_t input_norm, Segment q, Segment k, Segment v, Segment output,
                       uintptr_t post_norm, Segment gate, Segment up, Segment down) {
             return Layer{at<float>(input_norm), q,    k,  v,   output,
                          at<float>(post_norm),  gate, up, down};
           }),
           py::arg("input_norm"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("output"),
           py::arg("post_norm"), py::arg("gate"), py::arg("up"), py::arg("down"));
  py::class_<Head>(m, "Head").def(py::init([](uintptr_t norm, Segment matrix) {
                                    return Head{at<float>(norm), std::move(matrix)};
                                  }),
                                  py::arg("norm"), py::arg("matrix"));
  py::class_<Shape>(m, "Shape")
      .def(py::init([](int64_t hidden_size, int64_t intermediate_size, int64_t heads,
                       int64_t kv_heads, int64_t head_dim, int64_t vocab_size, int64_t layers,
                       float norm_eps, float attention_scale, DType kv_dtype, Precision precision) {
             return Shape{hidden_size,     intermediate_size, heads,    kv_heads,
                          head_dim,        vocab_size,        layers,   norm_eps,
                          attention_scale, kv_dtype,          precision};
           }),
           py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("vocab_size"), py::arg("layers"),
           py::arg("norm_eps"), py::arg("attention_scale"), py::arg("kv_dtype"),
           py::arg("precision"));
  py::class_<DecodePlan>(
      m, "DecodePlan",
      "Steps, buffers and barriers of a model's or a stage's decoding, and what runs "
      "them. Without embedding or head it takes or gives residual rows.")
      .def(py::init<const Shape&, const std::optional<Segment>&, const std::vector<Layer>&,
                    const std::optional<Head>&, int64_t>(),
           py::arg("shape"), py::arg("embedding"), py::arg("layers"), py::arg("head"),
           py::arg("context"))
      .def("release", &DecodePlan::release, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("handle", &DecodePlan::handle)
      .def_property_readonly("weight_bytes",
                             [](const DecodePlan& p) { return p.plan().weight_bytes(); })
      .def_property_readonly("has_packed_layers",
                             [](const DecodePlan& p) { return p.plan().has_packed_layers(); })
      .def_property_readonly("workspace_bytes", &DecodePlan::workspace_bytes)
      .def_property_readonly("barriers",
                             [](const DecodePlan& p) { return p.plan().barrier_before; })
      .def("hazards", &DecodePlan::hazards, py::arg("barriers"))
      .def("describe", [](const DecodePlan& p) { return p.plan().describe(); });
}

} // namespace q4metal::plan
