#include "dispatch.h"

#include <stdexcept>

#include "head.h"
#include "kernels.h"

namespace rlhf {
namespace {

struct Isa {
  std::string name;
  const Kernels* rows;
  const HeadKernels* head;
};

std::vector<Isa> found() {
  std::vector<Isa> all{{"scalar", &kernels_scalar(), nullptr}};
#ifdef RLHF_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    all.push_back({"avx2", &kernels_avx2(), nullptr});
#endif
#ifdef RLHF_HAS_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) all.push_back({"avx512", &kernels_avx512(), &head_kernels_avx512()});
#ifdef RLHF_HAS_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
    all.push_back({"avx512bf16", &kernels_avx512(), &head_kernels_avx512bf16()});
#endif
#endif
  return all;
}

const std::vector<Isa>& available() {
  static const std::vector<Isa> all = found();
  return all;
}

const Isa*& chosen() {
  static const Isa* isa = &available().back();
  return isa;
}

}  // namespace

std::string isa() { return chosen()->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& x : available()) names.push_back(x.name);
  return names;
}

void set_isa(const std::string& name) {
  for (const Isa& x : available())
    if (x.name == name) {
      chosen() = &x;
      return;
    }
  throw std::invalid_argument("set_isa: '" + name + "' was not compiled or does not run on this machine");
}

const Kernels& kernels() { return *chosen()->rows; }

const HeadKernels* head_kernels() { return chosen()->head; }

}  // namespace rlhf
