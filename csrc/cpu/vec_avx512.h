// SPDX-License-Identifier: Apache-2.0
//
// Vectors of 16 floats: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define FD_INLINE inline __attribute__((always_inline))
#define FD_UNROLL _Pragma("GCC unroll 16")

namespace fastdeberta::cpu {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;

// Rows of the micro-kernel for each number of vectors: 32 registers hold the accumulators, one row
// of vectors and nothing else (the broadcast is a memory operand).
constexpr int kMostVecs = 4;
constexpr int kRowsFor[kMostVecs + 1] = {0, 8, 8, 8, 6};

FD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FD_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
FD_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
FD_INLINE Vec zero() { return _mm512_setzero_ps(); }
FD_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FD_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
FD_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FD_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
FD_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x); }

FD_INLINE bool any_less(Vec x, float bound) {
  return _mm512_cmp_ps_mask(x, set1(bound), _CMP_LT_OQ) != 0;
}

// Lanes whose bit is 1, and zero elsewhere.
FD_INLINE Vec keep(Vec x, unsigned bits) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
}
// Lanes of `a` whose bit is 1, of `b` elsewhere.
FD_INLINE Vec select(unsigned bits, Vec a, Vec b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a);
}

// x * 2^n for whole n >= kLowestPower, at which it is zero.
constexpr float kLowestPower = -200.0f;
FD_INLINE Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
FD_INLINE Vec round_to_whole(Vec x) { return _mm512_roundscale_ps(x, 0x08); }

// Bit t: words[t] >= threshold.
FD_INLINE unsigned at_least(const uint32_t* words, uint32_t threshold) {
  return _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words),
                                 _mm512_set1_epi32(static_cast<int>(threshold)));
}

// p[row[t] - row[0]] for lane t, where row[15] - row[0] <= 15.
FD_INLINE Vec load_rows(const float* p, const int32_t* row) {
  const __m512i index = _mm512_sub_epi32(_mm512_loadu_si512(row), _mm512_set1_epi32(row[0]));
  return _mm512_permutexvar_ps(index, load(p));
}

// p[row[t] - row[0]] += x[t], where neighbours lie at most one row apart: a segmented sum from
// right to left, after which the first lane of each segment holds it, and these close ranks.
FD_INLINE void add_rows(float* p, const int32_t* row, Vec x) {
  const __m512i here = _mm512_loadu_si512(row);
#define FD_STEP(n)                                                                             \
  x = add(x, _mm512_maskz_mov_ps(                                                              \
                 _mm512_mask_cmpeq_epi32_mask(0xffff >> n, here, _mm512_loadu_si512(row + n)), \
                 _mm512_castsi512_ps(                                                          \
                     _mm512_alignr_epi32(_mm512_setzero_si512(), _mm512_castps_si512(x), n))))
  FD_STEP(1);
  FD_STEP(2);
  FD_STEP(4);
  FD_STEP(8);
#undef FD_STEP
  const __mmask16 first = _mm512_cmpneq_epi32_mask(here, _mm512_loadu_si512(row - 1)) | 1;
  store(p, add(load(p), _mm512_maskz_compress_ps(first, x)));
}

FD_INLINE Vec low_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FD_INLINE Vec high_pairs(Vec a, Vec b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

FD_INLINE void transpose(Vec* r) {
  Vec t[16];
  FD_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  FD_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = low_pairs(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = high_pairs(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = low_pairs(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = high_pairs(t[4 * i + 1], t[4 * i + 3]);
  }
  FD_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  FD_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

}  // namespace
}  // namespace fastdeberta::cpu
