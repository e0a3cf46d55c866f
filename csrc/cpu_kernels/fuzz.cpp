// Random calls against a naive reference in double, by every instruction set of this CPU; made for sanitizers.
//
//     fuzz_cpu_kernels SECONDS [FIRST_SEED]
//
// Each buffer has exactly the size it must have, so that reading past its end is an error, and cache slots without a
// token hold NaN, so that using one shows. On failure the seed is printed; it alone makes the call again.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu.h"

using namespace moe::cpu;

namespace {

#include "number.inc"

constexpr double kRounding[kNumDTypes] = {0x1p-8, 0x1p-11, 0x1p-24};

// Sanitizers need not watch the reference, which would take most of the time then.
#define MOE_UNWATCHED __attribute__((noinline, no_sanitize("address", "undefined", "thread")))

MOE_UNWATCHED double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

MOE_UNWATCHED void add(double weight, const double* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += weight * from[i];
}

struct Random {
  explicit Random(uint64_t seed) : bits(seed) {
    for (float& x : normals) x = std::normal_distribution<float>()(bits);
  }
  std::mt19937_64 bits;
  float normals[1021];  // again and again, as drawing them takes long; a prime, so that rows differ
  size_t num_drawn = 0;
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(bits); }
  bool chance(double p) { return std::uniform_real_distribution<>()(bits) < p; }
  float normal() { return normals[num_drawn++ % 1021]; }
  // Mostly small.
  int about(int high) {
    return static_cast<int>(std::exp2(std::uniform_real_distribution<>(0, std::log2(high + 0.99))(bits)));
  }
};

// Room for a call's output, from `offset` elements after a cache line's begin to the end of the last row, and no more.
template <class T>
struct Output {
  Output(const Call& call, size_t offset)
      : width(static_cast<size_t>(call.num_heads * call.head_dim)),
        stride(static_cast<size_t>(call.out_stride)),
        num_rows(static_cast<size_t>(call.batch.num_tokens)) {
    const size_t size = offset + (num_rows == 0 ? 0 : (num_rows - 1) * stride + width);
    memory_.reset(static_cast<T*>(::operator new(size * sizeof(T), kLine)));
    std::memset(static_cast<void*>(memory_.get()), kUntouched, size * sizeof(T));
    rows = memory_.get() + offset;
  }

  bool has_gaps_untouched() const {
    for (size_t row = 0; row + 1 < num_rows; ++row) {
      const auto* gap = reinterpret_cast<const unsigned char*>(rows + row * stride + width);
      for (size_t i = 0; i < (stride - width) * sizeof(T); ++i)
        if (gap[i] != kUntouched) return false;
    }
    return true;
  }

  size_t width, stride, num_rows;
  T* rows;

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr unsigned char kUntouched = 0xa5;
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<T, Free> memory_;
};

// One random call, its buffers, and what it must give.
template <class T>
class Trial {
 public:
  Trial(uint64_t seed, DType dtype) : random_(seed) {
    choose(dtype);
    fill();
  }

  // Whether the call gives what it must; says what it gave otherwise.
  bool passes(Cpu& cpu) {
    std::vector<T>& cache = used_cache_;
    cache = cache_;
    const Output<T> out(call_, out_offset_);
    call_.cache = cache.data();
    call_.out = out.rows;
    cpu.run(call_);
    if (std::memcmp(cache.data(), wanted_cache_.data(), cache.size() * sizeof(T)) != 0)
      return complain(cpu, "cache", first_difference(cache), 0, 0);
    if (!out.has_gaps_untouched()) return complain(cpu, "the gap between outputs", 0, 0, 0);
    for (size_t i = 0; i < wanted_.size(); ++i) {
      const double found = widen(out.rows[i / out.width * out.stride + i % out.width]);
      // One rounding of the output; before it sums in float.
      const double allowed = std::abs(wanted_[i]) * kRounding[static_cast<int>(call_.dtype)] + 0x1p-17;
      if (!(std::abs(found - wanted_[i]) <= allowed)) return complain(cpu, "output", i, found, wanted_[i]);
    }
    return true;
  }

