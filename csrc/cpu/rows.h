// One block of one row: products to logits, logits to sums, sums to gradients. Compiled once per instruction set.
#pragma once
#include "kernels.h"
#include "vector_math.h"

namespace rlhf {
inline namespace RLHF_ISA {

// Partial sums of a row: a vector of floats. Which of them an element joins is written out below, so that neither numbers
// nor their accuracy are up to the compiler.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
// So many elements meet in a lane, in T, before the sum goes on in double; so many of a row are taken at a time.
constexpr int64_t DEPTH = 64;
constexpr int64_t BLOCK = DEPTH * LANES;

template <class T>
inline const T* as(const void* p) {
  return static_cast<const T*>(p);
}

template <class T>
inline T* as(void* p) {
  return static_cast<T*>(p);
}

// A transform for one row, whose temperature is known.
template <class T>
struct RowTransform {
  const T* bias;
  T before, cap, after;  // z = after * cap tanh(before * (x + bias)), or before * (x + bias) without a cap
  bool identity;

  RowTransform(const Transform& t, int64_t row) : bias(as<T>(t.bias)), cap(T(t.softcap)), identity(false) {
    double inverse = t.temperature ? 1 / double(as<T>(t.temperature)[row]) : 1;
    before = T(t.softcap > 0 ? t.scale / t.softcap : t.scale * inverse);
    after = T(t.softcap * inverse);
    identity = !bias && cap == 0 && before == 1;
  }

  // `first` is the column of z[0].
  void operator()(T* z, int64_t first, int64_t count) const {
    if (identity) return;
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] += bias[first + i];
    }
    if (cap > 0) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] = after * tanh_of(before * z[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] *= before;
    }
  }

  // d z / d x, from z
  void chain(T* grad, const T* z, int64_t count) const {
    if (cap > 0) {
      T back = 1 / after, slope = before * after;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] *= slope * (1 - (z[i] * back) * (z[i] * back));
    } else if (before != 1) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad[i] *= before;
    }
  }
};

template <class T>
inline T largest(const T* z, int64_t count) {
  T most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = most < z[i] ? z[i] : most;
  return most;
}

template <class T>
struct Lanes {
  T of[LANES] = {};

  double sum() const {
    double half[LANES / 2];
#pragma omp simd
    for (int64_t i = 0; i < LANES / 2; ++i) half[i] = double(of[i]) + double(of[i + LANES / 2]);
    for (int64_t left = LANES / 4; left > 0; left /= 2)
      for (int64_t i = 0; i < left; ++i) half[i] += half[i + left];
    return half[0];
  }
};

// What one element adds to one lane of each sum.
template <class T>
struct BlockSums {
  Lanes<T> rest, slope, ties, mean;  // The mean of a lane cannot overflow where its sum would.

  void add(int64_t lane, T z, T most) {
    T d = at_least(z - most, T(-1000));  // 0 * inf is not wanted below
    T e = exp_nonpositive(d);
    ties.of[lane] += d == 0 ? T(1) : T(0);
    rest.of[lane] += d == 0 ? T(0) : e;
    slope.of[lane] += e * d;
    mean.of[lane] += z * (T(1) / DEPTH);
  }
};

// Add a block of logits to the sums; with `other`, the gap to a second head's logits too.
template <class T>
inline void push_block(Partial& p, const T* z, const T* other, int64_t count) {
  double most = largest(z, count);
  if (most > p.most) p = raised(p, most);
  if (p.most == -INFINITY) {
    T total = 0;
    for (int64_t i = 0; i < count; ++i) total += z[i];
    p.total += total;
    if (total != total) p.rest = p.total;  // a NaN is nobody's maximum; it must not get lost
    return;
  }
  const T m = T(p.most);
  const int64_t full = count / LANES * LANES;
  BlockSums<T> sums;
  for (int64_t i = 0; i < full; i += LANES) {
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; ++lane) sums.add(lane, z[i + lane], m);
  }
  for (int64_t i = full; i < count; ++i) sums.add(i - full, z[i], m);
  p.ties += sums.ties.sum(), p.rest += sums.rest.sum(), p.slope += sums.slope.sum();
  p.total += sums.mean.sum() * DEPTH;
  if (!other) return;
  double gap = 0;
