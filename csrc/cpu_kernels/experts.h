// A layer's experts for few tokens, by all threads of a pool.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moe::cpu {

// The arguments of one call. Strides count elements.
//
// Each expert is cut into pages of some rows of its gate: gate and up [rows, hidden], down [hidden, rows].
struct ExpertsCall {
  DType dtype;
  void* out;  // [num_tokens, hidden], may be x
  const void* x;
  int64_t out_stride, x_stride;
  const int64_t* ids;    // [num_tokens, top_k], experts
  const float* weights;  // likewise
  int64_t num_tokens;
  int top_k;
  const void* const* pages;  // [num_experts, pages_per_expert]
  int num_experts, pages_per_expert;
  int hidden, rows;
};

// Weights are read once, by threads that each take a few rows at a time. Slots are the pairs of a token and one of its
// experts, expert by expert.
class Experts {
 public:
  // Raises std::invalid_argument, before anything is written, if a token goes to an expert that is not there.
  void run(ThreadPool& pool, const Kernels& kernels, const ExpertsCall& call);

  // Of what is kept of slots' rows, which only grows.
  size_t num_bytes() const;

 private:
  struct Group {  // slots of one expert that meet its weights together
    int64_t first;
    int count;
  };
  struct Met {  // an expert that tokens go to
    int expert;
    size_t first, end;  // of its groups
  };
  struct Running;

  void sort(const ExpertsCall& call);

  std::vector<Met> met_;
  std::vector<Group> groups_;
  std::vector<int64_t> slots_;   // of the pairs as they come
  std::vector<int64_t> tokens_;  // of the slots
  FloatBuffer x_, inner_, laid_out_inner_, outputs_, sums_;
};

}  // namespace moe::cpu
