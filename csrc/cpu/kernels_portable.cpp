// SPDX-License-Identifier: Apache-2.0
#include "baseline.h"
#include "vec_portable.h"
// After the vectors, which it builds on.
#include "kernels.h"

namespace fastdeberta::cpu {

const Kernels kPortable = kernels("portable");

}  // namespace fastdeberta::cpu
