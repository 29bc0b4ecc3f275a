// The two halves of the head for one instruction set, and how its dtypes are multiplied.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "panels.h"

namespace rlhf {
inline namespace RLHF_ISA {

void head_forward(const HeadForward&);
void head_backward(const HeadBackward&);
void head_select(const SelectCall&);
void head_sparse(const SparseBackward&);

// Calls `use` with the words in which a dtype is multiplied. float16 is widened: its own sums would overflow, and no
// machine of this kind multiplies it faster.
template <class F>
void with_words(Dtype dtype, F use) {
  if (dtype == Dtype::float32) return use(Single<F32>());
  if (dtype == Dtype::float16) return use(Single<F16>());
#ifdef __AVX512BF16__
  use(Pair());
#else
  use(Single<Bf16>());
#endif
}

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace RLHF_ISA
}  // namespace rlhf
