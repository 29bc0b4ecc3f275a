// Gradients of a linear head from its logits, a strip of the vocabulary at a time: gradients of logits, packed once for
// each of the two products they enter, then the products. Every tile of a result is one thread's and its sum has one
// order: results depend neither on scheduling nor on the number of threads. There are two sets of packed operands, so
// that threads go on to the next strip before all are through with this one and seldom wait for each other.
#include "head_kernels.h"
#include "rows.h"

namespace rlhf {
inline namespace RLHF_ISA {
namespace {

constexpr int64_t CHUNK = 8;  // panels of each operand that meet in the second-level cache
constexpr int64_t SIDE = CHUNK * LINES;
constexpr int64_t PAGE = 4096;  // bytes, the smallest there are

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
        strips((vocab + width - 1) / width),
        size_by_row(c.sinks.hidden ? panels(rows) * LINES * words<W>(width) : 0),
        size_by_column(panels(width) * LINES * words<W>(rows)),
        size_weight(c.sinks.hidden ? panels(size) * LINES * words<W>(width) : 0),
        lines_(c.grad.work.threads * (LINES + 2) * width),
        packed_(2 * (size_by_row + size_by_column + size_weight)),
        hidden_(c.sinks.weight ? panels(size) * LINES * words<W>(rows) : 0),
        total_(rounded ? rows * size : 0),
        sums_(c.sinks.weight && c.sinks.round_weight ? c.grad.work.threads * SIDE * SIDE : 0),
        grad_hidden(rounded ? static_cast<float*>(total_) : static_cast<float*>(c.sinks.hidden)) {}

  // Inside a parallel region. Loops do not wait for their threads; a barrier does.
  void run() const {
    if (c.sinks.weight) pack_hidden();
    pack(strip(0));
    for (int64_t i = 0; i < strips; ++i) {
#pragma omp barrier
      if (c.sinks.bias) add_to_bias(strip(i));
      if (c.sinks.weight) add_to_weight(strip(i));
      if (c.sinks.hidden) add_to_hidden(strip(i));
      if (i + 1 < strips) pack(strip(i + 1));
    }
#pragma omp barrier
    if (rounded) round_hidden();
  }

 private:
  // Columns first .. first + count, and where what the products need of them is packed.
  struct Strip {
    int64_t first, count;
    uint32_t *by_row, *by_column, *weight;
  };

  Strip strip(int64_t i) const {
    uint32_t* set = packed_ + i % 2 * (size_by_row + size_by_column + size_weight);
    return {i * width, smaller(width, vocab - i * width), set, set + size_by_row, set + size_by_row + size_by_column};
  }

  int64_t row_of(int64_t i) const { return c.grad.index ? c.grad.index[i] : i; }

  // Lines are hidden units, k runs along rows.
  void pack_hidden() const {
    const Element* hidden = static_cast<const Element*>(c.policy.hidden);
#pragma omp for schedule(dynamic) nowait
    for (int64_t j = 0; j < panels(size); ++j)
      pack_across<W>([&](int64_t k) { return hidden + row_of(k) * c.policy.ld_hidden + j * LINES; }, size - j * LINES,
                     rows, hidden_ + j * LINES * words<W>(rows));
  }

  // Lines are hidden units, k runs along the strip.
  void pack_weight(const Strip& s) const {
    const Element* weight = static_cast<const Element*>(c.policy.weight) + s.first * c.policy.ld_weight;
#pragma omp for schedule(dynamic) nowait
    for (int64_t j = 0; j < panels(size); ++j)
      pack_across<W>([&](int64_t k) { return weight + k * c.policy.ld_weight + j * LINES; }, size - j * LINES, s.count,
                     s.weight + j * LINES * words<W>(s.count));
  }

  void pack(const Strip& s) const {
    if (c.sinks.weight && c.sinks.fresh) touch_weight(s);
    if (c.sinks.hidden) pack_weight(s);
    grad_logits(s);
  }

  // Fresh memory has mostly no pages yet. They are cheaper one after the other than in the middle of a product.
  void touch_weight(const Strip& s) const {
    const int64_t bytes = c.sinks.round_weight ? 2 : 4;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s.count; ++i) {
      char* row = static_cast<char*>(c.sinks.weight) + (s.first + i) * c.sinks.ld_weight * bytes;
      for (int64_t k = 0; k < size * bytes; k += PAGE) row[k] = 0;
    }
  }

  // The next row's logits: they are far from this row's, so nothing else would fetch them in time.
  void prefetch(int64_t row, const Strip& s) const {
    const float* z = as<float>(c.grad.policy.z) + row * c.grad.policy.ld + s.first;
    for (int64_t i = 0; i < s.count; i += 16) __builtin_prefetch(z + i);
  }

  // Rows as lines with k along the strip, and columns as lines with k along rows.
  void grad_logits(const Strip& s) const {
    const GradCall& g = c.grad;
    float* exact = lines_ + this_thread() * (LINES + 2) * width;
    Grad* lines = reinterpret_cast<Grad*>(exact + width);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(rows); ++i) {
      const int64_t have = smaller(LINES, rows - i * LINES);
      const Grad* line[LINES];
      for (int64_t l = 0; l < have; ++l) {
        const int64_t row = row_of(i * LINES + l);
        if (l + 1 < have) prefetch(row_of(i * LINES + l + 1), s);
        const Partial* ref = g.reference.z ? g.sums.reference + row : nullptr;
        const Slopes slope = slopes(row_grads<float>(g.upstream, g.targets, row), g.sums.policy[row], ref,
                                    g.sums.forward_kl, double(vocab));
        grad_row<float>(g, slope, row, s.first, s.count, exact);
        W::round(exact, lines + l * width, s.count);
        line[l] = lines + l * width;
      }
      if (c.sinks.hidden) pack_along<G>(line, have, s.count, s.by_row + i * LINES * words<W>(s.count));
      for (int64_t j = 0; j < panels(s.count); ++j)
        pack_across<G>([&](int64_t k) { return line[k] + j * LINES; }, s.count - j * LINES, have,
                       s.by_column + (j * words<W>(rows) + words<W>(i * LINES)) * LINES);
    }
  }

