// SPDX-License-Identifier: Apache-2.0
//
// 2^x, by minimax polynomials of 2^f on [-1/2, 1/2] (relative error; Remez).
#pragma once

namespace fastdeberta::cpu {
namespace {

// x <= 127. Zero below kLowestPower. Relative error 2e-9 before rounding: gradients
// sum many probabilities, whose errors must not lean to one side.
FD_INLINE Vec exp2(Vec x) {
  x = max(x, set1(kLowestPower));
  const Vec n = round_to_whole(x);
  const Vec f = sub(x, n);
  Vec p = set1(1.53458119922e-4f);
  p = fma(p, f, set1(1.33999312192e-3f));
  p = fma(p, f, set1(9.61848895716e-3f));
  p = fma(p, f, set1(5.55032877697e-2f));
  p = fma(p, f, set1(2.40226468906e-1f));
  p = fma(p, f, set1(6.93147205737e-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

// The same with relative error 7e-5, for results that are rounded to bfloat16 (2e-3).
FD_INLINE Vec exp2_for_bf16(Vec x) {
  x = max(x, set1(kLowestPower));
  const Vec n = round_to_whole(x);
  const Vec f = sub(x, n);
  Vec p = set1(5.51716690749e-2f);
  p = fma(p, f, set1(2.42611122194e-1f));
  p = fma(p, f, set1(6.93260985457e-1f));
  p = fma(p, f, set1(9.9992807354e-1f));
  return scale_by_power(p, n);
}

}  // namespace
}  // namespace fastdeberta::cpu
