// SPDX-License-Identifier: Apache-2.0
#include "backward_launch.cuh"

namespace fastdeberta::cuda {

template void backward_of<__nv_bfloat16>(const AttentionParams&, const Workspace&, void*);

}  // namespace fastdeberta::cuda
