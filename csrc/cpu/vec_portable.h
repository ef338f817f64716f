// SPDX-License-Identifier: Apache-2.0
//
// Vectors of 4 floats in plain C++, which compilers map to SSE2, NEON or whatever there is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define FD_INLINE inline __attribute__((always_inline))
#define FD_UNROLL _Pragma("GCC unroll 16")

namespace fastdeberta::cpu {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;

constexpr int kMostVecs = 2;
constexpr int kRowsFor[kMostVecs + 1] = {0, 4, 4};

FD_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
FD_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
FD_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
FD_INLINE Vec zero() { return Vec{}; }
FD_INLINE Vec add(Vec a, Vec b) { return a + b; }
FD_INLINE Vec sub(Vec a, Vec b) { return a - b; }
FD_INLINE Vec mul(Vec a, Vec b) { return a * b; }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FD_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
FD_INLINE float sum(Vec x) { return (x[0] + x[1]) + (x[2] + x[3]); }

FD_INLINE Vec choose(IntVec mask, Vec a, Vec b) {
  return (Vec)((mask & (IntVec)a) | (~mask & (IntVec)b));
}
FD_INLINE Vec max(Vec a, Vec b) { return choose(a > b, a, b); }
FD_INLINE IntVec lanes_of(unsigned bits) {
  const IntVec bit = {1, 2, 4, 8};
  const int32_t set = static_cast<int32_t>(bits);
  return (IntVec{set, set, set, set} & bit) == bit;
}
FD_INLINE bool any_less(Vec x, float bound) {
  return x[0] < bound || x[1] < bound || x[2] < bound || x[3] < bound;
}

// Lanes whose bit is 1, and zero elsewhere.
FD_INLINE Vec keep(Vec x, unsigned bits) { return (Vec)((IntVec)x & lanes_of(bits)); }
// Lanes of `a` whose bit is 1, of `b` elsewhere.
FD_INLINE Vec select(unsigned bits, Vec a, Vec b) { return choose(lanes_of(bits), a, b); }

// x * 2^n for whole n >= kLowestPower, at which it is zero.
constexpr float kLowestPower = -127.0f;
FD_INLINE Vec scale_by_power(Vec x, Vec n) {
  const IntVec exponent = __builtin_convertvector(n, IntVec) + 127;
  return x * (Vec)(exponent << 23);
}
// Right for |x| < 2^22: the addition leaves no bit for a fraction.
FD_INLINE Vec round_to_whole(Vec x) {
  const Vec magic = set1(12582912.0f);
  return (x + magic) - magic;
}

// Bit t: words[t] >= threshold.
FD_INLINE unsigned at_least(const uint32_t* words, uint32_t threshold) {
  unsigned bits = 0;
  for (int t = 0; t < kLanes; ++t) bits |= unsigned{words[t] >= threshold} << t;
  return bits;
}

// p[row[t] - row[0]] for lane t.
FD_INLINE Vec load_rows(const float* p, const int32_t* row) {
  return Vec{p[0], p[row[1] - row[0]], p[row[2] - row[0]], p[row[3] - row[0]]};
}

// p[row[t] - row[0]] += x[t].
FD_INLINE void add_rows(float* p, const int32_t* row, Vec x) {
  for (int t = 0; t < kLanes; ++t) p[row[t] - row[0]] += x[t];
}

FD_INLINE void transpose(Vec* r) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = Vec{a[0], b[0], c[0], d[0]};
  r[1] = Vec{a[1], b[1], c[1], d[1]};
  r[2] = Vec{a[2], b[2], c[2], d[2]};
  r[3] = Vec{a[3], b[3], c[3], d[3]};
}

}  // namespace
}  // namespace fastdeberta::cpu
