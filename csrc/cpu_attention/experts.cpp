// A layer's experts for few tokens, by all threads of a pool.

#include "experts.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace moe::attention {
namespace {

constexpr int kRows = 32;    // of weights that a thread takes at a time
constexpr int kTokens = 16;  // that meet them at a time: what these bring along should stay in L2
constexpr int kStride = kRows + kScorePadding;

int padded(int dims) { return (dims + kHeadDimUnit - 1) / kHeadDimUnit * kHeadDimUnit; }
int blocks(int rows) { return (rows + kRows - 1) / kRows; }

// Calls body(item, thread) for each of `count` items.
template <class F>
void share_out(ThreadPool& pool, int64_t count, const F& body) {
  struct Job {
    const F& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } job{body, count, {}};
  pool.run([](void* context, int thread) {
    auto& j = *static_cast<Job*>(context);
    for (int64_t item; (item = j.next.fetch_add(1, std::memory_order_relaxed)) < j.count;) j.body(item, thread);
  }, &job);
}

}  // namespace

// A call, and where its steps leave things for each other.
struct Experts::Running {
  Experts& self;
  const Kernels& kernels;
  const ExpertsCall& call;
  int type = static_cast<int>(call.dtype);
  int64_t element = call.dtype == DType::f32 ? 4 : 2;
  int hidden = padded(call.hidden), rows = padded(call.rows);
  int64_t num_slots = static_cast<int64_t>(self.tokens_.size());

  // Rows of slots that follow each other are contiguous.
  float* x(int64_t slot) const { return self.x_.data() + slot * hidden; }
  char* inner(int page, int64_t slot) const {
    return reinterpret_cast<char*>(self.inner_.data()) + (page * num_slots + slot) * rows * element;
  }
  float* kept_inner(int page, int64_t slot) const { return self.kept_inner_.data() + (page * num_slots + slot) * rows; }
  float* output(int64_t slot) const { return self.outputs_.data() + slot * hidden; }
  float* sums(int thread) const { return self.sums_.data() + int64_t{2} * kTokens * kStride * thread; }

  // Row `row` of a page's gate and up, or of its down.
  const char* gate(const Met& met, int page, int64_t row) const { return weights(met, page) + row * call.hidden * element; }
  const char* down(const Met& met, int page, int64_t row) const {
    return weights(met, page) + (int64_t{2} * call.rows * call.hidden + row * call.rows) * element;
  }
  const char* weights(const Met& met, int page) const {
    return static_cast<const char*>(call.pages[int64_t{met.expert} * call.pages_per_expert + page]);
  }

  // Calls body(first slot, number) for tokens that meet rows at once: none is by itself unless it is the only one.
  template <class F>
  static void for_tokens(const Met& met, F body) {
    const int64_t turns = (met.count + kTokens - 1) / kTokens;
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t begin = met.count * turn / turns, end = met.count * (turn + 1) / turns;
      body(met.first + begin, static_cast<int>(end - begin));
    }
  }

  void keep_x(int64_t slot) const {
    const auto at = static_cast<size_t>(slot);
    const char* from = static_cast<const char*>(call.x) + self.tokens_[at] * call.x_stride * element;
    kernels.keep[type](from, call.hidden, self.is_alone_[at], x(slot));
  }

  // Some rows of a page: silu(gate x) * up x.
  void enter(const Met& met, int page, int block, float* gates) const {
    const int first = block * kRows, count = std::min(kRows, call.rows - first);
    float* ups = gates + kTokens * kStride;
    for_tokens(met, [&](int64_t slot, int tokens) {
      kernels.multiply[type]({gate(met, page, first), count, call.hidden, x(slot), hidden, tokens, gates, kStride});
      kernels.multiply[type](
          {gate(met, page, int64_t{call.rows} + first), count, call.hidden, x(slot), hidden, tokens, ups, kStride});
      for (int i = 0; i < tokens; ++i)
        kernels.activate[type](gates + i * kStride, ups + i * kStride, count, inner(page, slot + i) + first * element);
    });
  }

  void keep_inner(int page, int64_t slot) const {
    kernels.keep[type](inner(page, slot), call.rows, self.is_alone_[static_cast<size_t>(slot)], kept_inner(page, slot));
  }

  // Some dimensions: down times what all pages gave.
  void leave(const Met& met, int block, float* sums) const {
    const int first = block * kRows, count = std::min(kRows, call.hidden - first);
    for_tokens(met, [&](int64_t slot, int tokens) {
      for (int page = 0; page < call.pages_per_expert; ++page) {
        kernels.multiply[type](
            {down(met, page, first), count, call.rows, kept_inner(page, slot), rows, tokens, sums, kStride});
        for (int i = 0; i < tokens; ++i) {
          const float* from = sums + i * kStride;
          float* to = output(slot + i) + first;
          for (int d = 0; d < count; ++d) to[d] = page == 0 ? from[d] : to[d] + from[d];
        }
      }
    });
  }

  void add_up(int64_t token) const {
    const int64_t pair = token * call.top_k;
    char* out = static_cast<char*>(call.out) + token * call.out_stride * element;
    kernels.add_up[type]({self.outputs_.data(), hidden, self.slots_.data() + pair, call.weights + pair, call.top_k,
                          call.hidden, out});
  }
};

