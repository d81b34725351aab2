// Runs decode plans of a tiny random model, for ThreadSanitizer to watch: every precision, 1 to 4
// threads, 1 to 8 rows, texts that cross the boundary of a block and of a split of the context, two
// callers at once. Every logit must have the bits that one thread gives. Then loops shared out by
// several callers with changing numbers of threads.
//
//   decode_passes             prints the number of barriers; exits with 1 if bits differ
//   decode_passes without I   leaves out the I-th barrier of the plan (from 0) and compares nothing
//
// No torch: csrc/plan, the executor, its threads and the kernels are compiled with this file.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/executor.h"
#include "../../csrc/cpu/threads.h"

namespace {

using namespace q4metal;

constexpr int64_t kHidden = 64, kIntermediate = 192, kHeads = 4, kKvHeads = 2, kHeadDim = 32;
constexpr int64_t kVocab = 320, kLayers = 2, kContext = 576;
constexpr int64_t kBlocks = kContext / plan::kBlockPositions; // of one text

// Memory of a model's tensors; addresses stay when more is added.
class Weights {
public:
  explicit Weights(unsigned seed) : random_(seed) {}

  const float* norm(int64_t size) {
    return fill(size, [](float x) { return 1 + 0.1f * x; });
  }

  plan::Segment packed(int64_t rows, int64_t columns, int bits, int group_size, bool bias = false) {
    const int64_t groups = rows * columns / group_size;
    const float spread = 2.0f / ((1 << bits) * std::sqrt(float(columns)));
    bytes_.push_back(std::make_unique<uint8_t[]>(rows * row_bytes(columns, bits)));
    uint8_t* codes = bytes_.back().get();
    for (int64_t i = 0; i < rows * row_bytes(columns, bits); ++i)
      codes[i] = uint8_t(random_());
    const float* scales = fill(groups, [&](float) { return spread; });
    const float* biases = fill(groups, [&](float x) { return spread * (x - (1 << bits) / 2); });
    return {PackedMatrix{codes, scales, biases, DType::f32, rows, columns, group_size, bits},
            bias ? norm(rows) : nullptr};
  }

  plan::Segment dense(int64_t rows, int64_t columns) {
    const float spread = 1 / std::sqrt(float(columns));
    return {DenseMatrix{fill(rows * columns, [&](float x) { return spread * x; }), DType::f32, rows,
                        columns},
            nullptr};
  }

private:
  template <typename F> const float* fill(int64_t size, const F& of) {
    std::normal_distribution<float> normal;
    floats_.push_back(std::make_unique<float[]>(size));
    for (int64_t i = 0; i < size; ++i)
      floats_.back()[i] = of(normal(random_));
    return floats_.back().get();
  }

  std::mt19937 random_;
  std::vector<std::unique_ptr<float[]>> floats_;
  std::vector<std::unique_ptr<uint8_t[]>> bytes_;
};

plan::Plan build_plan(Weights& weights, Precision precision, DType kv_dtype) {
  const int64_t query = kHeads * kHeadDim, kv = kKvHeads * kHeadDim;
  std::vector<plan::Layer> layers;
  for (int64_t i = 0; i < kLayers; ++i)
    layers.push_back({weights.norm(kHidden), weights.packed(query, kHidden, 4, 64, true),
                      weights.packed(kv, kHidden, 8, 32), weights.dense(kv, kHidden),
                      weights.packed(kHidden, query, 4, 128), weights.norm(kHidden),
                      weights.packed(kIntermediate, kHidden, 4, 32),
                      weights.packed(kIntermediate, kHidden, 6, 64),
                      weights.packed(kHidden, kIntermediate, 3, 32, true)});
  const plan::Segment embedding = weights.packed(kVocab, kHidden, 8, 64);
  const plan::Shape shape{kHidden,  kIntermediate, kHeads,
                          kKvHeads, kHeadDim,      kVocab,
                          kLayers,  1e-5f,         1 / std::sqrt(float(kHeadDim)),
                          kv_dtype, precision};
  return plan::build(shape, embedding, layers, plan::Head{weights.norm(kHidden), embedding});
}

constexpr int64_t kMostRows = 40; // of a pass

// Eight texts with blocks and inputs of their own, and what a pass gives for them.
class Texts {
public:
  explicit Texts(const plan::Shape& shape) {
    const int64_t blocks = plan::kMaxRows * kBlocks;
    const int64_t bytes = 2 * kLayers * blocks * kKvHeads * plan::kBlockPositions * kHeadDim *
                          size_of(shape.kv_dtype);
    cache_.assign(bytes, std::byte(0));
    slab_ = {cache_.data(), blocks};
    rope_.resize(kMostRows * 2 * kHeadDim);
    for (int64_t m = 0; m < kMostRows; ++m)
      for (int64_t i = 0; i < kHeadDim; ++i) {
        rope_[(2 * m + 0) * kHeadDim + i] = std::cos(float(m + i));
        rope_[(2 * m + 1) * kHeadDim + i] = std::sin(float(m + i));
      }
  }

