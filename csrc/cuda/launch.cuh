// SPDX-License-Identifier: Apache-2.0
//
// Starting kernels: the one place that knows whether a device or the CPU runs them.
#pragma once

#include <stdexcept>
#include <string>

#include "attention.h"
#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace fastdeberta::cuda {

struct Device {
  int multiprocessors;
  int64_t shared_memory;  // bytes that a block may have
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ")");
  }
}

// Of the current device.
inline Device device() {
  int index = 0, multiprocessors = 0, bytes = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "cudaDeviceGetAttribute");
  return {multiprocessors, bytes};
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int shared_bytes, void* stream, const Arguments&... arguments) {
  if (!blocks) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(name) + ": too many blocks");
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

// What sm_80 allows a block, and so few multiprocessors that large tiles are tested as well.
inline Device device() { return {1, 163 * 1024}; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int shared_bytes, void*, const Arguments&... arguments) {
  if (!blocks) return;
  simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes,
               arguments...);
}

#endif

}  // namespace fastdeberta::cuda
