// How the work of a call is cut into items and shared out among threads.

#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moe::cpu {
namespace {

// What starting an item costs, in positions: queries, output, the first misses.
constexpr int64_t kItemCost = 16;
// With so many items a thread, the last ones to end leave the others idle for a sixteenth of the time at most.
constexpr int64_t kItemsPerThread = 16;
// Shorter parts are not worth writing a state and reading it again.
constexpr int64_t kShortestPart = 128;
// A thread takes so many items at once, or this part of what is left, so that others find some in the end.
constexpr int64_t kItemsPerShare = 4;
constexpr int64_t kSharesLeft = 8;

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

void check_blocks(const Batch& batch, int64_t seq, int64_t begin, int64_t num_blocks) {
  const int64_t* table = batch.block_tables + seq * batch.table_stride;
  const int64_t first = begin / batch.block_size, last = (batch.context_lens[seq] - 1) / batch.block_size;
  uint64_t highest = 0;  // negative ones are higher than any
  for (int64_t i = first; i <= last; ++i) highest = std::max(highest, static_cast<uint64_t>(table[i]));
  if (highest >= static_cast<uint64_t>(num_blocks))
    refuse(seq, "block " + std::to_string(static_cast<int64_t>(highest)) + " is outside of the cache of " +
                    std::to_string(num_blocks) + " blocks");
}

}  // namespace

Plan::Plan(int num_threads) : num_threads_(num_threads), stretches_(new Stretch[static_cast<size_t>(num_threads)]) {}

void Plan::make(const Batch& batch, int num_kv_heads, int64_t num_blocks) {
  num_kv_heads_ = num_kv_heads;
  block_size_ = batch.block_size;
  const int64_t cost = check(batch, num_blocks);
  const int64_t most = std::max(kShortestPart, cost * num_kv_heads / (num_threads_ * kItemsPerThread));
  num_splits_ = num_states_ = 0;
  int64_t number = 0, before = 0;
  int thread = 0;
  stretches_[0].front.store(0, std::memory_order_relaxed);
  const auto next_thread = [&](int64_t end) {
    stretches_[static_cast<size_t>(thread++)].end = end;
    if (thread < num_threads_) stretches_[static_cast<size_t>(thread)].front.store(end, std::memory_order_relaxed);
  };
  for (Cut& c : cuts_) {
    c.first_item = number;
    if (c.num_queries == 0) continue;
    cut(c, most);
    const int64_t num_items = int64_t{num_kv_heads} * c.num_parts, its_cost = c.end - c.begin + kItemCost;
    for (int64_t until; thread + 1 < num_threads_ && (until = cost * (thread + 1) / num_threads_) <= before + its_cost;)
      next_thread(number + (until - before) * num_items / its_cost);
    number += num_items;
    before += its_cost;
  }
  while (thread < num_threads_) next_thread(number);
  Cut end{};
  end.first_item = number;
  cuts_.push_back(end);

  if (num_left_capacity_ < static_cast<size_t>(num_splits_)) {
    num_left_capacity_ = static_cast<size_t>(num_splits_) * 2;
    num_left_.reset(new std::atomic<int32_t>[num_left_capacity_]);
  }
  if (num_splits_ == 0) return;
  for (const Cut& c : cuts_)
    for (int head = 0; c.num_parts > 1 && head < num_kv_heads; ++head)
      num_left_[static_cast<size_t>(c.first_split + head)].store(c.num_parts, std::memory_order_relaxed);
}

// Fills in what the cuts know without each other. Returns the cost of all in each KV head, in positions.
int64_t Plan::check(const Batch& batch, int64_t num_blocks) {
  cuts_.resize(static_cast<size_t>(batch.num_seqs));
  int64_t tokens = 0, cost = 0, max_queries = 0;
  for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
    check_lengths(batch, seq);
    const int64_t queries = num_queries_of(batch, seq);
    Cut& c = cuts_[static_cast<size_t>(seq)];
    c = {};
    c.first_token = tokens;
    c.num_queries = static_cast<int32_t>(queries);
    tokens += queries;
    max_queries = std::max(max_queries, queries);
    if (queries == 0) continue;
    c.begin = begin_of(batch, seq);
    c.end = batch.context_lens[seq];
    check_blocks(batch, seq, c.begin, num_blocks);
    cost += c.end - c.begin + kItemCost;
  }
  if (tokens != batch.num_tokens)
    throw std::invalid_argument("the sequences have " + std::to_string(tokens) + " new tokens, q has " +
                                std::to_string(batch.num_tokens) + " rows");
  max_queries_ = static_cast<int>(max_queries);
  return cost;
}

