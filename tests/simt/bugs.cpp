// SPDX-License-Identifier: Apache-2.0
//
// Kernels with one planted bug each, and correct ones. `bugs NAME...` runs those named: it exits
// with 3 at the first whose result is wrong, with 4 at the first simt::Error, else with 0.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

using namespace fastdeberta;

constexpr int kThreads = 128;
constexpr uint32_t kFull = 0xFFFFFFFFu;

// Reads what a thread of another warp wrote.
__global__ void pass_on(float* out, bool barrier) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const unsigned other = (threadIdx.x + 37) % kThreads;
  shared[threadIdx.x] = 1.0f;
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[other];
}

// Reads what a lane of the same warp wrote.
__global__ void pass_in_warp(float* out, bool fence) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  shared[threadIdx.x] = 1.0f;
  if (fence) {
    __syncwarp();
  } else {
    __shfl_sync(kFull, 0, 0);  // brings the lanes together, and orders no memory
  }
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

// One thread writes while others read what was there before, all between the same two barriers, or
// the same two __syncwarp(). Whoever runs ahead is at the second when the last leaves the first.
__global__ void write_while_read(float* out, bool in_warp, bool barrier) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  auto meet = [=] {
    if (in_warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  shared[threadIdx.x] = 1.0f;
  meet();
  if (threadIdx.x % 32 != 31) out[threadIdx.x] = shared[threadIdx.x | 31];
  if (barrier) meet();
  if (threadIdx.x % 32 == 31) {
    out[threadIdx.x] = 1.0f;
    shared[threadIdx.x] = 2.0f;
  }
  meet();
}

// Reads copies of another thread: needs the wait first and the barrier then.
__global__ void copy_tile(float* out, const float* in, bool wait, bool barrier) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const unsigned self = threadIdx.x, other = (self + 37) % kThreads;
  ptx::cp_async16(shared + 4 * self, in + 4 * self, true);
  ptx::cp_async_commit();
  if (wait) ptx::cp_async_wait<0>();
  if (barrier) __syncthreads();
  out[self] = shared[4 * other];
  ptx::cp_async_wait<0>();
}

// Starts to fill a tile again, which other threads must have read by then.
__global__ void fill_again(float* out, const float* in, bool barrier) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const unsigned self = threadIdx.x, other = (self + 37) % kThreads;
  shared[4 * self] = 1.0f;
  __syncthreads();
  out[self] = shared[4 * other];
  if (barrier) __syncthreads();
  ptx::cp_async16(shared + 4 * self, in + 4 * self, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void copy_left_in_flight(const float* in) {
  FASTDEBERTA_SHARED(raw);
  ptx::cp_async16(raw + 16 * threadIdx.x, in, true);
  ptx::cp_async_commit();
}

__global__ void misaligned_source(const float* in) {
  FASTDEBERTA_SHARED(raw);
  ptx::cp_async16(raw, in + 1, true);
}

__global__ void load_rows(float* out, int stride) {
  FASTDEBERTA_SHARED(raw);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, raw + threadIdx.x * stride);
  out[threadIdx.x] = 1.0f;
}

__global__ void diverged_shuffle(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);  // diverged_shuffle: one half
  } else {
    __syncthreads();  // diverged_shuffle: the other
  }
}

__global__ void two_shuffles(float* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);  // two_shuffles: odd
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kFull, 1.0f, 1);  // two_shuffles: even
  }
}

__global__ void two_barriers() {
  if (threadIdx.x < 64) {
    __syncthreads();  // two_barriers: first
  } else {
    __syncthreads();  // two_barriers: second
  }
}

__global__ void barrier_of_two_sizes() { ptx::bar_sync(1, threadIdx.x < 32 ? 64 : 128); }
__global__ void barrier_of_half_warps() {
  if (threadIdx.x % 32 < 16) ptx::bar_sync(1, 64);
  __syncwarp();
}
__global__ void barrier_missing_a_warp() {
  if (threadIdx.x >= 32) ptx::bar_sync(1, 128);
}
__global__ void mask_without_self() { __syncwarp(1); }
__global__ void mask_with_exited() {
  if (threadIdx.x % 32 == 31) return;
  __syncwarp();
  __syncwarp();
}

__global__ void write_shared(int index) {
  FASTDEBERTA_SHARED(raw);
  if (threadIdx.x == 0) reinterpret_cast<float*>(raw)[index] = 1.0f;
}

