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
  int shared_memory;  // bytes, that all blocks of a multiprocessor have together
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
  Device device;
  int index = 0;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
  };
  check(cudaGetDevice(&index), "cudaGetDevice");
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(device.shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return device;
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

// sm_90, with so few multiprocessors that short tests fill them.
inline Device device() { return {1, 228 * 1024}; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int shared_bytes, void*, const Arguments&... arguments) {
  if (!blocks) return;
  simt::launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes,
               arguments...);
}

#endif

}  // namespace fastdeberta::cuda
