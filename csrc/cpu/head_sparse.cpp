// Gradients of a linear head through those few logits that carry nearly all of them. First the entries of each row that
// matter are picked, up to a share of the row's norm that may be lost; then each meets one row of the weight and one of
// the hidden states, instead of all of them. Every sum is one thread's and has one order.
#include <algorithm>
#include <memory>

#include "head_kernels.h"
#include "rows.h"

namespace rlhf {
inline namespace RLHF_ISA {
namespace {

constexpr int64_t SPAN = 2048;   // columns at a time
constexpr int PARTS = 4;
constexpr int64_t WIDTH = 16 * PARTS;  // hidden units at a time
constexpr int SIZES = 2048;      // of entries: eight per power of two

inline int size_of(float x) { return int((__builtin_bit_cast(uint32_t, x) & 0x7fffffffu) >> 20); }

// Where a row of logits holds its entries.
struct Entries {
  float* values;
  int32_t* columns;

  Entries(const Strip& logits, int64_t row, int64_t vocab)
      : values(as<float>(logits.z) + row * logits.ld), columns(reinterpret_cast<int32_t*>(values + vocab / 2)) {}
};

// The entries of one row that exceed a floor, in order.
class Finder {
 public:
  explicit Finder(int64_t vocab) : columns_(new int32_t[vocab + 16]), values_(new float[vocab + 16]) {}

  void look(const SelectCall& c, int64_t i) {
    const GradCall& g = c.grad;
    const int64_t row = g.index ? g.index[i] : i;
    const Partial* ref = g.reference.z ? g.sums.reference + row : nullptr;
    const Slopes slope = slopes(row_grads<float>(g.upstream, g.targets, row), g.sums.policy[row], ref, g.sums.forward_kl,
                                double(g.work.vocab));
    count_ = 0, norm_ = lost_ = 0;
    for (int64_t first = 0; first < g.work.vocab; first += SPAN) {
      const int64_t count = smaller(SPAN, g.work.vocab - first);
      grad_row<float>(g, slope, row, first, count, line_);
      collect(first, count, c.floor[i]);
    }
    const bool fine = std::isfinite(norm_) && lost_ <= c.allowed;
    if (fine) drop_small(c.allowed);
    c.norm[i] = norm_;
    c.lost[i] = fine && count_ <= c.most ? lost_ : 0;
    c.counts[i] = fine && count_ <= c.most ? count_ : -1;
    if (c.counts[i] < 0) return;
    const Entries to(g.policy, row, g.work.vocab);
    std::copy_n(columns_.get(), count_, to.columns);
    std::copy_n(values_.get(), count_, to.values);
  }

 private:
  void collect(int64_t first, int64_t count, float floor) {
    const __m512 low = _mm512_set1_ps(floor);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 all = _mm512_setzero_ps(), below = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 16) {
      const __mmask16 there = first_lanes(count - k);
      const __m512 x = _mm512_maskz_loadu_ps(there, line_ + k);
      const __mmask16 large = _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(x), low, _CMP_GT_OQ);
      all = _mm512_fmadd_ps(x, x, all);
      below = _mm512_mask3_fmadd_ps(x, x, below, __mmask16(~large));
      if (!large) continue;
      const __m512i column = _mm512_add_epi32(_mm512_set1_epi32(int(first + k)), lanes);
      _mm512_storeu_si512(columns_.get() + count_, _mm512_maskz_compress_epi32(large, column));
      _mm512_storeu_ps(values_.get() + count_, _mm512_maskz_compress_ps(large, x));
      count_ += __builtin_popcount(large);
    }
    norm_ += double(_mm512_reduce_add_ps(all)), lost_ += double(_mm512_reduce_add_ps(below));
  }

  // Leave out the smallest, as many as may go.
  void drop_small(double allowed) {
    std::fill_n(energy_, SIZES, 0.0);
    for (int64_t k = 0; k < count_; ++k) energy_[size_of(values_[k])] += double(values_[k]) * double(values_[k]);
    int least = 0;
    for (; least < SIZES && lost_ + energy_[least] <= allowed; ++least) lost_ += energy_[least];
    int64_t kept = 0;
    for (int64_t k = 0; k < count_; ++k)
      if (size_of(values_[k]) >= least) columns_[kept] = columns_[k], values_[kept] = values_[k], ++kept;
    count_ = kept;
  }

  const std::unique_ptr<int32_t[]> columns_;  // 16 more than there are: whole vectors are stored
  const std::unique_ptr<float[]> values_;
  int64_t count_ = 0;
  double norm_ = 0, lost_ = 0;  // squares
  double energy_[SIZES];
  float line_[SPAN];
};

// The entries column by column; rows count those that have any.
class Columns {
 public:
  explicit Columns(const SparseBackward& c) : starts_(new int64_t[c.work.vocab + 1]()) {
    for_each(c, [&](int64_t, int32_t column, float) { ++starts_[column + 1]; });
    for (int64_t v = 0; v < c.work.vocab; ++v) starts_[v + 1] += starts_[v];
    rows_.reset(new int32_t[starts_[c.work.vocab]]), values_.reset(new float[starts_[c.work.vocab]]);
    std::unique_ptr<int64_t[]> next(new int64_t[c.work.vocab]);
    std::copy_n(starts_.get(), c.work.vocab, next.get());
    for_each(c, [&](int64_t row, int32_t column, float value) {
      const int64_t to = next[column]++;
      rows_[to] = int32_t(row), values_[to] = value;
    });
  }