#pragma omp simd reduction(+ : gap)
  for (int64_t i = 0; i < count; ++i) {
    T e = exp_nonpositive(z[i] - m);
    double term = double(e) * double(z[i] - other[i]);
    gap += e == 0 ? 0.0 : term;
  }
  p.gap += gap;
}

// Products to logits, in place, and on into the sums of a row. `width` may be any number.
template <class T>
inline void push_row(const RowTransform<T>& transform, T* z, const RowTransform<T>& transform_ref, T* ref,
                     int64_t first, int64_t width, Partial& p, Partial* p_ref, bool forward_kl) {
  for (int64_t i = 0; i < width; i += BLOCK) {
    int64_t count = width - i < BLOCK ? width - i : BLOCK;
    T* other = ref ? ref + i : nullptr;
    transform(z + i, first + i, count);
    if (ref) transform_ref(other, first + i, count);
    push_block<T>(p, z + i, forward_kl ? nullptr : other, count);
    if (ref) push_block<T>(*p_ref, other, forward_kl ? z + i : nullptr, count);
  }
}

// Keep the logits of the ids that lie in these columns.
template <class T>
inline void keep_targets(const Targets& t, int64_t row, const T* z, int64_t first, int64_t width) {
  for (int64_t k = row * t.count; k < (row + 1) * t.count; ++k)
    if (t.ids[k] >= first && t.ids[k] < first + width) as<T>(t.z)[k] = z[t.ids[k] - first];
}

template <class T>
inline RowGrads row_grads(const UpstreamGrads& g, const Targets& t, int64_t row) {
  double logp = 0;
  for (int64_t k = row * t.count; k < (row + 1) * t.count; ++k) logp += as<T>(g.logp)[k];
  return {logp, as<T>(g.entropy)[row], as<T>(g.lse)[row], as<T>(g.mean_logit)[row], as<T>(g.kl)[row]};
}

// d loss / d z of a block, targets aside.
template <class T>
inline void grad_block(const Slopes& s, const T* z, const T* ref, T* grad, int64_t count) {
  // the log-sum-exp in two parts: rounding it to T would put the same error into every p of the row
  const T high = T(s.lse), low = T(s.lse - double(high)), high_ref = T(s.lse_ref),
          low_ref = T(s.lse_ref - double(high_ref));
  const T base = T(s.base), by_log_p = T(s.by_log_p), by_log_q = T(s.by_log_q), by_q = T(s.by_q), shift = T(s.shift);
  const T floor = T(-10000);  // log 0, as far as sums are concerned
  if (!ref) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      T log_p = at_least((z[i] - high) - low, floor);
      grad[i] = exp_nonpositive(log_p) * (base + by_log_p * log_p) + shift;
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T log_p = at_least((z[i] - high) - low, floor), log_q = at_least((ref[i] - high_ref) - low_ref, floor);
    T slope = base + by_log_p * log_p + by_log_q * log_q;
    grad[i] = exp_nonpositive(log_p) * slope + by_q * exp_nonpositive(log_q) + shift;
  }
}

// d loss / d product for columns `offset` and following of one row, into `out`.
template <class T>
inline void grad_row(const GradCall& c, const Slopes& s, int64_t row, int64_t offset, int64_t count, T* out) {
  const T* z = as<T>(c.policy.z) + row * c.policy.ld + offset;
  const T* ref = c.reference.z ? as<T>(c.reference.z) + row * c.reference.ld + offset : nullptr;
  grad_block<T>(s, z, ref, out, count);
  const Targets& t = c.targets;
  int64_t first = c.policy.first + offset;
  for (int64_t k = row * t.count; k < (row + 1) * t.count; ++k) {
    int64_t id = t.ids[k];
    if (id < first || id >= first + count) continue;
    double g = 0;  // the same id may have been asked for more than once
    for (int64_t j = row * t.count; j < (row + 1) * t.count; ++j)
      g += t.ids[j] == id ? as<T>(c.upstream.logp)[j] : T(0);
    double log_q = ref ? ref[id - first] - s.lse_ref : 0;
    out[id - first] = T(grad_target(s, g, logp(c.sums.policy[row], z[id - first]), log_q));
  }
  RowTransform<T>(c.transform, row).chain(out, z, count);
}

}  // namespace RLHF_ISA
}  // namespace rlhf
