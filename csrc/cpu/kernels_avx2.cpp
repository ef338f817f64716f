// SPDX-License-Identifier: Apache-2.0
#include "baseline.h"
#include "target.h"

#ifdef FD_X86
#include <immintrin.h>

FD_TARGET_BEGIN("avx2,fma,f16c")
#include "vec_avx2.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kAvx2 = kernels("avx2");

}  // namespace fastdeberta::cpu
FD_TARGET_END
#endif
