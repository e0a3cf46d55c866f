// How the work of a call is cut into items and shared out among threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace moe::attention {

// The sequences of a call. The last query_lens[i] of a sequence's context_lens[i] tokens are new.
struct Batch {
  int64_t num_seqs;
  int64_t num_tokens;
  const int64_t* block_tables;  // [num_seqs, max_blocks]
  int64_t table_stride;
  int64_t max_blocks;
  const int64_t* context_lens;  // [num_seqs]
  const int64_t* query_lens;    // [num_seqs], or null: one each
  int64_t window;               // positions that a query sees, itself included
  int block_size;
};

// Positions [begin, end) of one sequence in one KV head.
struct Item {
  int64_t begin;
  int64_t end;
  int64_t first_token;  // row of the sequence's first query
  int32_t seq;
  int32_t head;
  int32_t num_queries;
  int32_t split;  // number of the split that it is part of, -1: the item is the whole
  int32_t part;
};

// A sequence and KV head whose positions several items share; the one that ends last merges their states.
struct Split {
  int32_t first_state;
  int32_t num_parts;
};

// Items, in an order in which each thread has a stretch of them of about equal cost. A thread takes its own from the
// front, then what others have left. Memory only grows.
class Plan {
 public:
  explicit Plan(int num_threads);

  // Raises std::invalid_argument if the batch contradicts itself or names blocks outside of the cache.
  void make(const Batch& batch, int num_kv_heads, int64_t num_blocks);

  // The next item for a thread, null if none is left. `next` is what it will probably be given then, or null.
  const Item* take(int thread, const Item** next);

  // Counts one part of a split as done; true for the last.
  bool is_last_part(const Item& item);

  const Split& split(const Item& item) const { return splits_[static_cast<size_t>(item.split)]; }
  int num_states() const { return num_states_; }
  int max_queries() const { return max_queries_; }

 private:
  struct alignas(64) Stretch {
    std::atomic<int64_t> front{0};
    int64_t end = 0;
  };

  int64_t check(const Batch& batch, int num_kv_heads, int64_t num_blocks);
  void cut(const Batch& batch, int64_t seq, int64_t first_token, int num_kv_heads, int64_t most);
  void share_out(int64_t cost);

  int num_threads_;
  std::vector<Item> items_;
  std::vector<Split> splits_;
  std::unique_ptr<std::atomic<int32_t>[]> num_left_;  // parts of each split
  size_t num_left_capacity_ = 0;
  std::unique_ptr<Stretch[]> stretches_;  // one per thread
  int num_states_ = 0;
  int max_queries_ = 0;
};

}  // namespace moe::attention
