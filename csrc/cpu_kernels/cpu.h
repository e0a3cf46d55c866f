// What this CPU computes with its threads and kernels: attention, experts.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "isa.h"
#include "thread_pool.h"

namespace moe::cpu {

// Calls from several threads take turns: each has all threads of the pool.
class Cpu {
 public:
  Cpu(int num_threads, std::vector<int> cpus, Isa isa);

  void run(const Call& call);
  void run(const ExpertsCall& call);

  // Reads memory as fast as its threads can, for comparison; returns a sum of its words.
  uint64_t read(const void* from, int64_t bytes);

  int num_threads() const { return pool_.num_threads(); }
  Isa isa() const { return isa_; }
  size_t experts_bytes() const { return experts_.num_bytes(); }

 private:
  std::mutex turn_;
  ThreadPool pool_;
  Isa isa_;
  const Kernels& kernels_;
  Attention attention_;
  Experts experts_;
};

}  // namespace moe::cpu
