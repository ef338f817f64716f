// SPDX-License-Identifier: Apache-2.0
#include "baseline.h"
#include "target.h"

#ifdef FD_X86
#include <immintrin.h>

FD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#define FD_BF16
#include "vec_avx512.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kAvx512Bf16 = kernels("avx512-bf16");

}  // namespace fastdeberta::cpu
FD_TARGET_END
#endif
