// What the CPU kernels are called with. Pointers are float or double as the call says; leading dimensions count
// elements. n rows, V vocabulary, H hidden, K ids asked for per row.
#pragma once
#include <cstdint>

#include "../core/token_stats.h"

namespace rlhf {

// From products to logits: z = softcap(scale * (product + bias)) / temperature.
struct Transform {
  const void* bias;         // [V] or null
  const void* temperature;  // [n] or null
  double scale;
  double softcap;  // zero: none
};

// Columns first .. first + width of the logits of some rows.
struct Strip {
  void* z;  // the element [0, first], or null: there is no such head
  int64_t ld;
  int64_t first;
  int64_t width;
};

struct Targets {
  const int64_t* ids;  // [n, K]
  void* z;             // [n, K] the logits of these ids
  int64_t count;       // K
};

// The sums of n rows so far; `reference` is null without one.
struct Sums {
  Partial* policy;
  Partial* reference;
  bool forward_kl;
};

struct Work {
  int64_t rows;
  int64_t vocab;
  int threads;
};

// Raw products become logits in place, and the sums and the targets' logits learn of them.
struct PushCall {
  Work work;
  Strip policy, reference;
  Transform transform, transform_reference;
  Targets targets;
  Sums sums;
};

// Sums become statistics.
struct FinishCall {
  Work work;
  Targets targets;
  Sums sums;
  void *logp, *entropy, *lse, *mean_logit, *top1, *kl;  // [n, K], then [n]; kl may be null
};

struct UpstreamGrads {
  const void *logp, *entropy, *lse, *mean_logit, *kl;  // [n, K], then [n]
};

// d loss / d product of `work.rows` rows: row i of `grad` belongs to row index[i] of everything else.
struct GradCall {
  Work work;
  const int64_t* index;  // null: row i
  Strip policy, reference;
  Transform transform;
  Targets targets;
  Sums sums;
  UpstreamGrads upstream;
  void* grad;  // [rows, width]
  int64_t ld_grad;
};

struct Kernels {
  void (*push)(const PushCall&, bool wide);
  void (*finish)(const FinishCall&, bool wide);
  void (*grad)(const GradCall&, bool wide);
};

const Kernels& kernels();
const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

struct GaeCall {
  const void *rewards, *values;  // [N]
  const int64_t* cu_seqlens;     // [S + 1]
  const bool* mask;              // [N] or null
  const void* bootstrap;         // [S] or null
  void *advantages, *returns;    // [N]
  int64_t sequences;
  double gamma, lam;
  int threads;
};

void gae(const GaeCall&, bool wide);

}  // namespace rlhf
