// Matrix products from panels. A panel holds 16 lines of an operand, a line running along the summed dimension k, as
// [k][16] words of 32 bits. A word is one float, or two neighbouring bfloat16 that the machine multiplies and adds at
// once. Both operands of a product use the same layout, and a 16 x 16 tile of the result lives in 16 registers.
#pragma once
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "head.h"
#include "memory.h"

namespace rlhf {
inline namespace RLHF_ISA {

constexpr int64_t LINES = 16;
constexpr int64_t RUN = 128;   // words that are summed in one go: short runs keep rounding errors small
constexpr int64_t DEEP = 512;  // words of k at a time: a panel of 32 KiB

inline int64_t panels(int64_t lines) { return (lines + LINES - 1) / LINES; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// Uninitialized memory on large pages where it is large.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
    prefer_large_pages(data_, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Elements as they are stored; `words` are 16 of them as floats.
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
  using Store = S;
  using Type = typename S::Type;
  using Grad = float;            // gradients of logits on their way into products
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
  static void round(const float* from, Grad* to, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(float)); }
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
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
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
  using Store = Bf16;
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

inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // pairs of lines: 2 x 2 blocks of words
      y[i + 2 * j] = _mm512_unpacklo_epi32(x[i + 2 * j], x[i + 2 * j + 1]);
      y[i + 2 * j + 1] = _mm512_unpackhi_epi32(x[i + 2 * j], x[i + 2 * j + 1]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // fours of lines
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // 4 x 4 blocks of 128 bits
    __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    __m512i c = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd), d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(a, b, 0x88), y[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), y[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// One panel from lines that are contiguous along k. Lines beyond `lines` and elements beyond `count` are zero.
template <class W>
inline void pack_along(const typename W::Type* const* line, int64_t lines, int64_t count, uint32_t* panel) {
  for (int64_t k = 0; k < words<W>(count); k += 16) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = i < lines ? W::along(line[i], k, count) : _mm512_setzero_si512();
    transpose(x);
    int64_t last = smaller(16, words<W>(count) - k);
    for (int64_t i = 0; i < last; ++i) _mm512_store_si512(panel + (k + i) * LINES, x[i]);
  }
}

// One panel from lines that lie side by side; at(k) is their element k, of `count`.
template <class W, class At>
inline void pack_across(At at, int64_t lines, int64_t count, uint32_t* panel) {
  const __mmask16 mask = first_lanes(lines);
  for (int64_t k = 0; k < count; k += W::PER_WORD, panel += LINES)
    _mm512_store_si512(panel, W::across(at(k), k + 1 < count ? at(k + 1) : nullptr, mask));
}

// c[i][j] (+)= sum over `deep` words of line i of a times line j of b, for M lines; `rows` and `columns` exist in c.
template <class W, int M>
inline void tile(const uint32_t* a, const uint32_t* b, int64_t deep, float* c, int64_t ld, int64_t rows, __mmask16 columns,
                 bool add) {
  __m512 total[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    total[i] = _mm512_setzero_ps();
    if (add && i < rows) __builtin_prefetch(c + i * ld, 1);  // read at the end, when it will have come
  }
  for (int64_t start = 0; start < deep; start += RUN) {
    const uint32_t* end = b + smaller(RUN, deep - start) * LINES;
    __m512 sum[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[i] = _mm512_setzero_ps();
    for (; b < end; a += LINES, b += LINES) {
      const __m512i line = _mm512_load_si512(b);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i] = W::multiply_add(sum[i], _mm512_set1_epi32(int(a[i])), line);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) total[i] = _mm512_add_ps(total[i], sum[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    if (i >= rows) continue;
    if (add) total[i] = _mm512_add_ps(total[i], _mm512_maskz_loadu_ps(columns, c + i * ld));
    _mm512_mask_storeu_ps(c + i * ld, columns, total[i]);
  }
}

template <class W>
inline void tile(const uint32_t* a, const uint32_t* b, int64_t deep, float* c, int64_t ld, int64_t rows, __mmask16 columns,
                 bool add) {
  if (rows > 12) return tile<W, 16>(a, b, deep, c, ld, rows, columns, add);
  if (rows > 8) return tile<W, 12>(a, b, deep, c, ld, rows, columns, add);
  if (rows > 4) return tile<W, 8>(a, b, deep, c, ld, rows, columns, add);
  tile<W, 4>(a, b, deep, c, ld, rows, columns, add);
}

// Lines of an operand in panels of `deep` words.
struct Panels {
  const uint32_t* data;
  int64_t deep;  // words
  int64_t lines;

  const uint32_t* at(int64_t panel, int64_t word) const { return data + (panel * deep + word) * LINES; }
};

// c[i][j] (+)= a . b over panels a0 .. a1 and b0 .. b1. `c` is the element [16 a0, 16 b0] of the result.
template <class W>
inline void multiply(const Panels& a, int64_t a0, int64_t a1, const Panels& b, int64_t b0, int64_t b1, float* c, int64_t ld,
                     bool add) {
  for (int64_t k = 0; k < a.deep; k += DEEP) {
    const int64_t deep = smaller(DEEP, a.deep - k);
    for (int64_t i = a0; i < a1; ++i)
      for (int64_t j = b0; j < b1; ++j)
        tile<W>(a.at(i, k), b.at(j, k), deep, c + (i - a0) * LINES * ld + (j - b0) * LINES, ld,
                smaller(LINES, a.lines - i * LINES), first_lanes(b.lines - j * LINES), add || k > 0);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf
