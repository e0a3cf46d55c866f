// What the driver and the kernels of every instruction set agree on: plain data, no code.
//
// Translation units that include this are compiled with different -m flags. A function defined here could be emitted
// by any of them, and the linker might keep the AVX-512 copy for all; so nothing is defined here.
#pragma once

#include <cstdint>

namespace moe::cpu {

enum class DType : int { bf16, f16, f32 };
constexpr int kNumDTypes = 3;

enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx, amx_emulated };
constexpr int kNumIsas = 6;

// Buffers of head_dim elements are padded to a multiple of this, the widest unit of any kernel.
constexpr int kHeadDimUnit = 32;
constexpr int kQueryCopies = 4;    // how often a kernel may keep each query
constexpr int kMaxTile = 512;     // positions whose scores are held at once
constexpr int kScorePadding = 16;  // kernels may write this many scores past a tile

// What is the same for all work of a call. Strides count elements.
struct Shape {
  int head_dim;
  int padded_head_dim;
  int group;  // query heads of one KV head
  int block_size;
  int tile;               // positions per tile, at most kMaxTile
  float scale;            // of q.k, before the soft-cap
  float soft_cap;         // 0: none
  int64_t window;         // positions that a query sees, itself included
  int64_t block_stride;   // from one block of the cache to the next
  int64_t value_offset;   // from a block's keys to its values
  int64_t q_stride;       // from one token's queries to the next's
  int64_t out_stride;
  bool has_aligned_out;  // each row of the output begins with a cache line, if rows are whole lines
};

// Positions [begin, end) of one sequence in one KV head.
struct Span {
  const void* keys;  // the head's keys in block 0
  const int64_t* table;
  int64_t begin;
  int64_t end;
};

// Attention over some positions as far as it can be known without the others. Rows are (query token, query head).
struct State {  // `max` and `sum` have room for whole vectors of rows
  float* max;  // [rows], of the scores times log2(e)
  float* sum;  // [rows], of 2^(score - max)
  float* acc;  // [rows, padded_head_dim], in the kernel's own order of dimensions
};

// Turns the states of a sequence and KV head into its rows of the output.
struct Merge {
  const Shape* shape;
  State first_state;
  int64_t state_stride;  // floats from one state to the next
  int num_states;
  int num_queries;
  const float* sinks;  // [group], logits; or null
  void* out;
};

// One unit of work: the queries of one sequence and KV head against a span.
struct Work {
  const Shape* shape;
  Span span;
  Span next;  // what this thread reads after it, to be asked for; an empty span if unknown
  const void* queries;
  int num_queries;
  int64_t first_position;  // of the first query
  float* query_scratch;    // [rows, kQueryCopies, padded_head_dim]
  float* scores;           // [rows, tile + kScorePadding]
  State state;             // out
  const Merge* ending;     // turns it into the output, if the span is all that the queries see; else null
};

// Tokens that meet an expert's weights together, and where they are laid out for that.
struct Tokens {
  const void* from;
  int64_t stride;        // elements from one row to the next
  const int64_t* which;  // [count], rows; null: the first ones
  int count;
  int depth;
  int padded_depth;
  float* to;  // [count, padded_depth], of the kernel's own order
};

// Rows of weights times such tokens, to sums[token * stride + row]; up to 15 more than `rows` are written.
struct Product {
  const void* weights;  // [rows, depth], contiguous
  int rows;
  int depth;
  int padded_depth;
  const float* x;
  int tokens;
  bool is_first;  // these rows are read for the first time: from memory
  float* sums;
  int64_t stride;
};

// The sum of some rows, each times its weight.
struct Sum {
  const float* rows;
  int64_t stride;        // floats from one row to the next; each has room for a whole vector at its end
  const int64_t* which;  // [count]
  const float* weights;  // [count]
  int count;
  int size;
  void* out;  // [size]
};

struct Kernels {
  // A thread enters before its first item of a call and leaves after the last.
  void (*enter)();
  void (*leave)();
  void (*attend[kNumDTypes])(const Work&);
  // Whether attention to bf16 writes the output past the caches, if it has no other parts to be merged with.
  bool (*streams_out)(const Shape& shape, int rows);
  void (*finish[kNumDTypes])(const Merge&);
  uint64_t (*read)(const void* from, int64_t bytes);  // sum of the memory's words, to measure reading
  void (*lay_out[kNumDTypes])(const Tokens&);
  void (*multiply[kNumDTypes])(const Product&);
  // silu(gate) * up of whole vectors of rows, of which `rows` are written.
  void (*activate[kNumDTypes])(const float* gate, const float* up, int rows, void* to);
  void (*add_up[kNumDTypes])(const Sum&);
};

extern const Kernels kScalarKernels;
extern const Kernels kAmxEmulatedKernels;
#if defined(MOE_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

}  // namespace moe::cpu
