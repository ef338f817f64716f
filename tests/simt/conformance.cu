// SPDX-License-Identifier: Apache-2.0
//
// Every function of ptx.cuh, and what simt.h gives beside them, on inputs that are the same for
// all: compiled by nvcc for a GPU, and by a C++ compiler for csrc/simt. `conformance FILE` writes
// the number of exact words and of floats (uint32), the words (uint32), which must agree, and the
// floats, which may differ by rounding.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

using namespace fastdeberta;

#ifdef __CUDACC__
#include <cuda_runtime.h>

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* allocate(size_t count) {
  T* memory = nullptr;
  check(cudaMallocManaged(&memory, count * sizeof(T)));
  check(cudaMemset(memory, 0, count * sizeof(T)));
  check(cudaDeviceSynchronize());
  return memory;
}

template <class Kernel, class... Args>
void launch(Kernel kernel, int threads, size_t shared_bytes, Args... args) {
  kernel<<<1, threads, shared_bytes>>>(args...);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
#else
template <class T>
T* allocate(size_t count) {
  return static_cast<T*>(std::calloc(count, sizeof(T)));
}

template <class Kernel, class... Args>
void launch(Kernel kernel, int threads, size_t shared_bytes, Args... args) {
  simt::launch(kernel, 1, threads, shared_bytes, args...);
}
#endif

constexpr uint32_t kFull = 0xFFFFFFFFu;
constexpr int kMatrices = 64, kPowers = 4096, kSteps = 16;

// a [kMatrices][32][4], b [kMatrices][32][2] of 16-bit pairs, d [kMatrices][32][4].
template <class T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  for (int i = 0; i < kMatrices; ++i) {
    const int at = i * 32 + threadIdx.x;
    const uint32_t fragment[4] = {a[4 * at], a[4 * at + 1], a[4 * at + 2], a[4 * at + 3]};
    float sums[4] = {d[4 * at], d[4 * at + 1], d[4 * at + 2], d[4 * at + 3]};
    ptx::mma<T>(sums, fragment, b[2 * at], b[2 * at + 1]);
    for (int r = 0; r < 4; ++r) d[4 * at + r] = sums[r];
  }
}

__global__ void raise(const float* x, float* powers) {
  for (int i = threadIdx.x; i < kPowers; i += blockDim.x) powers[i] = ptx::exp2_approx(x[i]);
}

// out [32][12]; in [256]: 32 rows of 16 bytes, which the lanes address in another order.
__global__ void load(const uint32_t* in, uint32_t* out) {
  FASTDEBERTA_SHARED(raw);
  uint32_t* shared = reinterpret_cast<uint32_t*>(raw);
  for (int i = threadIdx.x; i < 256; i += 32) shared[i] = in[i];
  __syncthreads();
  const uint32_t* row = shared + threadIdx.x * 13 % 64 * 4;
  uint32_t x4[4], x2[2];
  uint32_t* mine = out + threadIdx.x * 12;
  ptx::ldmatrix_x4(x4, row);
  for (int r = 0; r < 4; ++r) mine[r] = x4[r];
  ptx::ldmatrix_x4_trans(x4, row);
  for (int r = 0; r < 4; ++r) mine[4 + r] = x4[r];
  ptx::ldmatrix_x2(x2, row);
  for (int r = 0; r < 2; ++r) mine[8 + r] = x2[r];
  ptx::ldmatrix_x2_trans(x2, row);
  for (int r = 0; r < 2; ++r) mine[10 + r] = x2[r];
}

// Two warps copy in a pipeline of three stages, some copies being zeros; out [kSteps][64][5]: what
// the other warp's thread copied.
__global__ void copy(const uint32_t* in, uint32_t* out) {
  FASTDEBERTA_SHARED(raw);
  uint32_t* shared = reinterpret_cast<uint32_t*>(raw);  // [3][64][8]
  const int thread = threadIdx.x, other = thread ^ 32;
  auto fetch = [&](int step) {
    if (step < kSteps) {
      uint32_t* mine = shared + (step % 3 * 64 + thread) * 8;
      const uint32_t* from = in + (step * 64 + thread) * 8 % 2048;
      ptx::cp_async16(mine, from, (step + thread) % 3 != 0);
      ptx::cp_async4(mine + 4, from + 5, (step + thread) % 5 != 0);
    }
    ptx::cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int step = 0; step < kSteps; ++step) {
    fetch(step + 2);
    ptx::cp_async_wait<2>();
    ptx::bar_sync(1, 64);
    for (int i = 0; i < 5; ++i) {
      out[(step * 64 + thread) * 5 + i] = shared[(step % 3 * 64 + other) * 8 + i];
    }
    __syncthreads();
  }
}

