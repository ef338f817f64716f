// SPDX-License-Identifier: Apache-2.0
//
// 2^x, by minimax polynomials of 2^f on [-1/2, 1/2] (relative error; Remez).
#pragma once

namespace fastdeberta::cpu {
namespace {

// x <= 127. Zero below kLowestPower. Relative error 8e-8, a float's rounding error.
FD_INLINE Vec exp2(Vec x) {
  x = max(x, set1(kLowestPower));
  const Vec n = round_to_whole(x);
  const Vec f = sub(x, n);
  Vec p = set1(1.32764719793e-3f);
  p = fma(p, f, set1(9.67554133421e-3f));
  p = fma(p, f, set1(5.55071327354e-2f));
  p = fma(p, f, set1(2.40221197238e-1f));
  p = fma(p, f, set1(6.93146967065e-1f));
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
