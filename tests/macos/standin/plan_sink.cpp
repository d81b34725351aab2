// The sink of decode plans without a GPU: what lies between two barriers runs last one first, as a
// concurrent encoder may let it. Two of them that touch the same memory, one of them writing, are
// an error: a barrier is missing.
#include "../../../csrc/metal/sink.h"

#include <memory>
#include <stdexcept>

#include "export.h"
#include "kernels.h"
#include "queue.h"

namespace standin {
namespace {

struct Statistics {
  int64_t submissions = 0, dispatches = 0, barriers = 0;
};

Statistics statistics;
int64_t ignored_barrier = -1; // of each submission, counted from 0: a test removes it

class PlanSink final : public q4metal::mps::CommandSink {
public:
  void pipeline(const void* state) override {
    next_ = {};
    next_.pipeline = *static_cast<const Pipeline*>(state);
  }

  void buffer(unsigned index, q4metal::mps::Memory memory) override {
    argument(index).memory = bytes_of(memory.buffer, memory.offset);
  }

  void bytes(unsigned index, const void* data, size_t size) override {
    if (size == 0 || size > 4096)
      throw std::runtime_error("setBytes takes 1 to 4096 bytes, not " + std::to_string(size));
    const auto* bytes = static_cast<const std::byte*>(data);
    argument(index).bytes.assign(bytes, bytes + size);
  }

  void resident(q4metal::mps::Memory memory, bool) override {
    next_.resident.push_back(bytes_of(memory.buffer, memory.offset));
  }

  void dispatch(const q4metal::mps::Launch& launch) override {
    for (int axis = 0; axis < 3; ++axis) {
      next_.threads[axis] = launch.total(axis);
      next_.group[axis] = launch.threads[axis];
    }
    groups_.back().push_back(next_);
    ++statistics.dispatches;
  }

  void barrier() override {
    ++statistics.barriers;
    if (barriers_++ != ignored_barrier)
      groups_.emplace_back();
  }

  void execute() {
    for (auto& group : groups_)
      execute(group);
  }

private:
  Argument& argument(unsigned index) {
    if (next_.arguments.size() <= index)
      next_.arguments.resize(index + 1);
    next_.arguments[index] = {};
    next_.arguments[index].bound = true;
    return next_.arguments[index];
  }

  void execute(std::vector<Call>& group) {
    std::vector<std::pair<Access, std::string>> touched;
    for (auto call = group.rbegin(); call != group.rend(); ++call) {
      const auto accesses = run(*call);
      for (const Access& a : accesses)
        for (const auto& [b, other] : touched)
          if ((a.written || b.written) && a.begin < b.end && b.begin < a.end)
            throw std::runtime_error("no barrier between " + call->pipeline.name + " and " + other +
                                     ", which use the same memory");
      for (const Access& a : accesses)
        touched.emplace_back(a, call->pipeline.name);
    }
  }

  Call next_{};
  std::vector<std::vector<Call>> groups_{1}; // a barrier between each and the next
  int64_t barriers_ = 0;
};

} // namespace
} // namespace standin

namespace q4metal::mps {

void submit(const std::function<void(CommandSink&)>& encode) {
  ++standin::statistics.submissions;
  const auto sink = std::make_shared<standin::PlanSink>();
  encode(*sink);
  standin::enqueue([sink] { sink->execute(); });
}

std::optional<std::string> take_failure() { return std::nullopt; }

} // namespace q4metal::mps

// Submissions, dispatches and barriers of plans so far.
STANDIN_EXPORT void standin_plan_statistics(int64_t* three) {
  three[0] = standin::statistics.submissions;
  three[1] = standin::statistics.dispatches;
  three[2] = standin::statistics.barriers;
}

// From now on the barrier of this number (from 0) of each submission is not there; -1: all are.
STANDIN_EXPORT void standin_ignore_barrier(int64_t number) { standin::ignored_barrier = number; }
