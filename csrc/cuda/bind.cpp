// The Python of the CUDA kernels, a module of its own: the CPU's must not depend on CUDA. Tensors arrive as addresses
// and a stream as a number; whoever calls has checked shapes, dtypes and devices and keeps the tensors alive.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "gae.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.def("devices", &rlhf_cuda_devices);
  m.attr("GAE_SCRATCH_BYTES") = RLHF_GAE_SCRATCH;
  m.def(
      "gae",
      [](bool wide, uintptr_t rewards, uintptr_t values, uintptr_t cu_seqlens, uintptr_t mask, uintptr_t bootstrap,
         uintptr_t advantages, uintptr_t returns, uintptr_t scratch, int64_t rows, int64_t sequences, double gamma,
         double lam, double eps, bool whiten, int device, uintptr_t stream) {
        const RlhfGae call{rewards, values, cu_seqlens, mask, bootstrap, advantages, returns, scratch,
                           rows,    sequences, gamma,   lam,  eps,       wide,       whiten};
        if (const char* error = rlhf_gae(&call, device, stream)) throw std::runtime_error(error);
      },
      py::call_guard<py::gil_scoped_release>());
}