  // Row m of a pass continues text m, or with `drafts` all rows continue the first text.
  const std::vector<float>& step(cpu::Executor& executor, int64_t rows, int64_t position,
                                 bool drafts, bool wants_tokens, int threads) {
    std::vector<int64_t> ids(rows), positions(rows), tokens(rows);
    std::vector<int32_t> tables(rows * kBlocks);
    for (int64_t m = 0; m < rows; ++m) {
      ids[m] = (17 * position + 5 * m) % kVocab;
      positions[m] = position + (drafts ? m : 13 * m % 40);
      for (int64_t i = 0; i < kBlocks; ++i)
        tables[m * kBlocks + i] = int32_t((drafts ? 0 : m) * kBlocks + i);
    }
    logits_.resize(rows * kVocab);
    executor.run({rows, ids.data(), nullptr, positions.data(), rope_.data(), tables.data(), kBlocks,
                  &slab_, slab_.blocks, logits_.data(), rows,
                  wants_tokens ? tokens.data() : nullptr},
                 threads);
    return logits_;
  }

private:
  std::vector<std::byte> cache_;
  cpu::KvSlab slab_;
  std::vector<float> rope_, logits_;
};

struct PassKind {
  int64_t rows, position;
  bool drafts, wants_tokens;
};

// Without greedy ids the last barrier would not be needed.
constexpr PassKind kPasses[] = {{1, 0, false, false},  {8, 1, false, true},  {4, 29, true, false},
                                {8, 60, false, false}, {3, 64, false, true}, {5, 508, true, false},
                                {2, 520, false, true}, {40, 470, true, true}};

std::vector<float> decode(cpu::Executor& executor, int threads) {
  Texts texts(executor.plan().shape);
  std::vector<float> all;
  for (const PassKind& p : kPasses) {
    const auto& logits =
        texts.step(executor, p.rows, p.position, p.drafts, p.wants_tokens, threads);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Whether each of 2 to 4 threads, and two callers who share the executor, get the bits of one.
bool is_independent_of_threads(Precision precision, DType kv_dtype) {
  Weights weights(1);
  cpu::Executor executor(build_plan(weights, precision, kv_dtype), kContext);
  const auto expected = decode(executor, 1);
  for (const float x : expected)
    if (!std::isfinite(x))
      return false;
  for (const int threads : {2, 3, 4})
    if (!same_bits(decode(executor, threads), expected))
      return false;
  std::vector<float> other;
  std::thread caller([&] { other = decode(executor, 2); });
  const auto own = decode(executor, 3);
  caller.join();
  return same_bits(own, expected) && same_bits(other, expected);
}

// Whether several callers of the team, each with its own number of threads, get every piece once.
bool is_shared_out_once() {
  constexpr int kCallers = 3, kLoops = 200;
  constexpr int64_t kSize = 1000;
  std::atomic<bool> once{true};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&once, caller] {
      std::vector<int> visits(kSize); // not atomic: pieces must not overlap
      for (int loop = 0; loop < kLoops; ++loop)
        cpu::parallel_pieces(1 + (loop + caller) % 4, kSize, 7, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            ++visits[i];
        });
      for (const int count : visits)
        if (count != kLoops)
          once = false;
    });
  for (auto& caller : callers)
    caller.join();
  return once;
}

// The sanitizer ends the program at the first race, so they are never all run where it finds one.
constexpr int kRounds = 30;

int run_without(int barrier) {
  Weights weights(1);
  plan::Plan plan = build_plan(weights, Precision::fast, DType::f16);
  for (size_t i = 0; i < plan.steps.size(); ++i)
    if (plan.barrier_before[i] && barrier-- == 0) {
      plan.barrier_before[i] = false;
      std::printf("without the barrier before step %zu, %s\n", i, name_of(plan.steps[i].kind));
      std::fflush(stdout); // a race ends the program at once
      cpu::Executor executor(std::move(plan), kContext);
      // On a busy machine one thread may take all pieces on both sides of the barrier.
      for (int round = 0; round < kRounds; ++round)
        for (const int threads : {2, 3, 4})
          decode(executor, threads);
      return 0;
    }
  std::fprintf(stderr, "there are no more barriers\n");
  return 2;
}

} // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], "without") == 0)
    return run_without(std::atoi(arguments[2]));
  for (const auto precision : {Precision::exact, Precision::fast, Precision::int8})
    if (!is_independent_of_threads(precision,
                                   precision == Precision::exact ? DType::f32 : DType::f16)) {
      std::printf("%s: the bits depend on threads, or are no numbers\n", name_of(precision));
      return 1;
    }
  if (!is_shared_out_once()) {
    std::printf("a piece of a loop was lost or done twice\n");
    return 1;
  }
  Weights weights(1);
  const auto barriers = build_plan(weights, Precision::fast, DType::f16).barrier_before;
  std::printf("%d barriers\n", int(std::count(barriers.begin(), barriers.end(), true)));
  return 0;
}
