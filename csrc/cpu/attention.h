// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../attention.h"

namespace fastdeberta::cpu {

// Names of the kernels that this machine can run, the fastest first.
int kernel_count();
const char* kernel_name(int index);

// `kernels` is an index of the above. Every element of the results is written.
void forward(const AttentionParams& params, int kernels);
void backward(const AttentionParams& params, int kernels);

// Floating-point operations a second of one thread that does nothing but multiply matrices in its
// nearest cache; 0 where these kernels multiply bfloat16 as float32.
double gemm_peak(bool bf16, int kernels);

}  // namespace fastdeberta::cpu
