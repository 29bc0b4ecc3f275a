// What a row of logits says, and what its logits owe to a loss. Once for CPU and CUDA.
#pragma once
#include "portable.h"

namespace rlhf {

// Softmax sums over a part of a row; a commutative monoid under fold().
// `ties` counts the largest logits and `rest` sums the others: 1 - p keeps its digits when p is almost one.
// `slope` is never positive, so lse and entropy are sums of like signs, without cancellation.
struct Partial {
  double most = -INFINITY;  // max z
  double ties = 0;          // how many z are equal to it
  double rest = 0;          // sum of e^(z - most) over the others
  double slope = 0;         // sum of e^(z - most) (z - most)
  double gap = 0;           // sum of e^(z - most) (z - other), other being a second head's logit
  double total = 0;         // sum of z
};

// d loss / d statistic of one row.
struct RowGrads {
  double logp, entropy, lse, mean_logit, kl;  // logp: summed over the ids asked for
};

// The gradient of any loss of the statistics, as coefficients of one row:
// dz = p (base + by_log_p log p + by_log_q log q) + by_q q + shift, and d loss / d logp on top where z is a target.
struct Slopes {
  double lse, lse_ref;
  double base, by_log_p, by_log_q, by_q, shift;
};

inline namespace RLHF_ISA {

RLHF_HD double mass(const Partial& p) { return p.ties + p.rest; }

RLHF_HD double log_mass(const Partial& p) { return log1p((p.ties - 1) + p.rest); }

RLHF_HD double lse(const Partial& p) { return p.most + log_mass(p); }

// logp of a logit z of the row: the largest logit's keeps its relative accuracy, however close to zero it is.
RLHF_HD double logp(const Partial& p, double z) { return (z - p.most) - log_mass(p); }

RLHF_HD double entropy(const Partial& p) { return log_mass(p) - p.slope / mass(p); }

// The same sums with `most` raised.
RLHF_HD Partial raised(const Partial& p, double most) {
  if (p.most == most || p.most == -INFINITY)
    return {most, p.most == most ? p.ties : 0, p.rest, p.slope, p.gap, p.total};
  double d = p.most - most, shrink = exp(d);
  return {most, 0, mass(p) * shrink, shrink == 0 ? 0 : (p.slope + mass(p) * d) * shrink, p.gap * shrink, p.total};
}

RLHF_HD Partial fold(const Partial& a, const Partial& b) {
  double most = a.most < b.most ? b.most : a.most;
  Partial x = raised(a, most), y = raised(b, most);
  return {most, x.ties + y.ties, x.rest + y.rest, x.slope + y.slope, x.gap + y.gap, x.total + y.total};
}

// KL between two heads of a row, from the gap collected under the weights of the first: KL(weights | other).
RLHF_HD double divergence(const Partial& weights, const Partial& other) {
  double kl = weights.gap / mass(weights) - (lse(weights) - lse(other));
  return kl < 0 ? 0 : kl;
}

// A zero gradient must not meet an infinite statistic.
RLHF_HD double times(double g, double x) { return g == 0 ? 0 : g * x; }

RLHF_HD Slopes slopes(const RowGrads& g, const Partial& p, const Partial* ref, bool forward_kl, double vocab) {
  Slopes s{lse(p), ref ? lse(*ref) : 0, 0, -g.entropy, 0, 0, g.mean_logit / vocab};
  s.base = g.lse - g.logp - times(g.entropy, entropy(p));
  if (ref && forward_kl) {
    s.base += g.kl;
    s.by_q = -g.kl;
  } else if (ref) {
    s.base -= times(g.kl, divergence(p, *ref));
    s.by_log_p += g.kl;
    s.by_log_q = -g.kl;
  }
  return s;
}

// The gradient of a target's logit, without the cancellation of g - g p. `g` is d loss / d logp of this id.
RLHF_HD double grad_target(const Slopes& s, double g, double log_p, double log_q) {
  double p = exp(log_p), rest = s.base + g + times(s.by_log_p, log_p) + times(s.by_log_q, log_q);
  return -g * expm1(log_p) + times(p, rest) + s.by_q * exp(log_q) + s.shift;
}

}  // namespace RLHF_ISA
}  // namespace rlhf
