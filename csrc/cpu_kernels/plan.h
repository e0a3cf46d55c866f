// How the work of a call is cut into items and shared out among threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace moe::cpu {

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
  int64_t seq;
  int32_t head;
  int32_t num_queries;
  // If several items share the positions, the one that ends last merges their states.
  int32_t part;
  int32_t num_parts;
  int32_t first_state;  // of the parts
  int32_t split;        // number of this set of parts
};

// Items, in an order in which each thread has a stretch of them of about equal cost. A thread takes its own from the
// front, then what others have left. Only sequences are laid out before the threads begin; each of them works out its
// items as it takes them. Memory only grows.
class Plan {
 public:
  explicit Plan(int num_threads);

  // Raises std::invalid_argument if the batch contradicts itself or names blocks outside of the cache.
  void make(const Batch& batch, int num_kv_heads, int64_t num_blocks);

  // What a thread has taken and not yet worked on. Several items at a time, since taking waits for all that the thread
  // has written before.
  struct Share {
    int64_t front = 0;
    int64_t end = 0;
    int64_t last = 0;  // end of what the thread will probably be given after it
  };

  // The next item for a thread, false if none is left. `item` is the one it had before, if any; `next` is what it will
  // probably be given then, with no positions if unknown.
  bool take(int thread, Share& share, Item& item, Item& next);

  // Counts one part of several as done; true for the last.
  bool is_last_part(const Item& item);

  int num_states() const { return num_states_; }
  int max_queries() const { return max_queries_; }

 private:
  struct alignas(64) Stretch {
    std::atomic<int64_t> front{0};
    int64_t end = 0;
  };

  // A sequence's items: of each KV head its parts.
  struct Cut {
    int64_t first_item;
    int64_t first_token;
    int64_t begin;
    int64_t end;
    int32_t num_queries;
    int32_t num_parts;
    int32_t blocks_per_part;
    int32_t first_state;
    int32_t first_split;
  };

  bool take_share(int thread, Share& share);
  int64_t check(const Batch& batch, int64_t num_blocks);
  void cut(Cut& cut, int64_t most);
  Item item_at(int64_t number, int64_t near) const;

  int num_threads_;
  int num_kv_heads_ = 0;
  int64_t block_size_ = 0;
  std::vector<Cut> cuts_;  // one per sequence, and one where the next would begin
  std::unique_ptr<std::atomic<int32_t>[]> num_left_;  // parts of each split
  size_t num_left_capacity_ = 0;
  std::unique_ptr<Stretch[]> stretches_;  // one per thread
  int num_splits_ = 0;
  int num_states_ = 0;
  int max_queries_ = 0;
};

}  // namespace moe::cpu