  void add_to_bias(const Strip& s) const {
    const Panels g{s.by_column, words<W>(rows), s.count};
#pragma omp for schedule(dynamic) nowait
    for (int64_t j = 0; j < panels(s.count); ++j) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < g.deep; ++k) sum = _mm512_add_ps(sum, G::sum_of(_mm512_load_si512(g.at(j, k))));
      float* bias = c.sinks.bias + s.first + j * LINES;
      const __mmask16 m = first_lanes(s.count - j * LINES);
      if (!c.sinks.fresh) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, bias));
      _mm512_mask_storeu_ps(bias, m, sum);
    }
  }

  void add_to_weight(const Strip& s) const {
    const Panels g{s.by_column, words<W>(rows), s.count}, hidden{hidden_, words<W>(rows), size};
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(s.count); i += CHUNK)
      for (int64_t j = 0; j < panels(size); j += CHUNK) {
        const int64_t at = (s.first + i * LINES) * c.sinks.ld_weight + j * LINES;
        float* sums = c.sinks.round_weight ? sums_ + this_thread() * SIDE * SIDE
                                           : static_cast<float*>(c.sinks.weight) + at;
        multiply<W>(g, i, smaller(i + CHUNK, panels(s.count)), hidden, j, smaller(j + CHUNK, panels(size)), sums,
                    c.sinks.round_weight ? SIDE : c.sinks.ld_weight, !c.sinks.fresh);
        if (!c.sinks.round_weight) continue;
        uint16_t* weight = static_cast<uint16_t*>(c.sinks.weight) + at;
        for (int64_t k = 0; k < smaller(SIDE, s.count - i * LINES); ++k)
          round_to_bf16(sums + k * SIDE, weight + k * c.sinks.ld_weight, smaller(SIDE, size - j * LINES));
      }
  }

  void add_to_hidden(const Strip& s) const {
    const Panels g{s.by_row, words<W>(s.count), rows}, weight{s.weight, words<W>(s.count), size};
#pragma omp for collapse(2) schedule(dynamic) nowait
    for (int64_t i = 0; i < panels(rows); i += CHUNK)
      for (int64_t j = 0; j < panels(size); j += CHUNK)
        multiply<W>(g, i, smaller(i + CHUNK, panels(rows)), weight, j, smaller(j + CHUNK, panels(size)),
                    grad_hidden + i * LINES * size + j * LINES, size, s.first > 0);
  }

  void round_hidden() const {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; ++i)
      round_to_bf16(grad_hidden + i * size, static_cast<uint16_t*>(c.sinks.hidden) + i * size, size);
  }

  const HeadBackward& c;
  const int64_t rows, vocab, size, width;
  const bool rounded;
  const int64_t strips, size_by_row, size_by_column, size_weight;
  const Buffer<float> lines_;  // for each thread: a row of exact gradients, then 16 of those that are multiplied
  const Buffer<uint32_t> packed_, hidden_;
  const Buffer<float> total_;
  const Buffer<float> sums_;  // for each thread: a block of the weight's gradient that is still to be rounded
  float* const grad_hidden;  // [rows, size]
};

}  // namespace

void head_backward(const HeadBackward& call) {
  with_words(call.dtype, [&](auto w) {
    const Backward<decltype(w)> backward(call);
#pragma omp parallel num_threads(call.grad.work.threads)
    backward.run();
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf
