#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
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

// Every set there can be; each has all that those before it have.
const std::string NAMES[] = {"scalar", "avx2", "avx512", "avx512bf16"};

auto place_of(const std::string& name) { return std::find(std::begin(NAMES), std::end(NAMES), name); }

// The best set that may be used. One that this machine has not got caps nothing.
std::string cap() {
  const char* wish = std::getenv("RLHF_KERNELS_ISA");
  if (!wish || !*wish) return *std::rbegin(NAMES);
  if (place_of(wish) != std::end(NAMES)) return wish;
  throw std::invalid_argument("RLHF_KERNELS_ISA: got '" + std::string(wish) +
                              "', wants 'scalar', 'avx2', 'avx512' or 'avx512bf16'");
}

std::vector<Isa> found() {
  const auto most = place_of(cap());
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
  while (place_of(all.back().name) > most) all.pop_back();
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
  throw std::invalid_argument("set_isa: '" + name + "' was not compiled or does not run on this machine" +
                              ", or RLHF_KERNELS_ISA forbids it");
}

const Kernels& kernels() { return *chosen()->rows; }

const HeadKernels* head_kernels() { return chosen()->head; }

}  // namespace rlhf
