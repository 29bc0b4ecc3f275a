// The row kernels over many rows. Compiled once per instruction set, under that set's name (RLHF_ISA).
// Every row, or block of a row, is one thread's from beginning to end: results do not depend on scheduling.
#include "rows.h"

namespace rlhf {
inline namespace RLHF_ISA {

template <class T>
void push(const PushCall& c) {
#pragma omp parallel for schedule(static) num_threads(c.work.threads)
  for (int64_t row = 0; row < c.work.rows; ++row) {
    T* z = as<T>(c.policy.z) + row * c.policy.ld;
    T* ref = c.reference.z ? as<T>(c.reference.z) + row * c.reference.ld : nullptr;
    RowTransform<T> transform(c.transform, row), transform_ref(c.transform_reference, row);
    Partial* p_ref = ref ? c.sums.reference + row : nullptr;
    push_row(transform, z, transform_ref, ref, c.policy.first, c.policy.width, c.sums.policy[row], p_ref,
             c.sums.forward_kl);
    keep_targets(c.targets, row, z, c.policy.first, c.policy.width);
  }
}

template <class T>
void finish(const FinishCall& c) {
  for (int64_t row = 0; row < c.work.rows; ++row) {
    const Partial& p = c.sums.policy[row];
    for (int64_t k = row * c.targets.count; k < (row + 1) * c.targets.count; ++k)
      as<T>(c.logp)[k] = T(logp(p, as<T>(c.targets.z)[k]));
    as<T>(c.entropy)[row] = T(entropy(p));
    as<T>(c.lse)[row] = T(lse(p));
    as<T>(c.mean_logit)[row] = T(p.total / double(c.work.vocab));
    as<T>(c.top1)[row] = as<T>(c.targets.z)[row * c.targets.count] >= T(p.most);
    if (!c.kl) continue;
    const Partial& q = c.sums.reference[row];
    as<T>(c.kl)[row] = T(c.sums.forward_kl ? divergence(q, p) : divergence(p, q));
  }
}

template <class T>
void grad(const GradCall& c) {
  constexpr int64_t SPAN = 2048;  // columns at a time
  const int64_t spans = (c.policy.width + SPAN - 1) / SPAN;
#pragma omp parallel for collapse(2) schedule(static) num_threads(c.work.threads)
  for (int64_t i = 0; i < c.work.rows; ++i)
    for (int64_t span = 0; span < spans; ++span) {
      int64_t row = c.index ? c.index[i] : i, offset = span * SPAN;
      int64_t count = c.policy.width - offset < SPAN ? c.policy.width - offset : SPAN;
      const Partial* ref = c.reference.z ? c.sums.reference + row : nullptr;
      Slopes s = slopes(row_grads<T>(c.upstream, c.targets, row), c.sums.policy[row], ref, c.sums.forward_kl,
                        double(c.work.vocab));
      grad_row(c, s, row, offset, count, as<T>(c.grad) + i * c.ld_grad + offset);
    }
}

}  // namespace RLHF_ISA

#define RLHF_JOIN(a, b) a##b
#define RLHF_NAMED(a, b) RLHF_JOIN(a, b)

const Kernels& RLHF_NAMED(kernels_, RLHF_ISA)() {
  static constexpr Kernels table{
      [](const PushCall& c, bool wide) { wide ? push<double>(c) : push<float>(c); },
      [](const FinishCall& c, bool wide) { wide ? finish<double>(c) : finish<float>(c); },
      [](const GradCall& c, bool wide) { wide ? grad<double>(c) : grad<float>(c); },
  };
  return table;
}

}  // namespace rlhf
