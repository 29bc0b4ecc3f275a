// Scores and logits of a linear head. The vocabulary is cut into ranges, each one thread's from beginning to end, and
// their sums are folded in order: results depend neither on scheduling nor on the number of threads.
#include "head_kernels.h"
#include "panels.h"
#include "rows.h"

namespace rlhf {
inline namespace RLHF_ISA {
namespace {

constexpr int64_t RANGES = 64;               // of the vocabulary; more would only make more sums to fold
constexpr int64_t CACHED = 512 * 1024;       // bytes of packed weight that stay in the second-level cache
constexpr int64_t KEPT_IN_CACHE = 8 << 20;   // bytes of logits
constexpr int64_t NARROW = 64, WIDE = 1024;  // columns of a block

template <class W>
using Element = const typename W::Type*;

// A head's rows, packed once for all blocks.
template <class W>
class Product {
 public:
  Product(const Head& head, int64_t rows, int threads)
      : head_(head), deep_(words<W>(head.size)), rows_(rows), packed_(panels(rows) * LINES * deep_) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < panels(rows); ++i)
      pack(static_cast<Element<W>>(head.hidden), head.ld_hidden, i * LINES, rows, packed_ + i * LINES * deep_);
  }

  int64_t deep() const { return deep_; }

  void pack_weight(int64_t first, int64_t width, uint32_t* panel) const {
    for (int64_t j = 0; j < width; j += LINES)
      pack(static_cast<Element<W>>(head_.weight), head_.ld_weight, first + j, first + width, panel + j * deep_);
  }

  // Products of row panel i with `width` packed columns, into [16, ld].
  void into(int64_t i, const uint32_t* weight, int64_t width, float* z, int64_t ld) const {
    multiply<W>({packed_, deep_, rows_}, i, i + 1, {weight, deep_, width}, 0, panels(width), z, ld, false);
  }

 private:
  void pack(Element<W> matrix, int64_t ld, int64_t first, int64_t end, uint32_t* panel) const {
    Element<W> lines[LINES];
    const int64_t count = smaller(LINES, end - first);
    for (int64_t i = 0; i < count; ++i) lines[i] = matrix + (first + i) * ld;
    pack_along<W>(lines, count, head_.size, panel);
  }

  const Head head_;
  const int64_t deep_, rows_;
  Buffer<uint32_t> packed_;
};

struct Blocks {
  int64_t width, count, ranges, vocab;

  Blocks(int64_t vocab_, int64_t deep) : vocab(vocab_) {
    width = smaller(smaller(CACHED / (deep * 4), WIDE), (vocab + RANGES - 1) / RANGES);
    width = panels(width < NARROW ? NARROW : width) * LINES;
    count = (vocab + width - 1) / width;
    ranges = smaller(count, RANGES);
  }
  int64_t begin(int64_t range) const { return range * count / ranges; }
};

// What the threads need of their own for a head, or for none.
template <class W>
class Scratch {
 public:
  Scratch(const Product<W>* product, int64_t width, int threads)
      : deep_(product ? product->deep() : 0),
        width_(product ? width : 0),
        weights_(threads * width_ * deep_),
        logits_(threads * LINES * width_) {}
  uint32_t* weight(int thread) const { return weights_ + thread * width_ * deep_; }
  float* logits(int thread) const { return logits_ + thread * LINES * width_; }

 private:
  const int64_t deep_, width_;
  Buffer<uint32_t> weights_;
  Buffer<float> logits_;
};

// Copy logits to where backward will find them: past the caches, if they will not be in them by then anyway.
void keep(const Strip& strip, int64_t row, int64_t first, int64_t width, const float* z, bool past_caches) {
  if (!strip.z) return;
  float* to = as<float>(strip.z) + row * strip.ld + first;
  if (!past_caches) {
    std::memcpy(to, z, size_t(width) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i < width && reinterpret_cast<uintptr_t>(to + i) % 64; ++i) to[i] = z[i];
  for (; i + 16 <= width; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(z + i));
  for (; i < width; ++i) to[i] = z[i];
}

template <class W>
void block(const PushCall& c, const Product<W>& policy, const Product<W>* reference, const Scratch<W>& mine,
           const Scratch<W>& other, int64_t width, int64_t first, int64_t count, Partial* sums, Partial* sums_ref) {
  const int thread = this_thread();
  const bool past_caches = c.work.rows * c.work.vocab * int64_t(sizeof(float)) > KEPT_IN_CACHE;
  policy.pack_weight(first, count, mine.weight(thread));
  if (reference) reference->pack_weight(first, count, other.weight(thread));
  for (int64_t i = 0; i < panels(c.work.rows); ++i) {
    policy.into(i, mine.weight(thread), count, mine.logits(thread), width);
    if (reference) reference->into(i, other.weight(thread), count, other.logits(thread), width);
    for (int64_t row = i * LINES; row < smaller(c.work.rows, (i + 1) * LINES); ++row) {
      float* z = mine.logits(thread) + (row - i * LINES) * width;
      float* ref = reference ? other.logits(thread) + (row - i * LINES) * width : nullptr;
      push_row<float>({c.transform, row}, z, {c.transform_reference, row}, ref, first, count, sums[row],
                      ref ? sums_ref + row : nullptr, c.sums.forward_kl);
      keep_targets(c.targets, row, z, first, count);
      keep(c.policy, row, first, count, z, past_caches);
      if (ref) keep(c.reference, row, first, count, ref, past_caches);
    }
  }
  _mm_sfence();  // what went past the caches must be seen by other threads
}

void fold_ranges(int64_t rows, int64_t ranges, const Partial* sums, Partial* into, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t range = 0; range < ranges; ++range) into[row] = fold(into[row], sums[range * rows + row]);
}

template <class W>
void run(const HeadForward& call, const Product<W>& policy, const Product<W>* reference) {
  const PushCall& c = call.push;
  const int64_t rows = c.work.rows,
                deepest = reference && reference->deep() > policy.deep() ? reference->deep() : policy.deep();
  const Blocks blocks(c.work.vocab, deepest);
  Buffer<Partial> sums(blocks.ranges * rows), sums_ref(reference ? blocks.ranges * rows : 0);
  const Scratch<W> mine(&policy, blocks.width, c.work.threads), other(reference, blocks.width, c.work.threads);
#pragma omp parallel for schedule(dynamic) num_threads(c.work.threads)
  for (int64_t range = 0; range < blocks.ranges; ++range) {
    Partial *p = sums + range * rows, *q = reference ? sums_ref + range * rows : nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      p[row] = Partial();
      if (q) q[row] = Partial();
    }
    for (int64_t b = blocks.begin(range); b < blocks.begin(range + 1); ++b) {
      const int64_t first = b * blocks.width;
      block(c, policy, reference, mine, other, blocks.width, first, smaller(blocks.width, c.work.vocab - first), p, q);
    }
  }
  fold_ranges(rows, blocks.ranges, sums, c.sums.policy, c.work.threads);
  if (reference) fold_ranges(rows, blocks.ranges, sums_ref, c.sums.reference, c.work.threads);
}

template <class W>
void forward(const HeadForward& call) {
  const Product<W> policy(call.policy, call.push.work.rows, call.push.work.threads);
  if (!call.reference.weight) return run<W>(call, policy, nullptr);
  const Product<W> reference(call.reference, call.push.work.rows, call.push.work.threads);
  run<W>(call, policy, &reference);
}

}  // namespace

void head_forward(const HeadForward& call) {
  with_words(call.dtype, [&](auto w) { forward<decltype(w)>(call); });
}

}  // namespace RLHF_ISA
}  // namespace rlhf
