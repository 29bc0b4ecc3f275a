// The only file that knows Python. Tensors arrive as addresses; whoever calls has checked shapes, dtypes and strides
// and keeps the tensors alive. The interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/head.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace rlhf;
using Address = uintptr_t;  // zero: none

namespace {

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void define_nouns(py::module_& m) {
  py::class_<Work>(m, "Work").def(
      py::init([](int64_t rows, int64_t vocab, int threads) { return Work{rows, vocab, threads}; }), py::kw_only(),
      py::arg("rows"), py::arg("vocab"), py::arg("threads"));
  py::class_<Transform>(m, "Transform")
      .def(py::init([](Address bias, Address temperature, double scale, double softcap) {
             return Transform{at(bias), at(temperature), scale, softcap};
           }),
           py::kw_only(), py::arg("bias") = 0, py::arg("temperature") = 0, py::arg("scale") = 1.0,
           py::arg("softcap") = 0.0);
  py::class_<Strip>(m, "Strip")
      .def(py::init([](Address z, int64_t ld, int64_t first, int64_t width) { return Strip{at(z), ld, first, width}; }),
           py::kw_only(), py::arg("z") = 0, py::arg("ld") = 0, py::arg("first") = 0, py::arg("width") = 0);
  py::class_<Targets>(m, "Targets")
      .def(
          py::init([](Address ids, Address z, int64_t count) { return Targets{at<const int64_t>(ids), at(z), count}; }),
          py::kw_only(), py::arg("ids"), py::arg("z"), py::arg("count"));
  py::class_<Sums>(m, "Sums").def(py::init([](Address policy, Address reference, bool forward_kl) {
                                    return Sums{at<Partial>(policy), at<Partial>(reference), forward_kl};
                                  }),
                                  py::kw_only(), py::arg("policy"), py::arg("reference") = 0,
                                  py::arg("forward_kl") = false);
  py::class_<UpstreamGrads>(m, "UpstreamGrads")
      .def(py::init([](Address logp, Address entropy, Address lse, Address mean_logit, Address kl) {
        return UpstreamGrads{at(logp), at(entropy), at(lse), at(mean_logit), at(kl)};
      }));
  py::class_<Head>(m, "Head").def(
      py::init([](Address hidden, int64_t ld_hidden, Address weight, int64_t ld_weight, int64_t size) {
        return Head{at(hidden), ld_hidden, at(weight), ld_weight, size};
      }),
      py::kw_only(), py::arg("hidden") = 0, py::arg("ld_hidden") = 0, py::arg("weight") = 0, py::arg("ld_weight") = 0,
      py::arg("size") = 0);
  py::class_<Sinks>(m, "Sinks")
      .def(py::init([](Address hidden, Address weight, int64_t ld_weight, Address bias, bool fresh, bool round_weight) {
             return Sinks{at(hidden), at(weight), ld_weight, at<float>(bias), fresh, round_weight};
           }),
           py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("ld_weight"), py::arg("bias"), py::arg("fresh"),
           py::arg("round_weight"));
}

void define_rows(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "push",
      [](bool wide, Work work, Strip policy, Strip reference, Transform transform, Transform transform_reference,
         Targets targets,
         Sums sums) { kernels().push({work, policy, reference, transform, transform_reference, targets, sums}, wide); },
      Unlocked());
  m.def(
      "finish",
      [](bool wide, Work work, Targets targets, Sums sums, Address logp, Address entropy, Address lse,
         Address mean_logit, Address top1, Address kl) {
        kernels().finish({work, targets, sums, at(logp), at(entropy), at(lse), at(mean_logit), at(top1), at(kl)}, wide);
      },
      Unlocked());
  m.def(
      "grad",
      [](bool wide, Work work, Address index, Strip policy, Strip reference, Transform transform, Targets targets,
         Sums sums, UpstreamGrads upstream, Address grad, int64_t ld_grad) {
        kernels().grad(
            {work, at<const int64_t>(index), policy, reference, transform, targets, sums, upstream, at(grad), ld_grad},
            wide);
      },
      Unlocked());
  m.def(
      "gae",
      [](bool wide, Address rewards, Address values, Address cu_seqlens, Address mask, Address bootstrap,
         Address advantages, Address returns, int64_t sequences, double gamma, double lam, int threads) {
        gae({at(rewards), at(values), at<const int64_t>(cu_seqlens), at<const bool>(mask), at(bootstrap),
             at(advantages), at(returns), sequences, gamma, lam, threads},
            wide);
      },
      Unlocked());
}

void define_head(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  m.def("has_head", [] { return head_kernels() != nullptr; });
  m.def(
      "head_forward",
      [](Dtype dtype, Head policy, Head reference, Work work, Strip z, Strip z_reference, Transform transform,
         Transform transform_reference, Targets targets, Sums sums) {
        head_kernels()->forward(
            {dtype, policy, reference, {work, z, z_reference, transform, transform_reference, targets, sums}});
      },
      Unlocked());
  m.def(
      "head_backward",
      [](Dtype dtype, Head policy, Work work, Address index, Strip z, Strip z_reference, Transform transform,
         Targets targets, Sums sums, UpstreamGrads upstream, Sinks sinks) {
        const GradCall grad{work, at<const int64_t>(index), z, z_reference, transform, targets, sums, upstream, nullptr,
                            0};
        head_kernels()->backward({dtype, policy, grad, sinks});
      },
      Unlocked());
  m.def(
      "head_select",
      [](Work work, Address index, Strip policy, Strip reference, Transform transform, Targets targets, Sums sums,
         UpstreamGrads upstream, double allowed, Address floor, int64_t most, Address counts, Address lost,
         Address norm) {
        const GradCall grad{work,      at<const int64_t>(index), policy, reference, transform, targets, sums, upstream,
                            nullptr, 0};
        head_kernels()->select(
            {grad, allowed, at<float>(floor), most, at<int64_t>(counts), at<double>(lost), at<double>(norm)});
      },
      Unlocked());
  m.def(
      "head_sparse",
      [](Dtype dtype, Head policy, Work work, Address index, Strip logits, Address counts, Sinks sinks) {
        head_kernels()->sparse(
            {dtype, policy, work, at<const int64_t>(index), logits, at<const int64_t>(counts), sinks});
      },
      Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("PARTIAL_DOUBLES") = sizeof(Partial) / sizeof(double);
  m.def("isa", &isa);
  m.def("isas", &isas);
  m.def("set_isa", &set_isa);
  m.def("offer_pages", [](Address data, int64_t bytes) { return offer_pages(at(data), bytes); });
  define_nouns(m);
  define_rows(m);
  define_head(m);
}
