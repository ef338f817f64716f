// SPDX-License-Identifier: Apache-2.0
//
// bfloat16 and float16 to float and back, in plain C++ that compilers turn into vectors.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdeberta::cpu {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  // Exponent and mantissa moved to their places are the value times 2^-112, subnormals included.
  const float finite = from_bits(rest << 13) * from_bits(0x77800000);
  const uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : to_bits(finite);
  return from_bits(bits | sign);
}

inline void from_float(float x, float* out) { *out = x; }

// Round to nearest, ties to even.
inline void from_float(float x, Bf16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void from_float(float x, Half* out) {
  const uint32_t bits = to_bits(x), size = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  // Normal results: rebias and round; subnormal ones: an addition that rounds at the right bit.
  const uint32_t normal = (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(size) + 0.5f) - 0x3f000000;
  uint32_t rest = size < 0x38800000 ? subnormal : normal;
  rest = size >= 0x477ff000 ? 0x7c00 : rest;
  rest = size > 0x7f800000 ? 0x7e00 : rest;
  out->bits = static_cast<uint16_t>(sign | rest);
}

template <class S>
void to_float(const S* from, float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class S>
void from_float(const float* from, S* to, int n) {
  for (int i = 0; i < n; ++i) from_float(from[i], to + i);
}

}  // namespace
}  // namespace fastdeberta::cpu
