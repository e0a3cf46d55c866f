// How the work of a call is cut into items and shared out among threads.

#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moe::attention {
namespace {

// What starting an item costs, in positions: queries, output, the first misses.
constexpr int64_t kItemCost = 16;
// With so many items a thread, the last ones to end leave the others idle for a sixteenth of the time at most.
constexpr int64_t kItemsPerThread = 16;
// Shorter parts are not worth writing a state and reading it again.
constexpr int64_t kShortestPart = 128;

int64_t num_queries_of(const Batch& batch, int64_t seq) {
  return batch.query_lens == nullptr ? 1 : batch.query_lens[seq];
}

// First position that any query of the sequence sees.
int64_t begin_of(const Batch& batch, int64_t seq) {
  const int64_t first_query = batch.context_lens[seq] - num_queries_of(batch, seq);
  return std::max<int64_t>(0, first_query - batch.window + 1);
}

[[noreturn]] void refuse(int64_t seq, const std::string& what) {
  throw std::invalid_argument("sequence " + std::to_string(seq) + ": " + what);
}

void check_lengths(const Batch& batch, int64_t seq) {
  const int64_t length = batch.context_lens[seq], queries = num_queries_of(batch, seq);
  if (queries < 0) refuse(seq, std::to_string(queries) + " query tokens");
  if (length < queries)
    refuse(seq, "context_lens is " + std::to_string(length) + ", less than its " + std::to_string(queries) +
                    " new tokens, which it includes");
  if (length > batch.max_blocks * batch.block_size)
    refuse(seq, "context_lens is " + std::to_string(length) + ", but block_tables has room for " +
                    std::to_string(batch.max_blocks * batch.block_size) + " tokens");
}

void check_blocks(const Batch& batch, int64_t seq, int64_t num_blocks) {
  const int64_t* table = batch.block_tables + seq * batch.table_stride;
  const int64_t last = (batch.context_lens[seq] + batch.block_size - 1) / batch.block_size;
  for (int64_t i = begin_of(batch, seq) / batch.block_size; i < last; ++i)
    if (table[i] < 0 || table[i] >= num_blocks)
      refuse(seq, "block " + std::to_string(table[i]) + " is outside of the cache of " +
                      std::to_string(num_blocks) + " blocks");
}

}  // namespace

Plan::Plan(int num_threads) : num_threads_(num_threads), stretches_(new Stretch[static_cast<size_t>(num_threads)]) {}

void Plan::make(const Batch& batch, int num_kv_heads, int64_t num_blocks) {
  const int64_t cost = check(batch, num_kv_heads, num_blocks);
  items_.clear();
  splits_.clear();
  num_states_ = 0;
  const int64_t most = std::max(kShortestPart, cost / (num_threads_ * kItemsPerThread));
  int64_t token = 0;
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    if (num_queries_of(batch, seq) > 0) cut(batch, seq, token, num_kv_heads, most);
    token += num_queries_of(batch, seq);
  }
  if (num_left_capacity_ < splits_.size()) {
    num_left_capacity_ = splits_.size() * 2;
    num_left_.reset(new std::atomic<int32_t>[num_left_capacity_]);
  }
  for (size_t i = 0; i < splits_.size(); ++i) num_left_[i].store(splits_[i].num_parts, std::memory_order_relaxed);
  share_out(cost);
}

// Returns the cost of all items, in positions.
int64_t Plan::check(const Batch& batch, int num_kv_heads, int64_t num_blocks) {
  int64_t tokens = 0, cost = 0, max_queries = 0;
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    check_lengths(batch, seq);
    const int64_t queries = num_queries_of(batch, seq);
    tokens += queries;
    max_queries = std::max(max_queries, queries);
    if (queries == 0) continue;
    check_blocks(batch, seq, num_blocks);
    cost += (batch.context_lens[seq] - begin_of(batch, seq) + kItemCost) * num_kv_heads;
  }
  if (tokens != batch.num_tokens)
    throw std::invalid_argument("the sequences have " + std::to_string(tokens) + " new tokens, q has " +
                                std::to_string(batch.num_tokens) + " rows");
  max_queries_ = static_cast<int>(max_queries);
  return cost;
}

void Plan::cut(const Batch& batch, int64_t seq, int64_t first_token, int num_kv_heads, int64_t most) {
  const int64_t begin = begin_of(batch, seq), end = batch.context_lens[seq];
  const int64_t num_parts = (end - begin + most - 1) / most;
  // Whole blocks, so that no two parts read from one.
  const int64_t first_block = begin / batch.block_size;
  const int64_t blocks = (end - 1) / batch.block_size + 1 - first_block;
  const int64_t blocks_per_part = (blocks + num_parts - 1) / num_parts;
  const int64_t used_parts = (blocks + blocks_per_part - 1) / blocks_per_part;
  Item item{};
  item.first_token = first_token;
  item.seq = static_cast<int32_t>(seq);
  item.num_queries = static_cast<int32_t>(num_queries_of(batch, seq));
  for (int head = 0; head < num_kv_heads; ++head) {
    item.head = head;
    item.split = used_parts > 1 ? static_cast<int32_t>(splits_.size()) : -1;
    if (used_parts > 1) {
      splits_.push_back({num_states_, static_cast<int32_t>(used_parts)});
      num_states_ += static_cast<int>(used_parts);
    }
    for (int64_t part = 0; part < used_parts; ++part) {
      item.part = static_cast<int32_t>(part);
      item.begin = std::max(begin, (first_block + part * blocks_per_part) * batch.block_size);
      item.end = std::min(end, (first_block + (part + 1) * blocks_per_part) * batch.block_size);
      items_.push_back(item);
    }
  }
}

void Plan::share_out(int64_t cost) {
  const auto num_items = static_cast<int64_t>(items_.size());
  int64_t at = 0, before = 0;
  for (int thread = 0; thread < num_threads_; ++thread) {
    Stretch& stretch = stretches_[static_cast<size_t>(thread)];
    stretch.front.store(at, std::memory_order_relaxed);
    const int64_t until = cost * (thread + 1) / num_threads_;
    while (at < num_items && (before < until || thread + 1 == num_threads_)) {
      const Item& item = items_[static_cast<size_t>(at++)];
      before += item.end - item.begin + kItemCost;
    }
    stretch.end = at;
  }
}

const Item* Plan::take(int thread, const Item** next) {
  for (int i = 0; i < num_threads_; ++i) {
    Stretch& stretch = stretches_[static_cast<size_t>((thread + i) % num_threads_)];
    if (stretch.front.load(std::memory_order_relaxed) >= stretch.end) continue;
    const int64_t at = stretch.front.fetch_add(1, std::memory_order_relaxed);
    if (at >= stretch.end) continue;
    *next = i == 0 && at + 1 < stretch.end ? &items_[static_cast<size_t>(at + 1)] : nullptr;
    return &items_[static_cast<size_t>(at)];
  }
  return nullptr;
}

bool Plan::is_last_part(const Item& item) {
  // Releases this part's state and acquires those of the others.
  return num_left_[static_cast<size_t>(item.split)].fetch_sub(1, std::memory_order_acq_rel) == 1;
}

}  // namespace moe::attention
