// SPDX-License-Identifier: Apache-2.0
//
// The one matrix product of every step: C[m][lanes] (+)= sum_k A[m][k] · B[k][lanes], in which each
// word of A is broadcast. A is read with any two strides, so it need not be transposed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.h"

namespace fastdeberta::cpu {
namespace {

// How numbers are multiplied. A word is what a 32-bit lane holds: one float, or a pair of bfloat16
// that lie next to each other along the summed dimension.
struct F32 {
  using Word = float;
  static constexpr int kPerWord = 1;
  static FD_INLINE Vec load_words(const float* p) { return load(p); }
  static FD_INLINE Vec broadcast(const float* p) { return set1(*p); }
  static FD_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  // to = from + word, number by number.
  static FD_INLINE void shift(float* to, const float* from, float word) {
    store(to, add(load(from), set1(word)));
  }
};

#ifdef FD_BF16
// 16 floats as 8 words.
FD_INLINE void store_bf16(uint32_t* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// Words of pairs from two rows of floats.
FD_INLINE void store_pairs(uint32_t* to, Vec even, Vec odd) {
  alignas(64) static const uint16_t kMix[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kMix), both));
}

struct BF16 {
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  static FD_INLINE Vec load_words(const uint32_t* p) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  }
  static FD_INLINE Vec broadcast(const uint32_t* p) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)));
  }
  static FD_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static FD_INLINE void shift(uint32_t* to, const uint32_t* from, uint32_t word) {
    const __m512i x = _mm512_loadu_si512(from);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const Vec even =
        add(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), set1(from_bits(word << 16)));
    const Vec odd =
        add(_mm512_castsi512_ps(_mm512_and_si512(x, high)), set1(from_bits(word & 0xffff0000)));
    store_pairs(to, even, odd);
  }
};
#endif

template <class T, int kRows, int kVecs, bool kAdd>
FD_INLINE void micro_kernel(int depth, const typename T::Word* a, int64_t a_row, int64_t a_step,
                            const typename T::Word* b, int64_t b_stride, float* c,
                            int64_t c_stride) {
  Vec sums[kRows][kVecs];
  FD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    FD_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      sums[m][n] = kAdd ? load(c + m * c_stride + n * kLanes) : zero();
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vec row[kVecs];
    FD_UNROLL
    for (int n = 0; n < kVecs; ++n) row[n] = T::load_words(b + k * b_stride + n * kLanes);
    FD_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = T::broadcast(a + m * a_row + k * a_step);
      FD_UNROLL
      for (int n = 0; n < kVecs; ++n) sums[m][n] = T::multiply_add(factor, row[n], sums[m][n]);
    }
  }
  FD_UNROLL
  for (int m = 0; m < kRows; ++m) {
    FD_UNROLL
    for (int n = 0; n < kVecs; ++n) store(c + m * c_stride + n * kLanes, sums[m][n]);
  }
}

template <class T, int kVecs, bool kAdd>
void gemm_columns(int rows, int depth, const typename T::Word* a, int64_t a_row, int64_t a_step,
                  const typename T::Word* b, int64_t b_stride, float* c, int64_t c_stride) {
  constexpr int kRows = kRowsFor[kVecs];
  int m = 0;
  const auto run = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; m + kCount <= rows; m += kCount) {
      micro_kernel<T, kCount, kVecs, kAdd>(depth, a + m * a_row, a_row, a_step, b, b_stride,
                                           c + m * c_stride, c_stride);
    }
  };
  run(std::integral_constant<int, kRows>());
  if constexpr (kRows > 4) run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

// `lanes` is a multiple of kLanes; `depth` counts words.
template <class T, bool kAdd>
void gemm(int rows, int lanes, int depth, const typename T::Word* a, int64_t a_row, int64_t a_step,
          const typename T::Word* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int vecs = lanes / kLanes; vecs > 0; vecs -= kMostVecs) {
    const auto run = [&](auto count) {
      constexpr int kVecs = decltype(count)::value;
      gemm_columns<T, kVecs, kAdd>(rows, depth, a, a_row, a_step, b, b_stride, c, c_stride);
      b += kVecs * kLanes;
      c += kVecs * kLanes;
    };
    if constexpr (kMostVecs == 4) {
      if (vecs == 3) return run(std::integral_constant<int, 3>());
      if (vecs >= 4) {
        run(std::integral_constant<int, 4>());
        continue;
      }
    }
    if (vecs == 1) return run(std::integral_constant<int, 1>());
    run(std::integral_constant<int, 2>());
    if (kMostVecs == 4) return;
  }
}

}  // namespace
}  // namespace fastdeberta::cpu