  int64_t begin(int64_t column) const { return starts_[column]; }
  int64_t end(int64_t column) const { return starts_[column + 1]; }
  int64_t row(int64_t k) const { return rows_[k]; }
  float value(int64_t k) const { return values_[k]; }

 private:
  template <class F>
  static void for_each(const SparseBackward& c, F use) {
    for (int64_t i = 0; i < c.work.rows; ++i) {
      const Entries found(c.logits, c.index[i], c.work.vocab);
      for (int64_t k = 0; k < c.counts[i]; ++k) use(i, found.columns[k], found.values[k]);
    }
  }

  const std::unique_ptr<int64_t[]> starts_;  // [V + 1]
  std::unique_ptr<int32_t[]> rows_;
  std::unique_ptr<float[]> values_;
};

// Both products, a few hidden units at a time: what a column's entries have of them stays in registers, and what rows
// have of them in the second-level cache. The weight and its gradient are passed through once.
template <class S>
class Products {
  using Element = typename S::Type;

 public:
  Products(const SparseBackward& call, const Columns& found)
      : c(call), entries(found), hidden_(c.work.rows * WIDTH), grad_(c.work.rows * WIDTH) {}

  // Hidden units first .. first + WIDTH.
  void run(int64_t first) const {
    for (int j = 0; j < PARTS; ++j) lanes_[j] = first_lanes(c.policy.size - first - 16 * j);
    for (int64_t i = 0; i < c.work.rows; ++i) {
      const Element* from = static_cast<const Element*>(c.policy.hidden) + c.index[i] * c.policy.ld_hidden + first;
      for (int j = 0; j < PARTS; ++j) {
        _mm512_store_ps(hidden_ + i * WIDTH + 16 * j, load(from, j));
        _mm512_store_ps(grad_ + i * WIDTH + 16 * j, _mm512_setzero_ps());
      }
    }
    for (int64_t v = 0; v < c.work.vocab; ++v) column(v, first);
    if (c.sinks.hidden) leave_hidden(first);
  }

 private:
  __m512 load(const Element* from, int j) const { return _mm512_castsi512_ps(S::words(from + 16 * j, lanes_[j])); }

