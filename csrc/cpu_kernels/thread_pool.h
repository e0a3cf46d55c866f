// Threads that run one function at a time together with the thread that asks for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace moe::cpu {

// A job is a function that any number of threads, the caller always among them, may run at the same time; it has to
// share out its work itself. So a thread that wakes late misses nothing, and nobody waits for it.
//
// Between jobs threads look out for the next one for a short while, then sleep. After a fork the child's first job
// starts new threads; those of the parent do not exist there.
class ThreadPool {
 public:
  using Job = void (*)(void* context, int thread);

  // `cpus` may be empty: threads run where the system puts them. With at least as many CPUs as threads each thread
  // has one of its own, the caller the first for the duration of a job; with fewer, all share the set.
  ThreadPool(int num_threads, std::vector<int> cpus);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs job(context, thread) on the calling thread, as thread 0, and on those that are there in time; returns when
  // all of them are done. The job must not throw. Calls must not overlap.
  void run(Job job, void* context);

 private:
  struct Crew;

  void start();
  void abandon();

  int num_threads_;
  std::vector<int> cpus_;
  std::vector<int> caller_cpus_;
  bool has_own_cpus_ = false;
  std::unique_ptr<Crew> crew_;
};

}  // namespace moe::cpu
