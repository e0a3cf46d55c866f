// A layer's experts for few tokens, by all threads of a pool.

#include "experts.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace moe::cpu {
namespace {

// Rows of weights that a thread takes at a time, and tokens of a group, which meet them together: with rows of gate and
// up both should stay in half of an L2, as cores may have two threads.
constexpr int kRows = 32;
constexpr int kTokens = 32;
constexpr int kStride = kRows + kScorePadding;

int padded(int dims) { return (dims + kHeadDimUnit - 1) / kHeadDimUnit * kHeadDimUnit; }
int blocks(int rows) { return (rows + kRows - 1) / kRows; }

// Calls body(item, thread) for each of `count` items.
template <class F>
void share_out(ThreadPool& pool, const Kernels& kernels, int64_t count, const F& body) {
  struct Job {
    const Kernels& kernels;
    const F& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } job{kernels, body, count, {}};
  pool.run([](void* context, int thread) {
    auto& j = *static_cast<Job*>(context);
    j.kernels.enter();
    for (int64_t item; (item = j.next.fetch_add(1, std::memory_order_relaxed)) < j.count;) j.body(item, thread);
    j.kernels.leave();
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
  float* laid_out_inner(int page, int64_t slot) const {
    return self.laid_out_inner_.data() + (page * num_slots + slot) * rows;
  }
  float* output(int64_t slot) const { return self.outputs_.data() + slot * hidden; }
  float* sums(int thread) const { return self.sums_.data() + int64_t{2} * kTokens * kStride * thread; }

  // From row `row` of a page's gate and up, or of its down.
  const char* gate(const Met& met, int page, int64_t row) const {
    return weights(met, page) + row * call.hidden * element;
  }
  const char* down(const Met& met, int page, int64_t row) const {
    return weights(met, page) + (int64_t{2} * call.rows * call.hidden + row * call.rows) * element;
  }
  const char* weights(const Met& met, int page) const {
    return static_cast<const char*>(call.pages[int64_t{met.expert} * call.pages_per_expert + page]);
  }

  void lay_out_x(const Group& group) const {
    kernels.lay_out[type]({call.x, call.x_stride, &self.tokens_[static_cast<size_t>(group.first)], group.count,
                           call.hidden, hidden, x(group.first)});
  }

  // Some rows of a page: silu(gate x) * up x.
  void enter(const Met& met, int page, int block, float* gates) const {
    const int first = block * kRows, count = std::min(kRows, call.rows - first);
    float* ups = gates + kTokens * kStride;
    for (size_t at = met.first; at < met.end; ++at) {
      const Group& group = self.groups_[at];
      const auto multiply = [&](int64_t row, float* sums) {
        kernels.multiply[type]({gate(met, page, row), count, call.hidden, hidden, x(group.first), group.count,
                                at == met.first, sums, kStride});
      };
      multiply(first, gates);
      multiply(int64_t{call.rows} + first, ups);
      for (int i = 0; i < group.count; ++i)
        kernels.activate[type](gates + i * kStride, ups + i * kStride, count,
                               inner(page, group.first + i) + first * element);
    }
  }

  void lay_out_inner(int page, const Group& group) const {
    kernels.lay_out[type]({inner(page, group.first), rows, nullptr, group.count, call.rows, rows,
                           laid_out_inner(page, group.first)});
  }

  // Some dimensions: down times what all pages gave.
  void leave(const Met& met, int block, float* sums) const {
    const int first = block * kRows, count = std::min(kRows, call.hidden - first);
    for (size_t at = met.first; at < met.end; ++at) {
      const Group& group = self.groups_[at];
      for (int page = 0; page < call.pages_per_expert; ++page) {
        kernels.multiply[type]({down(met, page, first), count, call.rows, rows, laid_out_inner(page, group.first),
                                group.count, at == met.first, sums, kStride});
        for (int i = 0; i < group.count; ++i) {
          const float* from = sums + i * kStride;
          float* to = output(group.first + i) + first;
          for (int d = 0; d < count; ++d) to[d] = page == 0 ? from[d] : to[d] + from[d];
        }
      }
    }
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
  laid_out_inner_.reserve(slots * pages * rows);
  sums_.reserve(size_t{2} * kTokens * kStride * static_cast<size_t>(pool.num_threads()));

  // A step begins when all of the one before is there.
  const auto share_out = [&](int64_t count, const auto& body) { cpu::share_out(pool, kernels, count, body); };
  const auto num_groups = static_cast<int64_t>(groups_.size()), num_met = static_cast<int64_t>(met_.size());
  const int of_page = blocks(call.rows), of_expert = of_page * call.pages_per_expert, of_down = blocks(call.hidden);
  share_out(num_groups, [&](int64_t item, int) { running.lay_out_x(groups_[static_cast<size_t>(item)]); });
  share_out(num_met * of_expert, [&](int64_t item, int thread) {
    const int at = static_cast<int>(item % of_expert);
    running.enter(met_[static_cast<size_t>(item / of_expert)], at / of_page, at % of_page, running.sums(thread));
  });
  share_out(num_groups * call.pages_per_expert, [&](int64_t item, int) {
    running.lay_out_inner(static_cast<int>(item / num_groups), groups_[static_cast<size_t>(item % num_groups)]);
  });
  share_out(num_met * of_down, [&](int64_t item, int thread) {
    running.leave(met_[static_cast<size_t>(item / of_down)], static_cast<int>(item % of_down), running.sums(thread));
  });
  share_out(call.num_tokens, [&](int64_t token, int) { running.add_up(token); });
}

size_t Experts::num_bytes() const {
  return x_.num_bytes() + inner_.num_bytes() + laid_out_inner_.num_bytes() + outputs_.num_bytes();
}

void Experts::sort(const ExpertsCall& call) {
  const auto num_pairs = static_cast<size_t>(call.num_tokens * call.top_k);
  std::vector<int64_t> front(static_cast<size_t>(call.num_experts));
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t id = call.ids[pair];
    if (id < 0 || id >= call.num_experts)
      throw std::invalid_argument("token " + std::to_string(static_cast<int64_t>(pair) / call.top_k) +
                                  " goes to expert " + std::to_string(id) + "; there are " +
                                  std::to_string(call.num_experts));
    ++front[static_cast<size_t>(id)];
  }
  met_.clear();
  groups_.clear();
  slots_.resize(num_pairs);
  tokens_.resize(num_pairs);
  int64_t first = 0;
  for (size_t expert = 0; expert < front.size(); ++expert) {
    const int64_t count = front[expert];
    front[expert] = first;
    // Of about one size: what is laid out for one token is so by itself.
    const int64_t turns = (count + kTokens - 1) / kTokens;
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t begin = count * turn / turns, end = count * (turn + 1) / turns;
      groups_.push_back({first + begin, static_cast<int>(end - begin)});
    }
    const size_t end = groups_.size();
    if (count > 0) met_.push_back({static_cast<int>(expert), end - static_cast<size_t>(turns), end});
    first += count;
  }
  for (size_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t slot = front[static_cast<size_t>(call.ids[pair])]++;
    slots_[pair] = slot;
    tokens_[static_cast<size_t>(slot)] = static_cast<int64_t>(pair) / call.top_k;
  }
}

}  // namespace moe::cpu
