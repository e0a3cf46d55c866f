// Memory of a call besides its arguments: what each thread works in, and states of parts. Only grows.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "kernel.h"

namespace moe::cpu {

// Floats on a cache line's boundary, without values.
class FloatBuffer {
 public:
  void reserve(size_t count) {
    if (count <= capacity_) return;
    data_.reset();  // before asking for more, which may be refused
    capacity_ = 0;
    data_.reset(static_cast<float*>(::operator new(count * sizeof(float), kLine)));
    capacity_ = count;
  }
  float* data() const { return data_.get(); }
  size_t num_bytes() const { return capacity_ * sizeof(float); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float, Free> data_;
  size_t capacity_ = 0;
};

class Workspace {
 public:
  void reserve(const Shape& shape, int max_rows, int num_threads, int num_states) {
    rows_ = round_up(static_cast<size_t>(max_rows));
    acc_ = rows_ * static_cast<size_t>(shape.padded_head_dim);
    scores_ = round_up(static_cast<size_t>(max_rows) * static_cast<size_t>(shape.tile + kScorePadding));
    // A line between threads, so that none writes to another's.
    queries_ = kQueryCopies * acc_;
    thread_ = queries_ + scores_ + state_size() + round_up(1);
    threads_.reserve(thread_ * static_cast<size_t>(num_threads));
    states_.reserve(state_size() * static_cast<size_t>(num_states));
  }

  float* queries(int thread) const { return threads_.data() + thread_ * static_cast<size_t>(thread); }
  float* scores(int thread) const { return queries(thread) + queries_; }
  State own_state(int thread) const { return state_at(scores(thread) + scores_); }
  State state(int index) const { return state_at(states_.data() + state_size() * static_cast<size_t>(index)); }

  size_t state_size() const { return 2 * rows_ + acc_; }  // in floats

 private:
  static size_t round_up(size_t n) { return (n + 15) / 16 * 16; }
  State state_at(float* p) const { return {p, p + rows_, p + 2 * rows_}; }

  FloatBuffer threads_, states_;
  size_t rows_ = 0, acc_ = 0, queries_ = 0, scores_ = 0, thread_ = 0;
};

}  // namespace moe::cpu