__global__ void write_global(float* out, int index) {
  if (threadIdx.x == 0) out[index] = 1.0f;
}

__global__ void overflow(float* out, int big) { out[threadIdx.x] = big + int(threadIdx.x) > 0; }

__global__ void misaligned_vector(float* out) {
  FASTDEBERTA_SHARED(raw);
  out[threadIdx.x] = reinterpret_cast<const uint4*>(raw + 4)->x ? 1.0f : 0.0f;
}

__global__ void branch_on_shared(float* out, bool write) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  if (write) shared[threadIdx.x] = -1.0f;
  out[threadIdx.x] = shared[threadIdx.x] > 0 ? 2.0f : 1.0f;
}

__global__ void add_plainly(float* out, unsigned adders) {
  if (threadIdx.x < adders) *out += 1.0f;
}
__global__ void add_atomically(float* out) { atomicAdd(out, 1.0f); }

// What real kernels are made of: out[16 * warp + row] = the sum over j of (A B)[row][j], the row
// sums of a product [64, 64] x [64, 8] by 4 warps, and their total. Each step's tiles of A and B
// come by cp.async while those of the step before are multiplied.
__global__ void multiply(float* out, const __half* a, const __half* b) {
  FASTDEBERTA_SHARED(raw);
  __half* tile_a = reinterpret_cast<__half*>(raw);  // [2][64, 16]
  __half* tile_b = tile_a + 2 * 64 * 16;            // [2][16, 8]
  float* sums = reinterpret_cast<float*>(tile_b + 2 * 16 * 8);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  auto fetch = [&](int step) {
    const int half = step % 2, row = thread / 2, column = thread % 2 * 8;
    ptx::cp_async16(tile_a + half * 1024 + row * 16 + column, a + row * 64 + step * 16 + column,
                    true);
    if (thread < 16) {
      ptx::cp_async16(tile_b + half * 128 + thread * 8, b + (step * 16 + thread) * 8, true);
    }
    ptx::cp_async_commit();
  };
  float d[4] = {};
  fetch(0);
  for (int step = 0; step < 4; ++step) {
    if (step < 3) fetch(step + 1);
    if (step < 3) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const __half* rows = tile_a + step % 2 * 1024 + (warp * 16 + lane % 16) * 16 + lane / 16 * 8;
    uint32_t fragment_a[4], fragment_b[2];
    ptx::ldmatrix_x4(fragment_a, rows);
    ptx::ldmatrix_x2_trans(fragment_b, tile_b + step % 2 * 128 + lane % 16 * 8);
    ptx::mma<__half>(d, fragment_a, fragment_b[0], fragment_b[1]);
    __syncthreads();
  }
  for (int half = 0; half < 2; ++half) {
    float sum = d[2 * half] + d[2 * half + 1];
    sum += __shfl_xor_sync(kFull, sum, 1);
    sum += __shfl_xor_sync(kFull, sum, 2);
    if (lane % 4 == 0) sums[warp * 16 + half * 8 + lane / 4] = sum;
  }
  __syncwarp();
  const float sum = lane < 16 ? sums[warp * 16 + lane] : 0.0f;
  ptx::bar_sync(1 + warp / 2, 64);
  if (lane < 16) {
    out[blockIdx.x * 65 + warp * 16 + lane] = sum;
    atomicAdd(out + blockIdx.x * 65 + 64, sum);
  }
}

bool multiplies() {
  std::vector<__half> a(64 * 64), b(64 * 8);
  auto value = [](int i) {
    return float(i * 7919 % 13 - 6);
  };  // small integers: all sums are exact
  for (int i = 0; i < 64 * 64; ++i) a[i] = __float2half(value(i));
  for (int i = 0; i < 64 * 8; ++i) b[i] = __float2half(value(3 * i + 1));
  std::vector<float> out(3 * 65), expected(65);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 64; ++k) expected[i] += value(i * 64 + k) * value(3 * (k * 8 + j) + 1);
    }
    expected[64] += expected[i];
  }
  simt::launch(multiply, 3, kThreads, 2 * (2 * 1024 + 2 * 128) + 4 * 64, out.data(), a.data(),
               b.data());
  for (int i = 0; i < 3 * 65; ++i) {
    if (out[i] != expected[i % 65]) return false;
  }
  return true;
}

