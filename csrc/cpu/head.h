// The linear head, matrix products included: float32 logits that were never rounded, whose row sums are taken while
// they are still in cache, and gradients that go straight into the last two products. Only for AVX-512.
#pragma once
#include "kernels.h"

namespace rlhf {

enum class Dtype { float32, bfloat16, float16 };

// A head and its input rows, of one dtype, with contiguous rows.
struct Head {
  const void* hidden;  // [n, size]
  int64_t ld_hidden;
  const void* weight;  // [V, size], or null: there is no such head
  int64_t ld_weight;
  int64_t size;
};

// As PushCall, over the whole vocabulary. Where `push.policy.z` is null the logits are not kept.
struct HeadForward {
  Dtype dtype;
  Head policy, reference;
  PushCall push;
};

// What backward leaves: null where nobody wants it.
struct Sinks {
  void* hidden;  // [r, H] contiguous, bfloat16 for bfloat16, otherwise float32; overwritten
  void* weight;  // [V, H] float32, or bfloat16 where `round_weight`
  int64_t ld_weight;
  float* bias;        // [V]
  bool fresh;         // weight and bias are overwritten, otherwise added to
  bool round_weight;  // only where fresh
};

// As GradCall, over the whole vocabulary and on into the sinks; `grad.grad` is not used.
struct HeadBackward {
  Dtype dtype;
  Head policy;
  GradCall grad;
  Sinks sinks;
};

// Entries of the gradients of logits that carry all of them but what each row may lose. They take the place of the row's
// logits: values from its beginning on, columns (int32, ascending) from its middle on.
struct SelectCall {
  GradCall grad;  // over the whole vocabulary; `grad.grad` is not used
  double allowed;       // squared norm that a row may lose
  const float* floor;   // [rows] entries below it have no larger norm together
  int64_t most;         // entries of a row, at most half the vocabulary
  int64_t* counts;      // [rows], or -1: a row that needs more
  double *lost, *norm;  // [rows] squared norm of what was left out (zero where the count is -1), and of everything
};

// Rows index[i] of the hidden states and of the logits, where their entries are. No count is -1. A bfloat16 weight may be
// added to.
struct SparseBackward {
  Dtype dtype;
  Head policy;
  Work work;
  const int64_t* index;
  Strip logits;
  const int64_t* counts;
  Sinks sinks;
};

struct HeadKernels {
  void (*forward)(const HeadForward&);
  void (*backward)(const HeadBackward&);
  void (*select)(const SelectCall&);
  void (*sparse)(const SparseBackward&);
};

const HeadKernels* head_kernels();  // null where there are none
const HeadKernels& head_kernels_avx512();
const HeadKernels& head_kernels_avx512bf16();

}  // namespace rlhf