void Plan::cut(Cut& cut, int64_t most) {
  cut.num_parts = 1;
  if (cut.end - cut.begin <= most) return;
  const int64_t num_parts = (cut.end - cut.begin + most - 1) / most;
  // Whole blocks, so that no two parts read from one.
  const int64_t blocks = (cut.end - 1) / block_size_ + 1 - cut.begin / block_size_;
  const int64_t blocks_per_part = (blocks + num_parts - 1) / num_parts;
  cut.blocks_per_part = static_cast<int32_t>(blocks_per_part);
  cut.num_parts = static_cast<int32_t>((blocks + blocks_per_part - 1) / blocks_per_part);
  if (cut.num_parts == 1) return;
  cut.first_state = num_states_;
  cut.first_split = num_splits_;
  num_states_ += num_kv_heads_ * cut.num_parts;
  num_splits_ += num_kv_heads_;
}

// `near` is a sequence that the item probably belongs to, or the one before.
Item Plan::item_at(int64_t number, int64_t near) const {
  const auto has_it = [&](int64_t seq) {
    const Cut* c = &cuts_[static_cast<size_t>(seq)];
    return seq + 1 < static_cast<int64_t>(cuts_.size()) && c[0].first_item <= number && number < c[1].first_item;
  };
  int64_t seq = near;
  if (!has_it(seq) && !has_it(++seq)) {
    const auto after = std::upper_bound(cuts_.begin(), cuts_.end(), number,
                                        [](int64_t n, const Cut& c) { return n < c.first_item; });
    seq = after - cuts_.begin() - 1;
  }
  const Cut& c = cuts_[static_cast<size_t>(seq)];
  const auto within = static_cast<int32_t>(number - c.first_item);
  Item item{};
  item.begin = c.begin;
  item.end = c.end;
  item.first_token = c.first_token;
  item.seq = seq;
  item.num_queries = c.num_queries;
  item.num_parts = c.num_parts;
  item.head = within;
  if (c.num_parts == 1) return item;
  item.head = within / c.num_parts;
  item.part = within % c.num_parts;
  item.first_state = c.first_state + item.head * c.num_parts;
  item.split = c.first_split + item.head;
  const int64_t block = c.begin / block_size_ + int64_t{item.part} * c.blocks_per_part;
  item.begin = std::max(c.begin, block * block_size_);
  item.end = std::min(c.end, (block + c.blocks_per_part) * block_size_);
  return item;
}

bool Plan::take_share(int thread, Share& share) {
  for (int i = 0; i < num_threads_; ++i) {
    Stretch& stretch = stretches_[static_cast<size_t>((thread + i) % num_threads_)];
    const int64_t left = stretch.end - stretch.front.load(std::memory_order_relaxed);
    if (left <= 0) continue;
    const int64_t count = std::clamp<int64_t>(left / kSharesLeft, 1, kItemsPerShare);
    share.front = stretch.front.fetch_add(count, std::memory_order_relaxed);
    share.end = std::min(share.front + count, stretch.end);
    share.last = i == 0 ? stretch.end : share.end;
    if (share.front < share.end) return true;
  }
  return false;
}

bool Plan::take(int thread, Share& share, Item& item, Item& next) {
  if (share.front >= share.end && !take_share(thread, share)) return false;
  const int64_t number = share.front++;
  item = item_at(number, item.seq);
  next = number + 1 < share.last ? item_at(number + 1, item.seq) : Item{};
  return true;
}

bool Plan::is_last_part(const Item& item) {
  // Releases this part's state and acquires those of the others.
  return num_left_[static_cast<size_t>(item.split)].fetch_sub(1, std::memory_order_acq_rel) == 1;
}

}  // namespace moe::cpu
