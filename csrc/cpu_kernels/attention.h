// Decode attention over a paged KV cache, by all threads of a pool.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "plan.h"
#include "thread_pool.h"
#include "workspace.h"

namespace moe::cpu {

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
  explicit Attention(int num_threads) : plan_(num_threads) {}

  // Appends k and v to the cache, then attends. Raises std::invalid_argument, before anything is written, if lengths
  // or blocks do not fit each other or the cache.
  void run(ThreadPool& pool, const Kernels& kernels, const Call& call);

 private:
  struct Running;

  void serve(const Running& running, int thread);
  void attend(const Running& running, const Item& item, const Item& next, int thread);
  void expect(const Running& running, const Item& item) const;
  void append(const Call& call, const Item& item) const;

  Plan plan_;
  Workspace workspace_;
};

}  // namespace moe::cpu
