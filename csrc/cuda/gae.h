// What the binding knows of the GPU: addresses of device memory, a stream as a number, an error as words.
#pragma once
#include <cstdint>

extern "C" {

struct RlhfGae {
  uintptr_t rewards, values, cu_seqlens, mask, bootstrap, advantages, returns;  // mask and bootstrap may be zero
  uintptr_t scratch;                                                            // RLHF_GAE_SCRATCH bytes
  int64_t rows, sequences;
  double gamma, lam, eps;
  bool wide, whiten;
};

extern const int64_t RLHF_GAE_SCRATCH;

// Two launches on a stream of a device. Null, or what CUDA has to say.
const char* rlhf_gae(const RlhfGae* call, int device, uintptr_t stream);

// How many GPUs there are; zero without a driver.
int rlhf_cuda_devices();
}
