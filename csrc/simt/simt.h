// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA C++ kernels on the CPU, for tests: the part of CUDA that kernels use, for a compiler
// that is not nvcc. It needs CUDA's headers, for the vector and 16-bit types, and no driver.
//
// Every CUDA thread is a fiber with its own stack. The blocks of a launch run one after another on
// the OS thread that launches, and a fiber runs until it must wait for others: at a warp collective
// or at a barrier. What a GPU leaves undefined is made to show instead: see `Error`, and the
// poisoning in simt.cpp. Sanitizers and valgrind know the fibers, so that they check kernels too;
// simt.cpp says how to build for each.
//
// Kernels reinterpret shared memory freely, which GPU compilers allow: -fno-strict-aliasing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

// CUDA's headers define all other qualifiers, as nothing.
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

// For functions in which one lane reads and writes other lanes' registers: a GPU moves those within
// the instruction, so TSan must not take them for accesses to memory.
#define SIMT_EXCHANGE __attribute__((no_sanitize("thread")))

namespace simt {

// What a launch throws: a deadlock, lanes or threads that meet at different places, an address that
// an instruction may not take, a copy still under way when its thread exits, a launch out of
// limits. Where there is one, the message names the place in the kernel, the thread and the block.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of several fibers that can run does: whatever the order, a correct kernel's result stands.
enum class Order { kForward, kReverse, kRandom };

struct Config {
  // FASTDEBERTA_SIMT_ORDER = forward | reverse | random[:seed], read at every launch, wins.
  Order order = Order::kForward;
  uint32_t seed = 1;
  size_t stack_bytes = 256 << 10;     // of each thread; takes memory only where touched
  size_t shared_limit = (227 << 10);  // of each block: what sm_90 can have, the most of all
};
extern Config config;

// A place in a kernel. As a default argument, here() is the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The two primitives. Lanes in `mask` meet, and the last to come calls `exchange` on the payloads
// of all; threads meet at a barrier, and each gets the sum of all their values.
using Exchange = void (*)(void* const* lanes, uint32_t mask);
enum class Fence { kNone, kWarp };  // whether memory is ordered too, for TSan
void warp_collective(uint32_t mask, void* payload, Exchange exchange, Fence fence, Site site);
int block_barrier(int value, Site site);
void named_barrier(int id, int threads, Site site);

// Ends the launch with an Error.
[[noreturn]] void fail(const char* message, Site site);

int lane();
unsigned char* shared_memory();
// Fails unless [address, address + bytes) is in shared memory and aligned to its size.
void check_shared(const void* address, size_t bytes, Site site);

void cp_async_issue(void* shared, const void* data, size_t bytes, Site site);
void cp_async_commit();
void cp_async_wait(unsigned groups);

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* context);

// kernel<<<grid, block, shared_bytes>>>(args...), done when it returns. Throws Error, and whatever
// the kernel throws.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  auto thread = [&] { kernel(args...); };
  run(
      grid, block, shared_bytes,
      [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
}

template <int kWords>
struct ShuffleLane {
  uint32_t sent[kWords], received[kWords];
  int source;
};

template <int kWords>
SIMT_EXCHANGE void shuffle_lanes(void* const* lanes, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1) {
    auto& self = *static_cast<ShuffleLane<kWords>*>(lanes[__builtin_ctz(left)]);
    if (!(mask >> self.source & 1)) continue;
    const auto& other = *static_cast<const ShuffleLane<kWords>*>(lanes[self.source]);
    for (int word = 0; word < kWords; ++word) self.received[word] = other.sent[word];
  }
}

// A lane outside the mask has nothing to give: its reader gets NaN.
template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  ShuffleLane<(sizeof(T) + 3) / 4> self{{}, {}, source};
  std::memset(self.received, 0xFF, sizeof(self.received));
  std::memcpy(self.sent, &value, sizeof(T));
  warp_collective(mask, &self, shuffle_lanes<(sizeof(T) + 3) / 4>, Fence::kNone, site);
  std::memcpy(&value, self.received, sizeof(T));
  return value;
}

struct BallotLane {
  bool predicate;
  uint32_t ballot;
};

SIMT_EXCHANGE inline void ballot_lanes(void* const* lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1)
      ballot |= uint32_t{static_cast<BallotLane*>(lanes[lane])->predicate} << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<BallotLane*>(lanes[lane])->ballot = ballot;
  }
}

inline uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  BallotLane self{predicate, 0};
  warp_collective(mask, &self, ballot_lanes, Fence::kNone, site);
  return self.ballot;
}

}  // namespace simt

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier(0, site); }
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(predicate == 0, site) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap(simt::Site site = simt::Site::here()) { simt::fail("__trap()", site); }

inline void __syncwarp(uint32_t mask = ~0u, simt::Site site = simt::Site::here()) {
  simt::warp_collective(mask, nullptr, nullptr, simt::Fence::kWarp, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, predicate == 0, site) == 0;
}

// A source beyond the lane's segment of `width` lanes means the lane itself; by PTX's rule __xor
// may reach back into earlier segments.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              simt::Site site = simt::Site::here()) {
  const int first = simt::lane() & -width;
  return simt::shuffle(mask, value, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  simt::Site site = simt::Site::here()) {
  const int self = simt::lane(), source = self ^ (bits & 31), end = (self & -width) + width;
  return simt::shuffle(mask, value, source < end ? source : self, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   simt::Site site = simt::Site::here()) {
  const int self = simt::lane(), source = self + (delta & 31), end = (self & -width) + width;
  return simt::shuffle(mask, value, source < end ? source : self, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 simt::Site site = simt::Site::here()) {
  const int self = simt::lane(), source = self - (delta & 31), first = self & -width;
  return simt::shuffle(mask, value, source >= first ? source : self, site);
}

// Real atomics, which TSan knows as such.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
  auto* bits = reinterpret_cast<uint32_t*>(address);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED), sum;
  do {
    sum = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, old) + value);
  } while (!__atomic_compare_exchange_n(bits, &old, sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return __builtin_bit_cast(float, old);
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
  return old;
}

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint64_t{x} * y >> 32; }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// The C library declares functions of these names for itself.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
