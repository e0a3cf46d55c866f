// Decode attention over a paged KV cache, by all threads of a pool.

#include "attention.h"

#include <algorithm>
#include <cstring>

namespace moe::cpu {
namespace {

constexpr int64_t kLine = 64;

// Scores of a tile should leave room for keys and values in an L1 of 32 KiB.
constexpr int kScoresPerTile = 4096;

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

const void* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * element_size(dtype);
}

void* at(void* base, int64_t elements, DType dtype) {
  return static_cast<char*>(base) + elements * element_size(dtype);
}

Shape shape_of(const Call& call, int max_rows) {
  Shape s{};
  s.head_dim = call.head_dim;
  s.padded_head_dim = (call.head_dim + kHeadDimUnit - 1) / kHeadDimUnit * kHeadDimUnit;
  s.group = call.num_heads / call.num_kv_heads;
  s.block_size = call.batch.block_size;
  s.tile = std::clamp(kScoresPerTile / std::max(max_rows, 1) / 16 * 16, 64, kMaxTile);
  s.scale = call.scale;
  s.soft_cap = call.soft_cap;
  s.window = call.batch.window;
  s.block_stride = call.block_stride;
  s.value_offset = int64_t{call.num_kv_heads} * s.block_size * s.head_dim;
  s.q_stride = call.q_stride;
  s.out_stride = call.out_stride;
  s.has_aligned_out = reinterpret_cast<uintptr_t>(call.out) % kLine == 0 &&
                      call.out_stride * element_size(call.dtype) % kLine == 0;
  return s;
}

Span span_of(const Call& call, const Item& item) {
  const int64_t head = int64_t{item.head} * call.batch.block_size * call.head_dim;
  return {at(call.cache, head, call.dtype), call.batch.block_tables + item.seq * call.batch.table_stride, item.begin,
          item.end};
}

// Calls body(token, element of the cache for its key, likewise for its value) for the new tokens of an item.
template <class F>
void for_new_rows(const Call& call, const Item& item, F body) {
  const int64_t first_new = call.batch.context_lens[item.seq] - item.num_queries;
  const int64_t block_size = call.batch.block_size;
  const int64_t* table = call.batch.block_tables + item.seq * call.batch.table_stride;
  for (int64_t position = std::max(item.begin, first_new); position < item.end; ++position) {
    const int64_t row = item.head * block_size + position % block_size;
    const int64_t key = table[position / block_size] * call.block_stride + row * call.head_dim;
    body(item.first_token + position - first_new, key, key + call.num_kv_heads * block_size * call.head_dim);
  }
}

}  // namespace

struct Attention::Running {
  Attention& self;
  const Kernels& kernels;
  const Call& call;
  Shape shape;
};

void Attention::run(ThreadPool& pool, const Kernels& kernels, const Call& call) {
  plan_.make(call.batch, call.num_kv_heads, call.num_blocks);
  const int max_rows = plan_.max_queries() * (call.num_heads / call.num_kv_heads);
  if (max_rows == 0) return;
  Running running{*this, kernels, call, shape_of(call, max_rows)};
  workspace_.reserve(running.shape, max_rows, pool.num_threads(), plan_.num_states());
  pool.run([](void* context, int thread) {
    const auto& r = *static_cast<const Running*>(context);
    r.self.serve(r, thread);
  }, &running);
}

void Attention::serve(const Running& running, int thread) {
  running.kernels.enter();
  Plan::Share share;
  Item item{}, next{};
  while (plan_.take(thread, share, item, next)) attend(running, item, next, thread);
  running.kernels.leave();
}

void Attention::attend(const Running& running, const Item& item, const Item& next, int thread) {
  const Call& call = running.call;
  const Shape& shape = running.shape;
  append(call, item);

  const int64_t first_head = int64_t{item.head} * shape.group;
  Work work{};
  work.shape = &shape;
  work.span = span_of(call, item);
  if (next.begin < next.end) {
    work.next = span_of(call, next);
    expect(running, next);
  }
  work.queries = at(call.q, item.first_token * call.q_stride + first_head * call.head_dim, call.dtype);
  work.num_queries = item.num_queries;
  work.first_position = call.batch.context_lens[item.seq] - item.num_queries;
  work.query_scratch = workspace_.queries(thread);
  work.scores = workspace_.scores(thread);
  work.state = item.num_parts == 1 ? workspace_.own_state(thread) : workspace_.state(item.first_state + item.part);

  Merge merge{};
  merge.shape = &shape;
  merge.num_states = item.num_parts;
  merge.first_state = item.num_parts == 1 ? work.state : workspace_.state(item.first_state);
  merge.state_stride = static_cast<int64_t>(workspace_.state_size());
  merge.num_queries = item.num_queries;
  merge.sinks = call.sinks == nullptr ? nullptr : call.sinks + first_head;
  merge.out = at(call.out, item.first_token * call.out_stride + first_head * call.head_dim, call.dtype);
  work.ending = item.num_parts == 1 ? &merge : nullptr;
  running.kernels.attend[static_cast<int>(call.dtype)](work);
  if (item.num_parts > 1 && plan_.is_last_part(item)) running.kernels.finish[static_cast<int>(call.dtype)](merge);
}

// Asks for the rows of an item that will soon be worked on. There are few of them, but each would be waited for, and
// stores wait in line behind one that misses. (Slots of new tokens come with the blocks that hold them.)
void Attention::expect(const Running& running, const Item& item) const {
  const Call& call = running.call;
  const Shape& shape = running.shape;
  const int64_t dims = call.head_dim, size = element_size(call.dtype), group = shape.group;
  const auto ask = [size](const void* base, int64_t from, int64_t count) {
    const char* row = static_cast<const char*>(base) + from * size;
    for (int64_t i = 0; i < count * size; i += kLine) __builtin_prefetch(row + i, 0, 2);
  };
  const bool streams = call.dtype == DType::bf16 && item.num_parts == 1 &&
                       running.kernels.streams_out(shape, item.num_queries * shape.group);
  for (int64_t i = item.first_token; i < item.first_token + item.num_queries; ++i) {
    ask(call.q, i * call.q_stride + item.head * group * dims, group * dims);
    if (!streams) ask(call.out, i * call.out_stride + item.head * group * dims, group * dims);
  }
  for_new_rows(call, item, [&](int64_t token, int64_t, int64_t) {
    ask(call.k, token * call.k_stride + item.head * dims, dims);
    ask(call.v, token * call.v_stride + item.head * dims, dims);
  });
}

// Writes the new keys and values among the item's positions; each belongs to one item, which alone reads them.
void Attention::append(const Call& call, const Item& item) const {
  const auto bytes = static_cast<size_t>(call.head_dim * element_size(call.dtype));
  const int64_t head = int64_t{item.head} * call.head_dim;
  for_new_rows(call, item, [&](int64_t token, int64_t key, int64_t value) {
    std::memcpy(at(call.cache, key, call.dtype), at(call.k, token * call.k_stride + head, call.dtype), bytes);
    std::memcpy(at(call.cache, value, call.dtype), at(call.v, token * call.v_stride + head, call.dtype), bytes);
  });
}

}  // namespace moe::cpu
