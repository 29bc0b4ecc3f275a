// Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438, equation 16), one step at a time.
#pragma once
#include "portable.h"

namespace rlhf {
inline namespace RLHF_ISA {

// What a token hands to the one before it.
struct GaeCarry {
  double advantage;   // A_{t+1}
  double next_value;  // V(s_{t+1})
};

// A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}. A masked token hands on what it was given.
RLHF_HD GaeCarry gae_step(GaeCarry c, double reward, double value, bool kept, double gamma, double gamma_lam) {
  double advantage = reward + gamma * c.next_value - value + gamma_lam * c.advantage;
  return {kept ? advantage : c.advantage, kept ? value : c.next_value};
}

// The same step as a map of one number, for those who must join walks that began apart: what a token is paid by those
// after it, C = gamma V_{t+1} + gamma lam A_{t+1}. Then A_t = r_t - V_t + C, and what it hands on is affine in C.
struct GaeMap {
  double decay = 1, value = 0;

  // A closed map forgets what follows, even what is not finite.
  RLHF_HD double operator()(double follows) const { return decay == 0 ? value : value + decay * follows; }
  RLHF_HD GaeMap after(GaeMap right) const { return {decay * right.decay, (*this)(right.value)}; }
};

RLHF_HD GaeMap gae_map(double reward, double value, bool kept, double gamma, double gamma_lam) {
  return kept ? GaeMap{gamma_lam, gamma_lam * (reward - value) + gamma * value} : GaeMap{};
}

}  // namespace RLHF_ISA
}  // namespace rlhf
