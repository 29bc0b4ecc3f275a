// Packed advantages on a GPU: the blocks of core/gae_blocks.h, a thread for a thread.
#include <cuda_runtime.h>

#include "../core/gae_blocks.h"
#include "gae.h"

using namespace rlhf;

namespace {

struct Team {
  template <class X>
  struct Local {
    X of;
    __device__ X& operator[](int) { return of; }
  };

  GaeShared& memory;

  template <class F>
  __device__ void each(F phase) {
    phase(int(threadIdx.x));
  }

  template <class X>
  __device__ void down(Local<X>& from, int offset, Local<X>& to) {
    constexpr int COUNT = sizeof(X) / sizeof(double);
    static_assert(sizeof(X) == COUNT * sizeof(double), "shuffled as doubles");
    const double* source = reinterpret_cast<const double*>(&from.of);
    double* target = reinterpret_cast<double*>(&to.of);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) target[k] = __shfl_down_sync(0xffffffffu, source[k], offset);
  }

  __device__ void count(Local<int>& yes) { yes.of = __popc(__ballot_sync(0xffffffffu, yes.of)); }
  __device__ GaeShared& shared() { return memory; }
  __device__ void sync() { __syncthreads(); }
};

template <class T>
__global__ void __launch_bounds__(GAE_THREADS) gae_carry_kernel(const GaeTask<T> task) {
  __shared__ GaeShared memory;
  Team team{memory};
  gae_carry_block(team, task, blockIdx.x);
}

template <class T>
__global__ void __launch_bounds__(GAE_THREADS) gae_kernel(const GaeTask<T> task) {
  __shared__ GaeShared memory;
  Team team{memory};
  gae_block(team, task, blockIdx.x);
}

template <class T>
cudaError_t launch(const RlhfGae& c, cudaStream_t stream) {
  auto at = [](uintptr_t address) { return reinterpret_cast<T*>(address); };
  const GaeTask<T> task{at(c.rewards), at(c.values), reinterpret_cast<const int64_t*>(c.cu_seqlens),
                        reinterpret_cast<const bool*>(c.mask), at(c.bootstrap), at(c.advantages), at(c.returns),
                        reinterpret_cast<GaeBlock*>(c.scratch), c.rows, c.sequences, gae_tiles(c.rows), c.gamma,
                        c.gamma * c.lam, c.eps, c.whiten};
  const unsigned blocks = unsigned(task.num_blocks());
  gae_carry_kernel<T><<<blocks, GAE_THREADS, 0, stream>>>(task);
  gae_kernel<T><<<blocks, GAE_THREADS, 0, stream>>>(task);
  return cudaGetLastError();
}

}  // namespace

const int64_t RLHF_GAE_SCRATCH = GAE_BLOCKS * int64_t(sizeof(GaeBlock));

const char* rlhf_gae(const RlhfGae* call, int device, uintptr_t stream) {
  if (call->rows == 0) return nullptr;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  auto at = reinterpret_cast<cudaStream_t>(stream);
  error = call->wide ? launch<double>(*call, at) : launch<float>(*call, at);
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int rlhf_cuda_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
