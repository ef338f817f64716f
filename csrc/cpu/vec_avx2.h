// SPDX-License-Identifier: Apache-2.0
//
// Vectors of 8 floats: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define FD_INLINE inline __attribute__((always_inline))
#define FD_UNROLL _Pragma("GCC unroll 16")

namespace fastdeberta::cpu {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;

// 16 registers: 12 accumulators, 2 vectors and a broadcast.
constexpr int kMostVecs = 2;
constexpr int kRowsFor[kMostVecs + 1] = {0, 8, 6};

FD_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FD_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
FD_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
FD_INLINE Vec zero() { return _mm256_setzero_ps(); }
FD_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
FD_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
FD_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
FD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FD_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }

FD_INLINE float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

FD_INLINE bool any_less(Vec x, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, set1(bound), _CMP_LT_OQ)) != 0;
}

FD_INLINE __m256 lanes_of(unsigned bits) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit));
}
// Lanes whose bit is 1, and zero elsewhere.
FD_INLINE Vec keep(Vec x, unsigned bits) { return _mm256_and_ps(x, lanes_of(bits)); }
// Lanes of `a` whose bit is 1, of `b` elsewhere.
FD_INLINE Vec select(unsigned bits, Vec a, Vec b) { return _mm256_blendv_ps(b, a, lanes_of(bits)); }

// x * 2^n for whole n >= kLowestPower, at which it is zero.
constexpr float kLowestPower = -127.0f;
FD_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
FD_INLINE Vec round_to_whole(Vec x) { return _mm256_round_ps(x, 0x08); }

// Bit t: words[t] >= threshold.
FD_INLINE unsigned at_least(const uint32_t* words, uint32_t threshold) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold));
  const __m256i met = _mm256_cmpeq_epi32(_mm256_max_epu32(x, least), x);
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(met)));
}

// p[row[t] - row[0]] for lane t, where row[7] - row[0] <= 7.
FD_INLINE Vec load_rows(const float* p, const int32_t* row) {
  const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  return _mm256_permutevar8x32_ps(load(p), _mm256_sub_epi32(rows, _mm256_set1_epi32(row[0])));
}

// p[row[t] - row[0]] += x[t].
FD_INLINE void add_rows(float* p, const int32_t* row, Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int t = 0; t < kLanes; ++t) p[row[t] - row[0]] += lanes[t];
}

FD_INLINE void transpose(Vec* r) {
  Vec t[8];
  FD_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  FD_UNROLL
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  FD_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
  }
  FD_UNROLL
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace fastdeberta::cpu
