#include "head_kernels.h"

#define RLHF_JOIN(a, b) a##b
#define RLHF_NAMED(a, b) RLHF_JOIN(a, b)

namespace rlhf {

const HeadKernels& RLHF_NAMED(head_kernels_, RLHF_ISA)() {
  static constexpr HeadKernels table{head_forward, head_backward, head_select, head_sparse};
  return table;
}

}  // namespace rlhf
