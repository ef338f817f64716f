// SPDX-License-Identifier: Apache-2.0
#include "target.h"

#ifdef FD_X86
// The standard library's own functions keep the base instructions.
#include <immintrin.h>

#include "standard.h"
FD_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#define FD_BF16
#include "vec_avx512.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kAvx512Bf16 = {"avx512-bf16",
                             [] {
                               return __builtin_cpu_supports("avx512f") &&
                                      __builtin_cpu_supports("avx512bw") &&
                                      __builtin_cpu_supports("avx512dq") &&
                                      __builtin_cpu_supports("avx512vl") &&
                                      __builtin_cpu_supports("avx512bf16");
                             },
                             table_bytes,
                             pack_tables,
                             forward,
                             backward,
                             gemm_peak};

}  // namespace fastdeberta::cpu
FD_TARGET_END
#endif
