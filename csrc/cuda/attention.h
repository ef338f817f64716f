// SPDX-License-Identifier: Apache-2.0
//
// The launchers of the CUDA kernels, for float16 and bfloat16 and head dimensions 32, 64, 96, 128.
// Every row of every tensor must lie on a 16-byte boundary.
#pragma once

#include "../attention.h"

namespace fastdeberta::cuda {

// Dynamic shared memory that a call needs of a block, in bytes; 0: no kernel takes head_dim.
int64_t shared_memory(int head_dim, bool positions, bool backward);

// float32 elements of the workspace that the backward pass needs.
int64_t backward_workspace(const AttentionParams& params);

// stream: a cudaStream_t.
void forward(const AttentionParams& params, void* stream);
void backward(const AttentionParams& params, float* workspace, void* stream);

}  // namespace fastdeberta::cuda
