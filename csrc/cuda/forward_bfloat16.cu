// SPDX-License-Identifier: Apache-2.0
#include "forward_launch.cuh"

namespace fastdeberta::cuda {

template void forward_of<__nv_bfloat16>(const AttentionParams&, void*);

}  // namespace fastdeberta::cuda
