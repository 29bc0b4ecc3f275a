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

}  // namespace RLHF_ISA
}  // namespace rlhf