  void column(int64_t v, int64_t first) const {
    const int64_t begin = entries.begin(v), end = entries.end(v);
    if (begin == end && !c.sinks.fresh) return;
    __m512 weight[PARTS], sum[PARTS];
    for (int j = 0; j < PARTS; ++j) sum[j] = _mm512_setzero_ps();
    if (begin < end)
      for (int j = 0; j < PARTS; ++j)
        weight[j] = load(static_cast<const Element*>(c.policy.weight) + v * c.policy.ld_weight + first, j);
    for (int64_t k = begin; k < end; ++k) {
      const __m512 x = _mm512_set1_ps(entries.value(k));
      const float* hidden = hidden_ + entries.row(k) * WIDTH;
      float* grad = grad_ + entries.row(k) * WIDTH;
      for (int j = 0; j < PARTS; ++j) {
        sum[j] = _mm512_fmadd_ps(x, _mm512_load_ps(hidden + 16 * j), sum[j]);
        _mm512_store_ps(grad + 16 * j, _mm512_fmadd_ps(x, weight[j], _mm512_load_ps(grad + 16 * j)));
      }
    }
    if (c.sinks.weight) leave_weight(c.sinks.weight, v * c.sinks.ld_weight + first, sum);
  }

  void leave_weight(void* weight, int64_t at, const __m512* sum) const {
    for (int j = 0; j < PARTS; ++j) {
      if (c.sinks.round_weight) {
        uint16_t* to = static_cast<uint16_t*>(weight) + at + 16 * j;
        const __m512 old = c.sinks.fresh ? _mm512_setzero_ps() : _mm512_castsi512_ps(Bf16::words(to, lanes_[j]));
        _mm256_mask_storeu_epi16(to, lanes_[j], to_bf16(_mm512_add_ps(old, sum[j])));
      } else {
        float* to = static_cast<float*>(weight) + at + 16 * j;
        const __m512 old = c.sinks.fresh ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes_[j], to);
        _mm512_mask_storeu_ps(to, lanes_[j], _mm512_add_ps(old, sum[j]));
      }
    }
  }

  void leave_hidden(int64_t first) const {
    for (int64_t i = 0; i < c.work.rows; ++i)
      for (int j = 0; j < PARTS; ++j) {
        const __m512 sum = _mm512_load_ps(grad_ + i * WIDTH + 16 * j);
        const int64_t at = i * c.policy.size + first + 16 * j;
        if (c.dtype == Dtype::bfloat16)
          _mm256_mask_storeu_epi16(static_cast<uint16_t*>(c.sinks.hidden) + at, lanes_[j], to_bf16(sum));
        else
          _mm512_mask_storeu_ps(static_cast<float*>(c.sinks.hidden) + at, lanes_[j], sum);
      }
  }

  const SparseBackward& c;
  const Columns& entries;
  const Buffer<float> hidden_, grad_;  // [rows, WIDTH]
  mutable __mmask16 lanes_[PARTS];
};

void bias_columns(const SparseBackward& c, const Columns& entries) {
  for (int64_t v = 0; v < c.work.vocab; ++v) {
    float sum = c.sinks.fresh ? 0.0f : c.sinks.bias[v];
    for (int64_t k = entries.begin(v); k < entries.end(v); ++k) sum += entries.value(k);
    c.sinks.bias[v] = sum;
  }
}

template <class F>
void with_elements(Dtype dtype, F use) {
  if (dtype == Dtype::float32) return use(F32());
  if (dtype == Dtype::float16) return use(F16());
  use(Bf16());
}

}  // namespace

void head_select(const SelectCall& call) {
#pragma omp parallel num_threads(call.grad.work.threads)
  {
    Finder finder(call.grad.work.vocab);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < call.grad.work.rows; ++i) finder.look(call, i);
  }
}

void head_sparse(const SparseBackward& call) {
  const Columns entries(call);
  if (call.sinks.bias) bias_columns(call, entries);
  if (!call.sinks.hidden && !call.sinks.weight) return;
  with_elements(call.dtype, [&](auto s) {
#pragma omp parallel num_threads(call.work.threads)
    {
      const Products<decltype(s)> products(call, entries);
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < call.policy.size; first += WIDTH) products.run(first);
    }
  });
}

}  // namespace RLHF_ISA
}  // namespace rlhf
