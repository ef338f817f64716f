// SPDX-License-Identifier: Apache-2.0
#include "target.h"

#ifdef FD_X86
// The standard library's own functions keep the base instructions.
#include <immintrin.h>

#include "standard.h"
FD_TARGET_BEGIN("avx2,fma,f16c")
#include "vec_avx2.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kAvx2 = {
    "avx2",      [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
    table_bytes, pack_tables,
    forward,     backward,
    gemm_peak};

}  // namespace fastdeberta::cpu
FD_TARGET_END
#endif
