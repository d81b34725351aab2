// A vocabulary has 50,000 to 150,000 tokens, a nucleus some dozens. So the logits are read once for
// the largest of each block, and once more, in vectors, for the sum that top_p and drawing among
// all tokens need; beyond that only blocks with a token that may stay are looked at.
#include "token_draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"

namespace q4metal::cpu {
namespace {

constexpr int64_t kBlock = 256;
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Candidate {
  float logit;
  int64_t token;
  double weight; // where top_p asks for it: relative to the likeliest token's
};

// Philox4x32-10 (Salmon et al., 2011), the first of its four numbers; as in plan_sample.metal.
uint32_t philox(uint64_t token, const Noise& noise) {
  uint32_t x = uint32_t(token), y = uint32_t(noise.position);
  uint32_t z = uint32_t(noise.position >> 32), w = 0;
  uint32_t key0 = uint32_t(noise.seed), key1 = uint32_t(noise.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * x, second = 0xCD9E8D57ull * z;
    x = uint32_t(second >> 32) ^ y ^ key0;
    y = uint32_t(second);
    z = uint32_t(first >> 32) ^ w ^ key1;
    w = uint32_t(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

// -log(-log(u)) of a u strictly between 0 and 1: 23 random bits and a half.
double gumbel(uint32_t random) {
  return -std::log(-std::log((double(random >> 9) + 0.5) / 8388608.0));
}

// What that lies between, a little widened: of u = 2^-24 and 1 - 2^-24.
constexpr double kMostNoise = 16.7;
constexpr float kNoiseRange = 19.6f;

class Draw {
public:
  Draw(const float* logits, int64_t size, const Sampling& sampling)
      : logits_(logits), size_(size), sampling_(sampling),
        temperature_(std::max(float(sampling.temperature), std::numeric_limits<float>::min())) {}

  int64_t token(double random) {
    if (!find_largest())
      return -1;
    if (!has_filters())
      return draw_of_all(random);
    filter();
    if (has_top_k())
      keep_top_k();
    return draw_of_found(random);
  }

  int64_t token(const Noise& noise) {
    if (!find_largest())
      return -1;
    if (has_filters())
      filter();
    else
      gather(most_ - kNoiseRange * temperature_);
    if (has_top_k())
      keep_from(smallest_of_top_k());
    double best = -std::numeric_limits<double>::infinity();
    int64_t token = -1;
    for (const Candidate& candidate : found_) {
      const double scaled = (double(candidate.logit) - most_) / temperature_;
      if (scaled + kMostNoise <= best) // most of a whole vocabulary
        continue;
      const double value = scaled + gumbel(philox(uint64_t(candidate.token), noise));
      if (value > best) {
        best = value;
        token = candidate.token;
      }
    }
    return token;
  }

private:
  bool has_top_k() const { return 0 < sampling_.top_k && sampling_.top_k < size_; }
  bool has_top_p() const { return 0 < sampling_.top_p && sampling_.top_p < 1; }
  bool has_filters() const { return has_top_k() || has_top_p() || sampling_.min_p > 0; }

  // Finds what the filters leave, and more equals and others than top_k.
  void filter() {
    const float floor = sampling_.min_p > 0 ? most_ + float(std::log(sampling_.min_p)) : kNone;
    const double wanted = has_top_p() ? sampling_.top_p * sum_of_weights(1, nullptr) : 0;
    if (has_top_k()) {
      gather(std::max(floor, bound_of_top_k()));
    } else if (has_top_p()) {
      // Logits further below the largest one count less and less: nearly always the first do.
      for (float depth = 8;; depth *= 2) {
        gather(std::max(floor, most_ - depth));
        if (most_ - depth <= floor || int64_t(found_.size()) == size_ ||
            weight_of(found_.begin(), found_.end()) >= wanted)
          break;
      }
    } else {
      gather(floor);
    }
    if (has_top_p())
      keep_from(last_of_nucleus(wanted));
  }

  // The largest logit of each block and of all. Whether a token can be drawn.
  bool find_largest() {
    constexpr int kLanes = 16; // side by side, which the compiler puts into vectors
    int32_t has_nan = 0;
    for (int64_t begin = 0; begin < size_; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, size_);
      float largest[kLanes];
      int32_t nan[kLanes] = {};
      std::fill_n(largest, kLanes, kNone);
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
          const float x = logits_[i + lane];
          largest[lane] = x > largest[lane] ? x : largest[lane];
          nan[lane] |= x != x;
        }
      for (; i < end; ++i) {
        largest[0] = std::max(largest[0], logits_[i]);
        nan[0] |= logits_[i] != logits_[i];
      }
      block_most_.push_back(*std::max_element(largest, largest + kLanes));
      for (int lane = 0; lane < kLanes; ++lane)
        has_nan |= nan[lane];
    }
    most_ = *std::max_element(block_most_.begin(), block_most_.end());
    return !has_nan && std::isfinite(most_);
  }

  // Of e^((logit - most) / temperature); `blocks` gets those of each block.
  double sum_of_weights(float temperature, std::vector<float>* blocks) const {
    const auto sum_exp = kernels().vector.sum_exp;
    double total = 0;
    for (int64_t begin = 0; begin < size_; begin += kBlock) {
      // Below that the kernel's e^x stays at e^-87, also where no token may be drawn.
      const bool counts = (block_most_[begin / kBlock] - most_) / temperature > -87;
      const int64_t count = std::min(kBlock, size_ - begin);
      const float sum = counts ? sum_exp(logits_ + begin, count, most_, temperature) : 0;
      total += sum;
      if (blocks)
        blocks->push_back(sum);
    }
    return total;
  }

  // The top_k-th block's largest logit: so many tokens at least are as likely.
  float bound_of_top_k() const {
    if (int64_t(block_most_.size()) <= sampling_.top_k)
      return kNone;
    auto sorted = block_most_;
    const auto kth = sorted.begin() + (sampling_.top_k - 1);
    std::nth_element(sorted.begin(), kth, sorted.end(), std::greater<>());
    return *kth;
  }

  // All tokens from `bound` on, by id.
  void gather(float bound) {
    const bool weighs = has_top_p();
    found_.clear();
    for (size_t block = 0; block < block_most_.size(); ++block) {
      if (block_most_[block] < bound)
        continue;
      const int64_t begin = int64_t(block) * kBlock;
      for (int64_t i = begin; i < std::min(begin + kBlock, size_); ++i)
        if (logits_[i] >= bound)
          found_.push_back({logits_[i], i, weighs ? std::exp(double(logits_[i]) - most_) : 0});
    }
  }

  template <typename Iterator> static double weight_of(Iterator begin, Iterator end) {
    double sum = 0;
    for (; begin != end; ++begin)
      sum += begin->weight;
    return sum;
  }

  // The smallest logit of those above which less than `wanted` lies, by halving as for a median.
  float last_of_nucleus(double wanted) const {
    std::vector<Candidate> left = found_;
    double above = 0;
    auto begin = left.begin(), end = left.end();
    float last = most_;
    while (begin != end) {
      const float a = begin->logit, b = begin[(end - begin) / 2].logit, c = end[-1].logit;
      const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
      const auto equal = std::partition(begin, end, [=](auto& x) { return x.logit > pivot; });
      const auto below = std::partition(equal, end, [=](auto& x) { return x.logit == pivot; });
      const double larger = weight_of(begin, equal);
      if (above + larger >= wanted) { // the pivot is outside
        end = equal;
        continue;
      }
      last = pivot;
      above += larger + weight_of(equal, below);
      if (above >= wanted)
        break;
      begin = below;
    }
    return last;
  }

  void keep_from(float bound) {
    std::erase_if(found_, [=](const Candidate& x) { return x.logit < bound; });
  }

  float smallest_of_top_k() const {
    if (int64_t(found_.size()) <= sampling_.top_k)
      return kNone;
    auto sorted = found_;
    const auto kth = sorted.begin() + (sampling_.top_k - 1);
    std::nth_element(sorted.begin(), kth, sorted.end(),
                     [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
    return kth->logit;
  }

  void keep_top_k() {
    const float bound = smallest_of_top_k();
    int64_t equals = sampling_.top_k;
    for (const Candidate& candidate : found_)
      equals -= candidate.logit > bound;
    std::erase_if(found_, [&](const Candidate& x) {
      return x.logit < bound || (x.logit == bound && equals-- <= 0);
    });
  }

  double tempered(float logit) const { return std::exp((double(logit) - most_) / temperature_); }

  // Which of `count` weights `place` lies within.
  template <typename WeightOf>
  static int64_t index_at(double place, int64_t count, const WeightOf& weight_of) {
    int64_t last = 0; // one with a weight, should rounding lead beyond the last of them
    for (int64_t i = 0; i < count; ++i) {
      const double own = weight_of(i);
      if (own > 0)
        last = i;
      if (place < own)
        return i;
      place -= own;
    }
    return last;
  }

  int64_t draw_of_all(double random) const {
    std::vector<float> blocks;
    double place = random * sum_of_weights(temperature_, &blocks);
    size_t block = 0, last = 0;
    for (; block < blocks.size() && place >= blocks[block]; ++block) {
      place -= blocks[block];
      last = blocks[block] > blocks[last] ? block : last;
    }
    if (block == blocks.size())
      block = last;
    const int64_t begin = int64_t(block) * kBlock;
    return begin + index_at(place, std::min(kBlock, size_ - begin),
                            [&](int64_t i) { return tempered(logits_[begin + i]); });
  }

  int64_t draw_of_found(double random) {
    for (Candidate& candidate : found_)
      candidate.weight = tempered(candidate.logit);
    const double place = random * weight_of(found_.begin(), found_.end());
    return found_[index_at(place, int64_t(found_.size()),
                           [&](int64_t i) { return found_[i].weight; })]
        .token;
  }

  const float* logits_;
  const int64_t size_;
  const Sampling sampling_;
  const float temperature_;
  float most_ = kNone;
  std::vector<float> block_most_;
  std::vector<Candidate> found_; // by id
};

} // namespace

int64_t draw_token(const float* logits, int64_t size, const Sampling& sampling, double random) {
  return size < 1 ? -1 : Draw(logits, size, sampling).token(random);
}

int64_t draw_token(const float* logits, int64_t size, const Sampling& sampling,
                   const Noise& noise) {
  return size < 1 ? -1 : Draw(logits, size, sampling).token(noise);
}

} // namespace q4metal::cpu