int main(int count, char** arguments) {
  std::vector<float> in(4 * kThreads, 1.0f), out(kThreads), zeros(4 * kThreads);
  auto all_ones = [&] {
    for (float x : out) {
      if (x != 1.0f) return false;
    }
    return true;
  };
  // A launch whose result is right when every element is 1.
  auto ones = [&](auto kernel, size_t shared_bytes, auto... args) {
    return [=, &out] {
      simt::launch(kernel, 1, kThreads, shared_bytes, args...);
      return all_ones();
    };
  };
  auto runs = [](auto kernel, int blocks, size_t shared_bytes, auto... args) {
    return [=] {
      simt::launch(kernel, blocks, kThreads, shared_bytes, args...);
      return true;
    };
  };
  float *o = out.data(), *i = in.data(), *z = zeros.data();
  const size_t bytes = 16 * kThreads;
  const std::map<std::string, std::function<bool()>> cases = {
      {"multiply", multiplies},
      {"barrier", ones(pass_on, bytes, o, true)},
      {"no_barrier", ones(pass_on, bytes, o, false)},
      {"syncwarp", ones(pass_in_warp, bytes, o, true)},
      {"no_syncwarp", ones(pass_in_warp, bytes, o, false)},
      {"read_then_write", ones(write_while_read, bytes, o, false, true)},
      {"write_while_read", ones(write_while_read, bytes, o, false, false)},
      {"read_then_write_in_warp", ones(write_while_read, bytes, o, true, true)},
      {"write_while_read_in_warp", ones(write_while_read, bytes, o, true, false)},
      {"copy", ones(copy_tile, bytes, o, i, true, true)},
      {"copy_no_wait", ones(copy_tile, bytes, o, i, false, true)},
      {"copy_no_barrier", ones(copy_tile, bytes, o, i, true, false)},
      {"refill", ones(fill_again, bytes, o, z, true)},
      {"refill_no_barrier", ones(fill_again, bytes, o, z, false)},
      {"copy_left_in_flight", runs(copy_left_in_flight, 1, bytes, i)},
      {"misaligned_source", runs(misaligned_source, 1, bytes, i)},
      {"rows", ones(load_rows, bytes, o, 16)},
      {"misaligned_rows", ones(load_rows, bytes, o, 8)},
      {"rows_outside", ones(load_rows, bytes / 2, o, 16)},
      {"diverged_shuffle", runs(diverged_shuffle, 1, 0, o)},
      {"two_shuffles", runs(two_shuffles, 1, 0, o)},
      {"two_barriers", runs(two_barriers, 1, 0)},
      {"barrier_of_two_sizes", runs(barrier_of_two_sizes, 1, 0)},
      {"barrier_of_half_warps", runs(barrier_of_half_warps, 1, 0)},
      {"barrier_missing_a_warp", runs(barrier_missing_a_warp, 1, 0)},
      {"mask_without_self", runs(mask_without_self, 1, 0)},
      {"mask_with_exited", runs(mask_with_exited, 1, 0)},
      {"shared_overrun", runs(write_shared, 1, 512, 128)},
      {"shared_underrun", runs(write_shared, 1, 512, -1)},
      {"global_overrun", runs(write_global, 1, 0, o, kThreads)},
      {"too_much_shared", runs(write_shared, 1, (227 << 10) + 1, 0)},
      {"overflow", runs(overflow, 1, 0, o, 0x7FFFFFF0)},
      {"misaligned_vector", runs(misaligned_vector, 1, 64, o)},
      {"initialised", ones(branch_on_shared, bytes, o, true)},
      {"uninitialised", ones(branch_on_shared, bytes, o, false)},
      {"race_in_block", runs(add_plainly, 1, 0, o, 2u)},
      {"race_between_blocks", runs(add_plainly, 2, 0, o, 1u)},
      {"atomics", runs(add_atomically, 4, 0, o)},
  };
  for (int argument = 1; argument < count; ++argument) {
    try {
      const bool right = cases.at(arguments[argument])();
      std::printf("%s: %s\n", arguments[argument], right ? "right" : "wrong");
      if (!right) return 3;
    } catch (const simt::Error& error) {
      std::printf("%s: %s\n", arguments[argument], error.what());
      return 4;
    }
  }
  return 0;
}