void Experts::run(ThreadPool& pool, const Kernels& kernels, const ExpertsCall& call) {
  sort(call);
  const Running running{*this, kernels, call};
  const auto slots = static_cast<size_t>(running.num_slots), pages = static_cast<size_t>(call.pages_per_expert);
  const auto rows = static_cast<size_t>(running.rows), hidden = static_cast<size_t>(running.hidden);
  x_.reserve(slots * hidden);
  outputs_.reserve(slots * hidden);
  inner_.reserve(slots * pages * rows * static_cast<size_t>(running.element) / sizeof(float));
  kept_inner_.reserve(slots * pages * rows);
  sums_.reserve(size_t{2} * kTokens * kStride * static_cast<size_t>(pool.num_threads()));

  // A step begins when all of the one before is there.
  const auto num_met = static_cast<int64_t>(met_.size());
  const auto met = [this](int64_t i) -> const Met& { return met_[static_cast<size_t>(i)]; };
  share_out(pool, running.num_slots, [&](int64_t slot, int) { running.keep_x(slot); });
  const int of_page = blocks(call.rows), of_expert = of_page * call.pages_per_expert, of_down = blocks(call.hidden);
  share_out(pool, num_met * of_expert, [&](int64_t item, int thread) {
    const int at = static_cast<int>(item % of_expert);
    running.enter(met(item / of_expert), at / of_page, at % of_page, running.sums(thread));
  });
  share_out(pool, running.num_slots * call.pages_per_expert, [&](int64_t item, int) {
    running.keep_inner(static_cast<int>(item / running.num_slots), item % running.num_slots);
  });
  share_out(pool, num_met * of_down, [&](int64_t item, int thread) {
    running.leave(met(item / of_down), static_cast<int>(item % of_down), running.sums(thread));
  });
  share_out(pool, call.num_tokens, [&](int64_t token, int) { running.add_up(token); });
}

void Experts::sort(const ExpertsCall& call) {
  const auto num_pairs = static_cast<size_t>(call.num_tokens * call.top_k);
  std::vector<int64_t> front(static_cast<size_t>(call.num_experts));
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t id = call.ids[pair];
    if (id < 0 || id >= call.num_experts)
      throw std::invalid_argument("token " + std::to_string(static_cast<int64_t>(pair) / call.top_k) + " goes to expert " +
                                  std::to_string(id) + "; there are " + std::to_string(call.num_experts));
    ++front[static_cast<size_t>(id)];
  }
  met_.clear();
  slots_.resize(num_pairs);
  tokens_.resize(num_pairs);
  is_alone_.resize(num_pairs);
  int64_t first = 0;
  for (size_t expert = 0; expert < front.size(); ++expert) {
    const int64_t count = front[expert];
    front[expert] = first;
    if (count > 0) met_.push_back({static_cast<int>(expert), first, count});
    for (int64_t slot = first; slot < first + count; ++slot) is_alone_[static_cast<size_t>(slot)] = count == 1;
    first += count;
  }
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t slot = front[static_cast<size_t>(call.ids[pair])]++;
    slots_[pair] = slot;
    tokens_[static_cast<size_t>(slot)] = static_cast<int64_t>(pair) / call.top_k;
  }
}

}  // namespace moe::attention
