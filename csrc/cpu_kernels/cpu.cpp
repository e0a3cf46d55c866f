// What this CPU computes with its threads and kernels: attention, experts.

#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace moe::cpu {
namespace {

constexpr int64_t kPiece = int64_t{1} << 20;  // bytes that a thread reads before it asks for more

}  // namespace

Cpu::Cpu(int num_threads, std::vector<int> cpus, Isa isa)
    : pool_(num_threads, std::move(cpus)), isa_(isa), kernels_(kernels_of(isa)), attention_(num_threads) {}

void Cpu::run(const Call& call) {
  const std::lock_guard<std::mutex> lock(turn_);
  attention_.run(pool_, kernels_, call);
}

void Cpu::run(const ExpertsCall& call) {
  const std::lock_guard<std::mutex> lock(turn_);
  experts_.run(pool_, kernels_, call);
}

uint64_t Cpu::read(const void* from, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(turn_);
  struct Reading {
    const Kernels& kernels;
    const char* from;
    int64_t bytes;
    std::atomic<int64_t> front{0};
    std::atomic<uint64_t> sum{0};
  } reading{kernels_, static_cast<const char*>(from), bytes, {}, {}};
  pool_.run([](void* context, int) {
    auto& r = *static_cast<Reading*>(context);
    for (int64_t begin; (begin = r.front.fetch_add(kPiece, std::memory_order_relaxed)) < r.bytes;)
      r.sum.fetch_add(r.kernels.read(r.from + begin, std::min(kPiece, r.bytes - begin)), std::memory_order_relaxed);
  }, &reading);
  return reading.sum.load();
}

}  // namespace moe::cpu
