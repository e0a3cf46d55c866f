// Decode attention over a paged KV cache, by all threads of a pool.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "plan.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moe::attention {

// The arguments of one call. Rows are tokens, sequence by sequence; strides count elements.
//
// The cache is [num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous within a block.
struct Call {
  DType dtype;
  void* out;  // [num_tokens, num_heads * head_dim]
  const void* q;  // [num_tokens, num_heads, head_dim]
  const void* k;  // [num_tokens, num_kv_heads, head_dim]
  const void* v;
  void* cache;
  int64_t out_stride, q_stride, k_stride, v_stride, block_stride;
  int64_t num_blocks;
  int num_heads, num_kv_heads, head_dim;
  Batch batch;
  float scale;
  float soft_cap;       // 0: none
  const float* sinks;  // [num_heads], or null
};

class Attention {
 public:
  Attention(int num_threads, std::vector<int> cpus, Isa isa);

  // Appends k and v to the cache, then attends. Raises std::invalid_argument, before anything is written, if lengths
  // or blocks do not fit each other or the cache. Calls from several threads take turns.
  void run(const Call& call);

  // A layer's experts by the same threads, which nothing else keeps busy then.
  void run(const ExpertsCall& call);
  size_t experts_bytes() const { return experts_.num_bytes(); }

  // Reads memory as fast as its threads can, for comparison; returns a sum of its words.
  uint64_t read(const void* from, int64_t bytes);

  int num_threads() const { return pool_.num_threads(); }
  Isa isa() const { return isa_; }

 private:
  struct Running;

  void serve(Running& running, int thread);
  void attend(Running& running, const Item& item, const Item& next, int thread);
  void expect(const Call& call, const Shape& shape, const Item& item) const;
  void append(const Call& call, const Item& item) const;

  std::mutex turn_;
  ThreadPool pool_;
  Isa isa_;
  const Kernels& kernels_;
  Plan plan_;
  Workspace workspace_;
  Experts experts_;
};

}  // namespace moe::attention
