// Elements as they are stored, and the words of 32 bits in which they are multiplied: one float, or two neighbouring
// bfloat16 that the machine multiplies and adds at once.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../core/portable.h"

namespace rlhf {
inline namespace RLHF_ISA {

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 16 stored elements as floats.
struct F32 {
  using Type = float;
  static __m512i words(const Type* p, __mmask16 m) { return _mm512_castps_si512(_mm512_maskz_loadu_ps(m, p)); }
};

struct F16 {
  using Type = uint16_t;
  static __m512i words(const Type* p, __mmask16 m) {
    return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)));
  }
};

struct Bf16 {
  using Type = uint16_t;
  static __m512i words(const Type* p, __mmask16 m) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16);
  }
};

// Words of one float.
template <class S>
struct Single {
  using Type = typename S::Type;
  using Grad = float;  // gradients of logits on their way into products
  using GradWords = Single<F32>;
  static constexpr int64_t PER_WORD = 1;

  // words k .. k + 15 of a line of `count` elements
  static __m512i along(const Type* line, int64_t k, int64_t count) {
    return S::words(line + k, first_lanes(count - k));
  }
  // one word of each of 16 lines that lie side by side; `second` is their next element along k
  static __m512i across(const Type* first, const Type*, __mmask16 lines) { return S::words(first, lines); }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static void round(const float* from, Grad* to, int64_t count) {
    std::memcpy(to, from, size_t(count) * sizeof(float));
  }
  static __m512 sum_of(__m512i word) { return _mm512_castsi512_ps(word); }
};

// 16 floats to bfloat16, to nearest even; a NaN stays one.
inline __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

inline void round_to_bf16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 m = first_lanes(count - i);
    _mm256_mask_storeu_epi16(to + i, m, to_bf16(_mm512_maskz_loadu_ps(m, from + i)));
  }
}

#ifdef __AVX512BF16__
// Words of two bfloat16.
struct Pair {
  using Type = uint16_t;
  using Grad = uint16_t;
  using GradWords = Pair;
  static constexpr int64_t PER_WORD = 2;

  static __m512i along(const Type* line, int64_t k, int64_t count) {
    int64_t left = count - 2 * k;
    __mmask32 m = left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
    return _mm512_maskz_loadu_epi16(m, line + 2 * k);
  }
  static __m512i across(const Type* first, const Type* second, __mmask16 lines) {
    __m256i low = _mm256_maskz_loadu_epi16(lines, first);
    __m256i high = second ? _mm256_maskz_loadu_epi16(lines, second) : _mm256_setzero_si256();
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void round(const float* from, Grad* to, int64_t count) { round_to_bf16(from, to, count); }
  static __m512 sum_of(__m512i word) {
    __m512i high = _mm512_and_si512(word, _mm512_set1_epi32(int(0xffff0000)));
    return _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(word, 16)), _mm512_castsi512_ps(high));
  }
};
#endif

template <class W>
inline int64_t words(int64_t count) {
  return (count + W::PER_WORD - 1) / W::PER_WORD;
}

}  // namespace RLHF_ISA
}  // namespace rlhf
