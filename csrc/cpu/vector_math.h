// Elementary functions that compilers turn into vector code, with relative errors of a few units in the last place.
// Coefficients: own minimax fits (weighted least squares iterated to equal ripples).
#pragma once
#include <cmath>
#include <cstdint>

#include "../core/portable.h"

namespace rlhf {
inline namespace RLHF_ISA {

// Comparisons are written so that a NaN in x comes out.
template <class T>
inline T at_least(T x, T floor) {
  return x < floor ? floor : x;
}

// e^x for x <= 0 and a little above; exactly zero where the result would be subnormal.
inline float exp_nonpositive(float x) {
  constexpr float lowest = -87.0f, shifter = 12582912.0f;  // 1.5 * 2^23 leaves the rounded integer in the low bits
  float y = at_least(x, lowest);
  float shifted = y * 1.44269504f + shifter;
  float n = shifted - shifter;
  float r = y - n * 0.693359375f;  // ln 2 in two parts; the first has nine bits, so the product is exact
  r = r - n * -2.12194440e-4f;
  float q = 1.3814599e-3f;
  q = q * r + 8.3687169e-3f;
  q = q * r + 4.1668388e-2f;
  q = q * r + 1.66665206e-1f;
  q = q * r + 4.99999934e-1f;
  float e = 1.0f + (r + r * r * q);
  uint32_t bits = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;  // 2^n
  return x < lowest ? 0.0f : e * __builtin_bit_cast(float, bits);
}

inline double exp_nonpositive(double x) { return std::exp(x); }

inline float tanh_of(float x) {
  float a = std::fabs(x), a2 = x * x;
  float q = -5.717046e-3f;
  q = q * a2 + 2.0650588e-2f;
  q = q * a2 + -5.3743498e-2f;
  q = q * a2 + 1.33314913e-1f;
  q = q * a2 + -3.33332839e-1f;
  float small = x + x * a2 * q;
  float e = exp_nonpositive(-2.0f * a);
  float large = std::copysign((1.0f - e) / (1.0f + e), x);
  return a < 0.625f ? small : large;
}

inline double tanh_of(double x) { return std::tanh(x); }

}  // namespace RLHF_ISA
}  // namespace rlhf
