// The sink of decode plans without a GPU: what lies between two barriers runs last one first, as a
// concurrent encoder may let it. Two of them that touch the same memory, one of them writing, are
// an error: a barrier is missing.
#include "../../../csrc/metal/sink.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "export.h"
#include "plan_records.h"
#include "queue.h"

namespace standin {
namespace {

struct Statistics {
  int64_t submissions = 0, dispatches = 0, barriers = 0;
};

Statistics statistics;
std::vector<Record> last_records;

// What a bug in the encoder would do, planted by a test in each submission.
struct Slip {
  enum Kind { none, no_barrier, buffers_swapped, arguments_swapped, grid_cut } kind = none;
  int64_t number = 0; // of the barrier or the dispatch, from 0
  unsigned index = 0; // the first of two neighbouring buffers
};

Slip slip;

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
    if (slip.kind != Slip::none && slip.number == dispatches_++)
      spoil(groups_.back().back());
    ++statistics.dispatches;
  }

  void barrier() override {
    ++statistics.barriers;
    if (slip.kind != Slip::no_barrier || slip.number != barriers_++)
      groups_.emplace_back();
  }

  void execute() {
    last_records.clear();
    for (auto& group : groups_)
      execute(group);
  }

private:
  static void spoil(Call& call) {
    if (slip.kind == Slip::buffers_swapped)
      std::swap(call.arguments.at(slip.index), call.arguments.at(slip.index + 1));
    if (slip.kind == Slip::arguments_swapped) {
      auto& bytes = call.arguments.back().bytes;
      std::rotate(bytes.begin(), bytes.begin() + 4, bytes.begin() + 8);
    }
    if (slip.kind == Slip::grid_cut) { // by its last threadgroup
      const auto groups = [&](int axis) { return call.threads[axis] / call.group[axis]; };
      const int axis = groups(0) > 1 ? 0 : groups(1) > 1 ? 1 : 2;
      if (groups(axis) > 1)
        call.threads[axis] -= call.group[axis];
    }
  }

  Argument& argument(unsigned index) {
    if (next_.arguments.size() <= index)
      next_.arguments.resize(index + 1);
    next_.arguments[index] = {};
    next_.arguments[index].bound = true;
    return next_.arguments[index];
  }

  void execute(std::vector<Call>& group) {
    std::vector<std::pair<Access, std::string>> touched;
    const size_t first = last_records.size();
    for (auto call = group.rbegin(); call != group.rend(); ++call) {
      const auto accesses = run(*call);
      last_records.insert(last_records.begin() + first, {call->pipeline.name, accesses});
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
  int64_t barriers_ = 0, dispatches_ = 0;
};

} // namespace

const std::vector<Record>& records() { return last_records; }

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

// From now on each submission has this slip.
STANDIN_EXPORT void standin_plant(int kind, int64_t number, unsigned index) {
  standin::slip = {standin::Slip::Kind(kind), number, index};
}