// out [64][38]
__global__ void exchange(uint32_t* out) {
  const uint32_t thread = threadIdx.x, value = thread * 2654435761u;
  uint32_t* mine = out + thread * 38;
  for (int width = 8; width <= 32; width *= 2) {
    for (int argument = 1; argument < 8; argument += 3) {
      *mine++ = __shfl_sync(kFull, value, argument + 5, width);
      *mine++ = __shfl_xor_sync(kFull, value, argument * 3, width);
      *mine++ = __shfl_up_sync(kFull, value, argument, width);
    }
  }
  *mine++ = __shfl_down_sync(kFull, value, 3);
  *mine++ = __ballot_sync(kFull, value % 3 == 0);
  *mine++ = __any_sync(kFull, thread == 40);
  *mine++ = __all_sync(kFull, thread != 40);
  *mine++ = __syncthreads_count(value % 5 == 0);
  *mine++ = __syncthreads_or(thread == 40) != 0;
  *mine++ = __syncthreads_and(thread != 40) != 0;
  *mine++ = __popc(value);
  *mine++ = __clz(int(value >> thread % 31));
  *mine++ = __ffs(int(value << thread % 31));
  *mine++ = __umulhi(value, 0xDEADBEEFu);
}

uint32_t random_word() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 32);
}
float random_float() { return float(int32_t(random_word())) * 0x1p-31f; }  // in [-1, 1]

template <class T>
uint32_t random_pair() {
  T pair[2];
  for (T& element : pair) {
    if constexpr (std::is_same_v<T, __half>) {
      element = __float2half(random_float());
    } else {
      element = __float2bfloat16(random_float());
    }
  }
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

template <class T>
void append_products(std::vector<float>& floats) {
  constexpr int lanes = kMatrices * 32;
  uint32_t *a = allocate<uint32_t>(4 * lanes), *b = allocate<uint32_t>(2 * lanes);
  float* d = allocate<float>(4 * lanes);
  for (int i = 0; i < 4 * lanes; ++i) a[i] = random_pair<T>();
  for (int i = 0; i < 2 * lanes; ++i) b[i] = random_pair<T>();
  for (int i = 0; i < 4 * lanes; ++i) d[i] = random_float();
  launch(multiply<T>, 32, 0, a, b, d);
  floats.insert(floats.end(), d, d + 4 * lanes);
}

int main(int, char** arguments) {
  std::vector<uint32_t> words;
  std::vector<float> floats;
  append_products<__half>(floats);
  append_products<__nv_bfloat16>(floats);

  float *x = allocate<float>(kPowers), *powers = allocate<float>(kPowers);
  for (int i = 0; i < kPowers; ++i) x[i] = random_float() * 130.0f;
  x[0] = 0.0f, x[1] = -INFINITY, x[2] = 1.0f, x[3] = -1000.0f;
  launch(raise, 32, 0, x, powers);
  floats.insert(floats.end(), powers, powers + kPowers);

  uint32_t* in = allocate<uint32_t>(2048);
  for (int i = 0; i < 2048; ++i) in[i] = random_word();
  auto append = [&](auto kernel, int threads, size_t shared_bytes, size_t count, auto... args) {
    uint32_t* out = allocate<uint32_t>(count);
    launch(kernel, threads, shared_bytes, args..., out);
    words.insert(words.end(), out, out + count);
  };
  append(load, 32, 1024, 32 * 12, in);
  append(copy, 64, 3 * 64 * 32, kSteps * 64 * 5, in);
  append(exchange, 64, 0, 64 * 38);

  const uint32_t counts[2] = {uint32_t(words.size()), uint32_t(floats.size())};
  std::FILE* file = std::fopen(arguments[1], "wb");
  if (!file) return 1;
  std::fwrite(counts, 4, 2, file);
  std::fwrite(words.data(), 4, words.size(), file);
  std::fwrite(floats.data(), 4, floats.size(), file);
  return std::fclose(file) != 0;
}