 private:
  void choose(DType dtype) {
    const int kHeadDims[] = {16, 32, 64, 80, 96, 128, random_.between(1, 300)};
    const int kBlockSizes[] = {8, 16, 32, random_.between(1, 80)};
    call_.dtype = dtype;
    call_.num_kv_heads = random_.between(1, 4);
    call_.num_heads = call_.num_kv_heads * random_.between(1, 9);
    call_.head_dim = kHeadDims[random_.between(0, 6)];
    call_.scale = 1.0f / std::sqrt(static_cast<float>(call_.head_dim));
    call_.soft_cap = random_.chance(0.3) ? 10.0f : 0.0f;
    Batch& batch = call_.batch;
    batch.block_size = kBlockSizes[random_.between(0, 3)];
    batch.window = random_.chance(0.3) ? random_.about(300) : int64_t{1} << 40;
    batch.num_seqs = random_.chance(0.05) ? 0 : random_.about(12);
    const bool has_query_lens = random_.chance(0.5);
    const int longest = 400000 / (call_.num_heads * call_.head_dim);  // many short calls find more than few long ones
    for (int64_t i = 0; i < batch.num_seqs; ++i) {
      lengths_.push_back(random_.about(std::min(longest, random_.chance(0.1) ? 1500 : 200)));
      queries_.push_back(has_query_lens ? random_.between(0, std::min(5, static_cast<int>(lengths_.back()))) : 1);
      batch.num_tokens += queries_.back();
      batch.max_blocks = std::max(batch.max_blocks, (lengths_.back() - 1) / batch.block_size + 1);
    }
    batch.context_lens = lengths_.data();
    batch.query_lens = has_query_lens ? queries_.data() : nullptr;
    if (random_.chance(0.3)) sinks_.resize(static_cast<size_t>(call_.num_heads));
    for (float& sink : sinks_) sink = 2 * random_.normal();
    call_.sinks = sinks_.empty() ? nullptr : sinks_.data();
  }

  void fill() {
    Batch& batch = call_.batch;
    const int64_t width = int64_t{call_.num_heads} * call_.head_dim, kv_width = int64_t{call_.num_kv_heads} * call_.head_dim;
    call_.q_stride = call_.k_stride = call_.v_stride = width + 2 * kv_width;
    const int64_t line = 64 / sizeof(T);
    const bool is_aligned = random_.chance(0.5);  // each row begins with a cache line
    call_.out_stride = is_aligned ? ((width - 1) / line + random_.between(1, 2)) * line : width + random_.between(0, 3);
    out_offset_ = is_aligned ? 0 : static_cast<size_t>(random_.between(0, 3));
    for (int64_t i = 0; i < batch.num_tokens * call_.q_stride; ++i) push(qkv_, random_.normal());
    call_.q = qkv_.data();
    call_.k = qkv_.data() + (qkv_.empty() ? 0 : width);
    call_.v = qkv_.data() + (qkv_.empty() ? 0 : width + kv_width);

    std::vector<int64_t> order;
    int64_t needed = 1;  // one stays free
    for (const int64_t length : lengths_) needed += (length + batch.block_size - 1) / batch.block_size;
    for (int64_t i = 0; i < needed; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random_.bits);
    call_.num_blocks = static_cast<int64_t>(order.size());
    call_.block_stride = 2 * kv_width * batch.block_size;
    cache_.resize(static_cast<size_t>(call_.num_blocks * call_.block_stride));
    for (T& x : cache_) narrow(std::nanf(""), x);
    wanted_cache_ = cache_;
    batch.table_stride = batch.max_blocks;
    tables_.assign(static_cast<size_t>(batch.num_seqs * batch.max_blocks), -1);
    batch.block_tables = tables_.data();

    int64_t token = 0;
    for (size_t seq = 0; seq < lengths_.size(); ++seq) {
      int64_t* table = tables_.data() + static_cast<int64_t>(seq) * batch.max_blocks;
      for (int64_t i = 0; i <= (lengths_[seq] - 1) / batch.block_size && lengths_[seq] > 0; ++i) {
        table[i] = order.back();
        order.pop_back();
      }
      token = fill_sequence(seq, table, token);
    }
  }

  int64_t fill_sequence(size_t seq, const int64_t* table, int64_t token) {
    const int64_t old = lengths_[seq] - queries_[seq];
    std::vector<double> keys, values;  // [length, num_kv_heads, head_dim]
    for (int64_t position = 0; position < lengths_[seq]; ++position)
      for (int i = 0; i < call_.num_kv_heads * call_.head_dim; ++i)
        for (const bool is_value : {false, true}) {
          const size_t slot = slot_of(table, position, i / call_.head_dim, i % call_.head_dim, is_value);
          if (position < old) {
            narrow(random_.normal(), cache_[slot]);
            wanted_cache_[slot] = cache_[slot];
          } else {
            const T* rows = static_cast<const T*>(is_value ? call_.v : call_.k);
            wanted_cache_[slot] = rows[(token + position - old) * call_.k_stride + i];
          }
          (is_value ? values : keys).push_back(widen(wanted_cache_[slot]));
        }
    for (int64_t i = 0; i < queries_[seq]; ++i)
      for (int head = 0; head < call_.num_heads; ++head) attend(token + i, old + i, head, keys, values);
    return token + queries_[seq];
  }

  size_t slot_of(const int64_t* table, int64_t position, int head, int dim, bool is_value) const {
    const int64_t size = call_.batch.block_size;
    const int64_t row = ((is_value ? call_.num_kv_heads : 0) + head) * size + position % size;
    return static_cast<size_t>(table[position / size] * call_.block_stride + row * call_.head_dim + dim);
  }

