// Threads that run one function at a time together with the thread that asks for it.

#include "thread_pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include <sched.h>
#include <unistd.h>

namespace moe::cpu {
namespace {

// Layers of a pass follow each other within some hundred microseconds of other work, on the same cores where there is
// no GPU: looking out for longer would take time from that.
constexpr auto kLookOut = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// True as soon as ready() is, false if it has not become so while looking out.
template <class F>
bool look_out(F ready) {
  const auto end = std::chrono::steady_clock::now() + kLookOut;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

cpu_set_t set_of(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(static_cast<size_t>(cpu), &set);
  return set;
}

// Keeps the calling thread on some CPUs as long as it exists.
class Stay {
 public:
  explicit Stay(const std::vector<int>& cpus) {
    if (cpus.empty() || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
    const cpu_set_t set = set_of(cpus);
    moved_ = !CPU_EQUAL(&set, &before_) && sched_setaffinity(0, sizeof set, &set) == 0;
  }
  ~Stay() {
    if (moved_) sched_setaffinity(0, sizeof before_, &before_);
  }
  Stay(const Stay&) = delete;
  Stay& operator=(const Stay&) = delete;

 private:
  cpu_set_t before_;
  bool moved_ = false;
};

}  // namespace

// All that threads share. `state` is the number of the current job times kJob, plus kOpen while threads may join it,
// plus the number of threads in it besides the caller.
struct ThreadPool::Crew {
  static constexpr uint64_t kOpen = 1u << 15;
  static constexpr uint64_t kJob = 1u << 16;

  pid_t process = getpid();
  alignas(64) std::atomic<uint64_t> state{0};
  alignas(64) std::atomic<bool> stop{false};
  Job job = nullptr;
  void* context = nullptr;
  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable done;
  int num_sleeping = 0;     // under the mutex
  bool is_caller_sleeping = false;  // likewise
  std::vector<std::thread> threads;

  void serve(int thread);
  bool wait_for_job(uint64_t last);
  void leave();
};

bool ThreadPool::Crew::wait_for_job(uint64_t last) {
  const auto ready = [&] {
    const uint64_t now = state.load(std::memory_order_acquire);
    return (now / kJob != last && (now & kOpen)) || stop.load(std::memory_order_acquire);
  };
  if (!look_out(ready)) {
    std::unique_lock<std::mutex> lock(mutex);
    ++num_sleeping;
    wake.wait(lock, ready);
    --num_sleeping;
  }
  return !stop.load(std::memory_order_acquire);
}

void ThreadPool::Crew::leave() {
  if ((state.fetch_sub(1, std::memory_order_acq_rel) & (kOpen - 1)) != 1) return;
  const std::lock_guard<std::mutex> lock(mutex);
  if (is_caller_sleeping) done.notify_one();
}

void ThreadPool::Crew::serve(int thread) {
  uint64_t last = 0;
  while (wait_for_job(last)) {
    uint64_t now = state.load(std::memory_order_acquire);
    while ((now & kOpen) && !state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
    }
    last = now / kJob;
    if (!(now & kOpen)) continue;
    job(context, thread);
    leave();
  }
}

ThreadPool::ThreadPool(int num_threads, std::vector<int> cpus) : num_threads_(num_threads), cpus_(std::move(cpus)) {
  if (num_threads < 1 || num_threads > 4096)
    throw std::invalid_argument("num_threads must lie between 1 and 4096, not be " + std::to_string(num_threads));
  for (const int cpu : cpus_) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) throw std::invalid_argument("there is no CPU " + std::to_string(cpu));
    // Tried here, where an error can be raised.
    const Stay stay({cpu});
    cpu_set_t now;
    if (sched_getaffinity(0, sizeof now, &now) == 0 && (CPU_COUNT(&now) != 1 || !CPU_ISSET(static_cast<size_t>(cpu), &now)))
      throw std::invalid_argument("this process may not run on CPU " + std::to_string(cpu));
  }
  has_own_cpus_ = static_cast<int>(cpus_.size()) >= num_threads_;
  caller_cpus_ = has_own_cpus_ ? std::vector<int>{cpus_[0]} : cpus_;
  start();
}

ThreadPool::~ThreadPool() { abandon(); }

void ThreadPool::start() {
  crew_ = std::make_unique<Crew>();
  try {
    for (int i = 1; i < num_threads_; ++i) {
      std::vector<int> cpus = has_own_cpus_ ? std::vector<int>{cpus_[static_cast<size_t>(i)]} : cpus_;
      crew_->threads.emplace_back([crew = crew_.get(), i, cpus = std::move(cpus)] {
        const Stay stay(cpus);
        crew->serve(i);
      });
    }
  } catch (const std::system_error&) {
    abandon();
    throw std::runtime_error("the system refuses " + std::to_string(num_threads_) + " threads; lower num_threads");
  }
}

void ThreadPool::abandon() {
  if (crew_ == nullptr) return;
  if (crew_->process != getpid()) {
    crew_.release();  // its threads are the parent's: they cannot be joined, and its mutex may be held for ever
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(crew_->mutex);
    crew_->stop.store(true, std::memory_order_release);
    crew_->wake.notify_all();
  }
  for (std::thread& thread : crew_->threads) thread.join();
  crew_.reset();
}

void ThreadPool::run(Job job, void* context) {
  if (crew_ == nullptr || crew_->process != getpid()) {
    abandon();
    start();
  }
  Crew& crew = *crew_;
  const Stay stay(caller_cpus_);
  if (crew.threads.empty()) return job(context, 0);

  crew.job = job;
  crew.context = context;
  crew.state.store((crew.state.load(std::memory_order_relaxed) / Crew::kJob + 1) * Crew::kJob + Crew::kOpen,
                   std::memory_order_release);
  {
    // A thread about to sleep holds the mutex from its last look at the state until it can be woken.
    const std::lock_guard<std::mutex> lock(crew.mutex);
    if (crew.num_sleeping > 0) crew.wake.notify_all();
  }
  job(context, 0);
  crew.state.fetch_and(~Crew::kOpen, std::memory_order_acq_rel);
  const auto all_left = [&] { return (crew.state.load(std::memory_order_acquire) & (Crew::kOpen - 1)) == 0; };
  if (!look_out(all_left)) {
    std::unique_lock<std::mutex> lock(crew.mutex);
    crew.is_caller_sleeping = true;
    crew.done.wait(lock, all_left);
    crew.is_caller_sleeping = false;
  }
}

}  // namespace moe::cpu
