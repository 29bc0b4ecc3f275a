// Gradients of a linear head from its logits, a strip of the vocabulary at a time: gradients of logits, packed once for
// each of the two products they enter, then the products. Every tile of a result is one thread's and its sum has one
// order: results depend neither on scheduling nor on the number of threads.
#include "head_kernels.h"
#include "rows.h"

namespace rlhf {
inline namespace RLHF_ISA {
namespace {

constexpr int64_t CHUNK = 8;  // panels of each operand that meet in the second-level cache

template <class W>
class Backward {
  using G = typename W::GradWords;
  using Grad = typename W::Grad;
  using Element = typename W::Type;

 public:
  explicit Backward(const HeadBackward& call)
      : c(call),
        rows(c.grad.work.rows),
        vocab(c.grad.work.vocab),
        size(c.policy.size),
        width(smaller(DEEP * W::PER_WORD, panels(vocab) * LINES)),
        rounded(c.sinks.hidden && c.dtype == Dtype::bfloat16),
        lines_(c.grad.work.threads * (LINES + 2) * width),
        by_row_(c.sinks.hidden ? panels(rows) * LINES * words<W>(width) : 0),
        by_column_(panels(width) * LINES * words<W>(rows)),
        hidden_(c.sinks.weight ? panels(size) * LINES * words<W>(rows) : 0),
        weight_(c.sinks.hidden ? panels(size) * LINES * words<W>(width) : 0),
        total_(rounded ? rows * size : 0),
        grad_hidden(rounded ? static_cast<float*>(total_) : static_cast<float*>(c.sinks.hidden)) {}

  // Inside a parallel region. Loops do not wait for their threads; barriers are where results are needed.
  void run() {
    if (c.sinks.weight) pack_hidden();
    for (int64_t first = 0; first < vocab; first += width) {
      const int64_t count = smaller(width, vocab - first);
      grad_logits(first, count);
      if (c.sinks.hidden) pack_weight(first, count);
#pragma omp barrier
      if (c.sinks.bias) add_to_bias(first, count);
      if (c.sinks.weight) add_to_weight(first, count);
      if (c.sinks.hidden) add_to_hidden(first, count);
#pragma omp barrier
    }
    if (rounded) round_hidden();
  }

 private:
  int64_t row_of(int64_t i) const { return c.grad.index ? c.grad.index[i] : i; }

  // Lines are hidden units, k runs along rows.
  void pack_hidden() {
    const Element* hidden = static_cast<const Element*>(c.policy.hidden);
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < panels(size); ++j)
      pack_across<W>([&](int64_t k) { return hidden + row_of(k) * c.policy.ld_hidden + j * LINES; }, size - j * LINES,
                     rows, hidden_ + j * LINES * words<W>(rows));
  }

  // Lines are hidden units, k runs along the strip.
  void pack_weight(int64_t first, int64_t count) {
    const Element* weight = static_cast<const Element*>(c.policy.weight) + first * c.policy.ld_weight;
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < panels(size); ++j)
      pack_across<W>([&](int64_t k) { return weight + k * c.policy.ld_weight + j * LINES; }, size - j * LINES, count,
                     weight_ + j * LINES * words<W>(count));
  }

  // The next row's logits: they are far from this row's, so nothing else would fetch them in time.
  void prefetch(int64_t row, int64_t first, int64_t count) const {
    const float* z = as<float>(c.grad.policy.z) + row * c.grad.policy.ld + first;
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(z + i);
  }

  // Rows as lines with k along the strip, and columns as lines with k along rows.
  void grad_logits(int64_t first, int64_t count) {
    const GradCall& g = c.grad;
    float* exact = lines_ + this_thread() * (LINES + 2) * width;
    Grad* lines = reinterpret_cast<Grad*>(exact + width);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(rows); ++i) {
      const int64_t have = smaller(LINES, rows - i * LINES);
      const Grad* line[LINES];
      for (int64_t l = 0; l < have; ++l) {
        const int64_t row = row_of(i * LINES + l);
        if (l + 1 < have) prefetch(row_of(i * LINES + l + 1), first, count);
        const Partial* ref = g.reference.z ? g.sums.reference + row : nullptr;
        const Slopes s = slopes(row_grads<float>(g.upstream, g.targets, row), g.sums.policy[row], ref,
                                g.sums.forward_kl, double(vocab));
        grad_row<float>(g, s, row, first, count, exact);
        W::round(exact, lines + l * width, count);
        line[l] = lines + l * width;
      }
      if (c.sinks.hidden) pack_along<G>(line, have, count, by_row_ + i * LINES * words<W>(count));
      for (int64_t j = 0; j < panels(count); ++j)
        pack_across<G>([&](int64_t k) { return line[k] + j * LINES; }, count - j * LINES, have,
                       by_column_ + (j * words<W>(rows) + words<W>(i * LINES)) * LINES);
    }
  }

  Panels columns(int64_t count) const { return {by_column_, words<W>(rows), count}; }

  void add_to_bias(int64_t first, int64_t count) {
    const Panels g = columns(count);
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < panels(count); ++j) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < g.deep; ++k) sum = _mm512_add_ps(sum, G::sum_of(_mm512_load_si512(g.at(j, k))));
      float* bias = c.sinks.bias + first + j * LINES;
      const __mmask16 m = first_lanes(count - j * LINES);
      _mm512_mask_storeu_ps(bias, m, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, bias)));
    }
  }

  void add_to_weight(int64_t first, int64_t count) {
    const Panels g = columns(count), hidden{hidden_, words<W>(rows), size};
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(count); i += CHUNK)
      for (int64_t j = 0; j < panels(size); j += CHUNK)
        multiply<W>(g, i, smaller(i + CHUNK, panels(count)), hidden, j, smaller(j + CHUNK, panels(size)),
                    c.sinks.weight + (first + i * LINES) * c.sinks.ld_weight + j * LINES, c.sinks.ld_weight, true);
  }

  void add_to_hidden(int64_t first, int64_t count) {
    const Panels g{by_row_, words<W>(count), rows}, weight{weight_, words<W>(count), size};
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(rows); i += CHUNK)
      for (int64_t j = 0; j < panels(size); j += CHUNK)
        multiply<W>(g, i, smaller(i + CHUNK, panels(rows)), weight, j, smaller(j + CHUNK, panels(size)),
                    grad_hidden + i * LINES * size + j * LINES, size, first > 0);
  }

  void round_hidden() {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; ++i)
      round_to_bf16(grad_hidden + i * size, static_cast<uint16_t*>(c.sinks.hidden) + i * size, size);
  }

  const HeadBackward& c;
  const int64_t rows, vocab, size, width;
  const bool rounded;
  const Buffer<float> lines_;  // for each thread: a row of exact gradients, then 16 of those that are multiplied
  const Buffer<uint32_t> by_row_, by_column_, hidden_, weight_;
  const Buffer<float> total_;
  float* const grad_hidden;  // [rows, size]
};

}  // namespace

void head_backward(const HeadBackward& call) {
  with_words(call.dtype, [&](auto w) {
    Backward<decltype(w)> backward(call);
#pragma omp parallel num_threads(call.grad.work.threads)
    backward.run();
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf
