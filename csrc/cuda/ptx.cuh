// SPDX-License-Identifier: Apache-2.0
//
// The instructions that CUDA C++ has no name for. This is the only file with inline PTX, and the
// one header that kernels include for the device: without nvcc it brings the same functions for the
// CPU instead (csrc/simt).
#pragma once

#ifndef __CUDACC__

#include "../simt/ptx_host.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

// Declares `unsigned char* name`, the block's dynamic shared memory, aligned to 128 bytes.
#define FASTDEBERTA_SHARED(name)                                        \
  extern __shared__ __align__(128) unsigned char fastdeberta_shared_[]; \
  unsigned char* name = fastdeberta_shared_

namespace fastdeberta::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// d[16, 8] += a[16, 16] * b[16, 8] by the whole warp, T times T summed in float32. Lane l holds
// rows l / 4 and l / 4 + 8 of a and d, and column l / 4 of b:
//   a[r]: row l / 4 + 8 * (r % 2), columns 2 * (l % 4) + 8 * (r / 2) and the next
//   b0, b1: rows 2 * (l % 4) and the next; the same + 8
//   d[r]: row l / 4 + 8 * (r / 2), column 2 * (l % 4) + r % 2
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  // Volatile, like ldmatrix: all lanes must reach it together, so it may not sink into a branch.
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Loads 8x8 matrices of 16-bit elements: `row` of lane l is row l % 8 of matrix l / 8, 16 bytes of
// shared memory aligned to 16. r[m] gets of matrix m row l / 4, columns 2 * (l % 4) and the next;
// transposed, rows 2 * (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Of the two-matrix forms, the rows of lanes 16 to 31 are not looked at.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying 16 (or 4) bytes, or zeros where not `valid`: `global` is then not read. Both
// addresses are aligned to the size of the copy.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// Makes a group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all of this thread's groups but the N last; others see its copies after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x to about 2 ulp; subnormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Barrier `id` (0 is that of __syncthreads) of `threads` threads, a multiple of 32: whole warps.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fastdeberta::ptx

#endif
