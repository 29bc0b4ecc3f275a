// Matrix products from panels. A panel holds 16 lines of an operand, a line running along the summed dimension k, as
// [k][16] words (words.h). Both operands of a product use the same layout, and a 16 x 16 tile of the result lives in 16
// registers.
#pragma once
#include <cstdlib>
#include <new>

#include "head.h"
#include "words.h"

namespace rlhf {
inline namespace RLHF_ISA {

constexpr int64_t LINES = 16;
constexpr int64_t RUN = 128;   // words that are summed in one go: short runs keep rounding errors small
constexpr int64_t DEEP = 512;  // words of k at a time: a panel of 32 KiB

inline int64_t panels(int64_t lines) { return (lines + LINES - 1) / LINES; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Uninitialized memory. No large pages are asked for: on a machine whose memory is fragmented the kernel compacts it at
// the first touch, which took up to a fifth of a call where small pages take a twentieth.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

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
inline void tile(const uint32_t* a, const uint32_t* b, int64_t deep, float* c, int64_t ld, int64_t rows,
                 __mmask16 columns, bool add) {
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
inline void tile(const uint32_t* a, const uint32_t* b, int64_t deep, float* c, int64_t ld, int64_t rows,
                 __mmask16 columns, bool add) {
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
inline void multiply(const Panels& a, int64_t a0, int64_t a1, const Panels& b, int64_t b0, int64_t b1, float* c,
                     int64_t ld, bool add) {
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
