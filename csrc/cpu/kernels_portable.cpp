// SPDX-License-Identifier: Apache-2.0
#include "vec_portable.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kPortable = {
    "portable", [] { return true; }, table_bytes, pack_tables, forward, backward, gemm_peak};

}  // namespace fastdeberta::cpu