  void attend(int64_t token, int64_t position, int head, const std::vector<double>& keys,
              const std::vector<double>& values) {
    const int64_t dims = call_.head_dim, row = call_.num_kv_heads * dims;
    const int64_t offset = head / (call_.num_heads / call_.num_kv_heads) * dims;
    std::vector<double> q;
    for (int64_t d = 0; d < dims; ++d)
      q.push_back(widen(static_cast<const T*>(call_.q)[token * call_.q_stride + head * dims + d]));
    const int64_t first = std::max<int64_t>(0, position - call_.batch.window + 1);
    std::vector<double> scores;
    for (int64_t i = first; i <= position; ++i) {
      const double score = dot(q.data(), keys.data() + i * row + offset, dims) * call_.scale;
      scores.push_back(call_.soft_cap > 0 ? call_.soft_cap * std::tanh(score / call_.soft_cap) : score);
    }
    double top = sinks_.empty() ? -INFINITY : sinks_[static_cast<size_t>(head)], total = 0;
    for (const double score : scores) top = std::max(top, score);
    if (!sinks_.empty()) total = std::exp(sinks_[static_cast<size_t>(head)] - top);
    for (double& score : scores) total += score = std::exp(score - top);
    const size_t at = wanted_.size();
    wanted_.resize(at + static_cast<size_t>(dims));
    for (int64_t i = first; i <= position; ++i)
      add(scores[static_cast<size_t>(i - first)] / total, values.data() + i * row + offset, &wanted_[at], dims);
  }

  void push(std::vector<T>& to, float x) {
    T narrowed;
    narrow(x, narrowed);
    to.push_back(narrowed);
  }

  size_t first_difference(const std::vector<T>& cache) const {
    size_t i = 0;
    while (std::memcmp(&cache[i], &wanted_cache_[i], sizeof(T)) == 0) ++i;
    return i;
  }

  bool complain(const Cpu& cpu, const char* what, size_t i, double found, double wanted) const {
    std::printf("%s, %d threads: %s %zu is %.9g, not %.9g (%d/%d heads of %d, block %d, %d sequences)\n",
                isa_name(cpu.isa()), cpu.num_threads(), what, i, found, wanted, call_.num_heads,
                call_.num_kv_heads, call_.head_dim, call_.batch.block_size, static_cast<int>(call_.batch.num_seqs));
    return false;
  }

  Random random_;
  Call call_{};
  std::vector<int64_t> lengths_, queries_, tables_;
  std::vector<float> sinks_;
  std::vector<T> qkv_, cache_, wanted_cache_, used_cache_;
  std::vector<double> wanted_;
  size_t out_offset_ = 0;
};

#include "fuzz_experts.inc"

template <template <class> class Trial, class T>
bool try_all(uint64_t seed, DType dtype, const std::vector<std::unique_ptr<Cpu>>& cpus) {
  Trial<T> trial(seed, dtype);
  for (const auto& cpu : cpus) {
    // Its other types are those of scalar.
    if (cpu->isa() == Isa::amx_emulated && dtype != DType::bf16) continue;
    if (!trial.passes(*cpu)) return false;
  }
  return true;
}

template <template <class> class Trial>
bool try_type(uint64_t seed, int type, const std::vector<std::unique_ptr<Cpu>>& cpus) {
  switch (type) {
    case 0: return try_all<Trial, bf16>(seed, DType::bf16, cpus);
    case 1: return try_all<Trial, f16>(seed, DType::f16, cpus);
    default: return try_all<Trial, float>(seed, DType::f32, cpus);
  }
}

bool try_seed(uint64_t seed, const std::vector<std::unique_ptr<Cpu>>& cpus) {
  const int type = static_cast<int>(seed % kNumDTypes);
  return seed / kNumDTypes % 2 == 0 ? try_type<Trial>(seed, type, cpus)
                                    : try_type<ExpertsTrial>(seed, type, cpus);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::printf("usage: %s SECONDS [FIRST_SEED]\n", argv[0]);
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  std::vector<std::unique_ptr<Cpu>> cpus;
  const auto add = [&](int threads, Isa isa) {
    cpus.push_back(std::make_unique<Cpu>(threads, std::vector<int>{}, isa));
  };
  for (const Isa isa : available_isas())
    for (const int threads : {1, 3}) add(threads, isa);
  add(3, Isa::amx_emulated);
  // Two callers at once, as lanes of an executor may be: their calls take turns.
  std::atomic<uint64_t> seed{first};
  std::atomic<bool> has_failed{false};
  const auto work = [&] {
    do {
      const uint64_t mine = seed++;
      if (try_seed(mine, cpus)) continue;
      std::printf("seed %llu failed\n", static_cast<unsigned long long>(mine));
      has_failed = true;
    } while (!has_failed && std::chrono::steady_clock::now() < end);
  };
  std::thread other(work);
  work();
  other.join();
  std::printf("%llu calls of %zu variants%s\n", static_cast<unsigned long long>(seed - first), cpus.size(),
              has_failed ? ", and a failure" : ": all as the reference");
  return has_failed ? 1 : 0;
}
