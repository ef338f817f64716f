// SPDX-License-Identifier: Apache-2.0
//
// What csrc/simt gives kernels, checked on its own. `primitives NAME` runs one test and prints what
// fails; `primitives` lists the names.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cuda/ptx.cuh"

using namespace fastdeberta;

constexpr uint32_t kFull = 0xFFFFFFFFu;
int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition) && ++failures <= 20) {                               \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
uint16_t half_bits(float x) { return __half_raw(__float2half(x)).x; }

// Fragments, stated twice. First as the PTX ISA has it, in the figures of m16n8k16 and ldmatrix:
// which row and column is element i of what a lane holds.

struct Place {
  int row, column;
  bool operator==(Place other) const { return row == other.row && column == other.column; }
};

namespace isa {

Place a(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {(i < 2 || (i >= 4 && i < 6)) ? group : group + 8,
          i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8};
}
Place b(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, group};
}
Place d(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}
// Of the 8x8 matrices, stacked: the row is that of the lane which gave its address.
Place loaded(int lane, int i) { return {i / 2 * 8 + lane / 4, lane % 4 * 2 + i % 2}; }
Place loaded_transposed(int lane, int i) { return {i / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4}; }

}  // namespace isa

// Second as CUTLASS has it: thread-value layouts of CuTe, shape and stride, for the atoms
// SM80_16x8x16_F32F16F16F32_TN and SM75_U32x4_LDSM_N, SM75_U16x8_LDSM_T. A layout unfolds an index
// into coordinates, the first running fastest, and adds up coordinate times stride.

namespace cute {

struct Mode {
  int shape, stride;
};

int offset(const std::vector<Mode>& modes, int index) {
  int sum = 0;
  for (Mode mode : modes) {
    sum += index % mode.shape * mode.stride;
    index /= mode.shape;
  }
  return sum;
}

// Matrices of m x k, n x k and m x n, all with the first dimension contiguous.
Place a(int lane, int i) {
  const int at = offset({{4, 32}, {8, 1}}, lane) + offset({{2, 16}, {2, 8}, {2, 128}}, i);
  return {at % 16, at / 16};
}
Place b(int lane, int i) {
  const int at = offset({{4, 16}, {8, 1}}, lane) + offset({{2, 8}, {2, 64}}, i);
  return {at / 8, at % 8};
}
Place d(int lane, int i) {
  const int at = offset({{4, 32}, {8, 1}}, lane) + offset({{2, 16}, {2, 8}}, i);
  return {at % 16, at / 16};
}
// In bits from the first row: a row has 128, an element 16.
Place loaded(int lane, int i) {
  const int bit = offset({{32, 32}}, lane) + offset({{32, 1}, {4, 1024}}, 16 * i);
  return {bit / 128, bit % 128 / 16};
}
Place loaded_transposed(int lane, int i) {
  const int bit =
      offset({{4, 256}, {8, 16}}, lane) + offset({{16, 1}, {2, 128}, {4, 1024}}, 16 * i);
  return {bit / 128, bit % 128 / 16};
}

}  // namespace cute

void test_statements_agree() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      CHECK(isa::a(lane, i) == cute::a(lane, i));
      CHECK(i >= 4 || isa::b(lane, i) == cute::b(lane, i));
      CHECK(i >= 4 || isa::d(lane, i) == cute::d(lane, i));
      CHECK(isa::loaded(lane, i) == cute::loaded(lane, i));
      CHECK(isa::loaded_transposed(lane, i) == cute::loaded_transposed(lane, i));
    }
  }
}

struct Fragments {
  uint32_t a[32][4], b[32][2];
  float d[32][4];
};

template <class T>
__global__ void multiply(Fragments* fragments) {
  const int lane = threadIdx.x;
  float d[4];
  uint32_t a[4];
  for (int r = 0; r < 4; ++r) d[r] = fragments->d[lane][r];
  for (int r = 0; r < 4; ++r) a[r] = fragments->a[lane][r];
  ptx::mma<T>(d, a, fragments->b[lane][0], fragments->b[lane][1]);
  for (int r = 0; r < 4; ++r) fragments->d[lane][r] = d[r];
}

// d + a * b by the warp, the places of all elements as cute has them.
template <class T>
void multiply_matrices(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
  auto bits = [](float x) -> uint32_t {
    return std::is_same_v<T, __half> ? half_bits(x) : bits_of(x) >> 16;  // all values are exact
  };
  Fragments fragments = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const Place at = cute::a(lane, i);
      fragments.a[lane][i / 2] |= bits(a[at.row][at.column]) << i % 2 * 16;
    }
    for (int i = 0; i < 4; ++i) {
      const Place at = cute::b(lane, i), into = cute::d(lane, i);
      fragments.b[lane][i / 2] |= bits(b[at.row][at.column]) << i % 2 * 16;
      fragments.d[lane][i] = d[into.row][into.column];
    }
  }
  simt::launch(multiply<T>, 1, 32, 0, &fragments);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place from = cute::d(lane, i);
      d[from.row][from.column] = fragments.d[lane][i];
    }
  }
}

// One element of a, or of b, at a time: it brings a row of the other matrix to a place of its own.
template <class T>
void test_mma() {
  float a[16][16] = {}, b[16][8] = {}, distinct_a[16][16], distinct_b[16][8], addend[16][8];
  for (int i = 0; i < 256; ++i) distinct_a[i / 16][i % 16] = i - 128;
  for (int i = 0; i < 128; ++i) distinct_b[i / 8][i % 8] = i + 1;
  for (int i = 0; i < 128; ++i) addend[i / 8][i % 8] = 1000 * i;
  float d[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      a[i][k] = 1;
      std::memcpy(d, addend, sizeof(d));
      multiply_matrices<T>(a, distinct_b, d);
      a[i][k] = 0;
      for (int row = 0; row < 16; ++row) {
        for (int j = 0; j < 8; ++j) {
          CHECK(d[row][j] == addend[row][j] + (row == i ? distinct_b[k][j] : 0));
        }
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < 8; ++j) {
      b[k][j] = 1;
      std::memcpy(d, addend, sizeof(d));
      multiply_matrices<T>(distinct_a, b, d);
      b[k][j] = 0;
      for (int i = 0; i < 16; ++i) {
        for (int column = 0; column < 8; ++column) {
          CHECK(d[i][column] == addend[i][column] + (column == j ? distinct_a[i][k] : 0));
        }
      }
    }
  }
}

__global__ void load(uint32_t* out) {  // [4 instructions][32 lanes][4]
  FASTDEBERTA_SHARED(raw);
  uint16_t* shared = reinterpret_cast<uint16_t*>(raw);
  const int lane = threadIdx.x;
  // Rows lie apart, and not in the order of the lanes; element e of row r is 8 * r + e.
  const int row = (lane * 5 % 32) * 24;
  for (int e = 0; e < 8; ++e) shared[row + e] = 8 * lane + e;
  __syncwarp();
  uint32_t r[4], s[4], t[2], u[2];
  ptx::ldmatrix_x4(r, shared + row);
  ptx::ldmatrix_x4_trans(s, shared + row);
  const uint16_t* few = lane < 16 ? shared + row : nullptr;  // the other lanes' is not looked at
  ptx::ldmatrix_x2(t, few);
  ptx::ldmatrix_x2_trans(u, few);
  for (int m = 0; m < 4; ++m) {
    out[lane * 4 + m] = r[m];
    out[128 + lane * 4 + m] = s[m];
    if (m < 2) out[256 + lane * 4 + m] = t[m];
    if (m < 2) out[384 + lane * 4 + m] = u[m];
  }
}

void test_ldmatrix() {
  std::vector<uint32_t> out(512);
  simt::launch(load, 1, 32, 32 * 48, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      auto element = [&](int instruction) {
        return out[instruction * 128 + lane * 4 + i / 2] >> i % 2 * 16 & 0xFFFF;
      };
      const Place plain = cute::loaded(lane, i), transposed = cute::loaded_transposed(lane, i);
      CHECK(element(0) == 8u * plain.row + plain.column);
      CHECK(element(1) == 8u * transposed.row + transposed.column);
      CHECK(i >= 4 || element(2) == element(0));
      CHECK(i >= 4 || element(3) == element(1));
    }
  }
}

void test_widen() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    __half_raw half;
    half.x = bits;
    const float expected = __half2float(half), got = ptx::host::widen<__half>(bits);
    CHECK(std::isnan(expected) ? std::isnan(got) : bits_of(got) == bits_of(expected));
    CHECK(bits_of(ptx::host::widen<__nv_bfloat16>(bits)) == bits << 16);
  }
}

__global__ void take_numbers(int* next, int* numbers) {
  const int thread = threadIdx.x;
  numbers[thread] = atomicAdd(next, 1);
  __syncwarp();
  numbers[blockDim.x + thread] = atomicAdd(next, 1);
}

std::vector<int> numbers() {
  int next = 0;
  std::vector<int> taken(256);
  simt::launch(take_numbers, 1, 128, 0, &next, taken.data());
  return taken;
}

void test_orders() {
  using simt::Order;
  unsetenv("FASTDEBERTA_SIMT_ORDER");
  simt::config.order = Order::kForward;
  const auto forward = numbers();
  simt::config.order = Order::kReverse;
  const auto reverse = numbers();
  for (int thread = 0; thread < 32; ++thread) {
    CHECK(forward[thread] == thread);
    CHECK(reverse[127 - thread] == thread);
  }
  simt::config.order = Order::kRandom;
  simt::config.seed = 5;
  const auto random = numbers();
  CHECK(random != forward && random != reverse && random == numbers());
  simt::config.seed = 6;
  CHECK(numbers() != random);
  setenv("FASTDEBERTA_SIMT_ORDER", "random:5", 1);
  CHECK(numbers() == random);
  setenv("FASTDEBERTA_SIMT_ORDER", "reverse", 1);
  CHECK(numbers() == reverse);
  setenv("FASTDEBERTA_SIMT_ORDER", "forward", 1);
  CHECK(numbers() == forward);
  for (const char* wrong : {"", "forwards", "random:x", "random:", "reverse:1"}) {
    setenv("FASTDEBERTA_SIMT_ORDER", wrong, 1);
    try {
      numbers();
      CHECK(!"accepted");
    } catch (const simt::Error&) {
    }
  }
}

__global__ void copy(const float* in, float* out, int* poisoned) {
  FASTDEBERTA_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  auto seen = [&](int i) { return std::isnan(shared[i]); };
  *poisoned += seen(0);
  for (int i = 0; i < 12; ++i) shared[i] = -1.0f;
  ptx::cp_async16(shared, in, true);
  ptx::cp_async_commit();
  ptx::cp_async16(shared + 4, nullptr, false);
  ptx::cp_async_commit();
  ptx::cp_async_commit();  // an empty group counts
  ptx::cp_async4(shared + 8, in + 8, true);
  ptx::cp_async4(shared + 9, nullptr, false);
  *poisoned += seen(0) + seen(4) + seen(8) + seen(9);
  ptx::cp_async_wait<3>();
  *poisoned += seen(0) + seen(4);
  ptx::cp_async_wait<2>();
  *poisoned += !seen(0) + seen(4);
  ptx::cp_async_wait<0>();
  *poisoned += !seen(0) + !seen(4) + seen(8);  // the last two are in no group yet
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 12; ++i) out[i] = shared[i];
}

void test_cp_async() {
  std::vector<float> in(12), out(12);
  for (int i = 0; i < 12; ++i) in[i] = i + 1;
  int poisoned = 0;
  simt::launch(copy, 1, 1, 64, in.data(), out.data(), &poisoned);
  CHECK(poisoned == 1 + 4 + 2 + 2 + 3);
  CHECK((out == std::vector<float>{1, 2, 3, 4, 0, 0, 0, 0, 9, 0, -1, -1}));
}

__global__ void shuffle(int* out, int argument, int width) {  // [4][32]
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kFull, lane, argument, width);
  out[32 + lane] = __shfl_xor_sync(kFull, lane, argument, width);
  out[64 + lane] = __shfl_up_sync(kFull, lane, argument, width);
  out[96 + lane] = __shfl_down_sync(kFull, lane, argument, width);
}

__global__ void shuffle_others(double* wide, uint16_t* narrow, float* outside) {
  const int lane = threadIdx.x;
  wide[lane] = __shfl_xor_sync(kFull, 1.0 / (1 + lane), 3);
  narrow[lane] = __half_raw(__shfl_down_sync(kFull, __float2half(float(lane)), 1)).x;
  if (lane < 8) outside[lane] = __shfl_sync(0xFFu, 1.0f, lane + 4);
}

void test_shuffles() {
  std::vector<int> out(128);
  for (int width = 1; width <= 32; width *= 2) {
    for (int argument = 0; argument < 32; ++argument) {
      simt::launch(shuffle, 1, 32, 0, out.data(), argument, width);
      for (int lane = 0; lane < 32; ++lane) {
        const int segment = lane / width;
        auto own = [&](int source, bool exists) { return exists ? source : lane; };
        CHECK(out[lane] == segment * width + argument % width);
        CHECK(out[32 + lane] == own(lane ^ argument, (lane ^ argument) / width <= segment));
        CHECK(out[64 + lane] == own(lane - argument, lane - argument >= segment * width));
        CHECK(out[96 + lane] == own(lane + argument, lane + argument < (segment + 1) * width));
      }
    }
  }
  std::vector<double> wide(32);
  std::vector<uint16_t> narrow(32);
  std::vector<float> outside(8);
  simt::launch(shuffle_others, 1, 32, 0, wide.data(), narrow.data(), outside.data());
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(wide[lane] == 1.0 / (1 + (lane ^ 3)));
    CHECK(narrow[lane] == half_bits(lane < 31 ? lane + 1 : 31));
    CHECK(lane >= 8 || std::isnan(outside[lane]) == (lane >= 4));
  }
}

__global__ void vote(uint32_t* out, uint32_t threshold) {  // [128][6]
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  uint32_t* mine = out + 6 * thread;
  mine[0] = __ballot_sync(kFull, lane < threshold);
  mine[1] = __any_sync(kFull, thread < threshold);
  mine[2] = __all_sync(kFull, thread < threshold);
  mine[3] = __syncthreads_count(thread < threshold);
  mine[4] = __syncthreads_or(thread < threshold);
  mine[5] = __syncthreads_and(thread < threshold);
}

__global__ void vote_apart(uint32_t* out) {
  const int lane = threadIdx.x;
  out[lane] = 0;
  // Half of the warp exchanges among itself while the other half waits for it already.
  if (lane < 16) out[lane] = __ballot_sync(lane < 8 ? 0xFFu : 0xFF00u, lane % 2);
  __syncwarp();
  out[lane] += __popc(__ballot_sync(kFull, 1));
  // Lane 1 meets lane 3 first, while lanes 0 and 2 wait for it.
  if (lane == 1 || lane == 3) out[lane] += 1000 * __ballot_sync(0b1010u, 1);
  if (lane < 3) out[lane] += 100000 * __ballot_sync(0b0111u, 1);
}

void test_votes() {
  std::vector<uint32_t> out(6 * 128);
  for (uint32_t threshold : {0u, 1u, 31u, 32u, 33u, 64u, 127u, 128u}) {
    simt::launch(vote, 1, 128, 0, out.data(), threshold);
    for (uint32_t thread = 0; thread < 128; ++thread) {
      const uint32_t* mine = &out[6 * thread];
      const uint32_t warp = thread / 32 * 32;
      CHECK(mine[0] == (threshold >= 32 ? kFull : (1u << threshold) - 1));
      CHECK(mine[1] == (warp < threshold));
      CHECK(mine[2] == (warp + 32 <= threshold));
      CHECK(mine[3] == threshold);
      CHECK(mine[4] == (threshold > 0));
      CHECK(mine[5] == (threshold == 128));
    }
  }
  simt::launch(vote_apart, 1, 32, 0, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t halves = lane < 8 ? 0xAA : lane < 16 ? 0xAA00 : 0;
    const uint32_t first = lane == 1 || lane == 3 ? 10 : 0, then = lane < 3 ? 7 : 0;
    CHECK(out[lane] == 32 + halves + 1000 * first + 100000 * then);
  }
}

// Two pairs of warps go on at their own pace; then the first pair hands over to the second.
__global__ void pass_by_pairs(int* out, int* sums) {
  FASTDEBERTA_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const int thread = threadIdx.x, pair = thread / 64, other = thread ^ 32;
  int sum = 0;
  for (int round = 0; round < 3 + 5 * pair; ++round) {
    shared[thread] = thread + round;
    ptx::bar_sync(1 + pair, 64);
    sum += shared[other];
    ptx::bar_sync(1 + pair, 64);
  }
  sums[thread] = sum;
  if (pair == 0) {
    shared[thread] = 7 * thread;
    ptx::bar_sync(3, 128);
  } else {
    ptx::bar_sync(3, 128);
    out[thread - 64] = shared[thread - 64];
  }
}

void test_named_barriers() {
  std::vector<int> out(64), sums(128);
  simt::launch(pass_by_pairs, 1, 128, 512, out.data(), sums.data());
  for (int thread = 0; thread < 128; ++thread) {
    const int rounds = thread < 64 ? 3 : 8;
    CHECK(sums[thread] == rounds * (thread ^ 32) + rounds * (rounds - 1) / 2);
    CHECK(thread >= 64 || out[thread] == 7 * thread);
  }
}

__global__ void note_index(uint32_t* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  if (threadIdx.x == 2) return;  // those who exit are not waited for
  __syncthreads();
  atomicAdd(out + block * 30 + thread, 1u);
}

void test_indices() {
  std::vector<uint32_t> out(24 * 30);
  simt::launch(note_index, dim3(2, 3, 4), dim3(3, 5, 2), 0, out.data());
  for (int i = 0; i < 24 * 30; ++i) CHECK(out[i] == (i % 3 != 2));
}

__global__ void fail_at(int block, int kind, int* visits) {
  atomicAdd(visits, 1);
  if (blockIdx.x != unsigned(block)) return;
  if (kind == 0 && threadIdx.x < 7) __syncwarp();
  if (kind == 1 && threadIdx.x == 40) throw std::out_of_range("thrown by a kernel");
  if (kind == 2) __trap();
  __syncthreads();
}

void test_errors() {
  for (int kind = 0; kind < 3; ++kind) {
    int visits = 0;
    std::string message;
    try {
      simt::launch(fail_at, 3, 64, 0, 1, kind, &visits);
    } catch (const simt::Error& error) {
      message = error.what();
    } catch (const std::out_of_range& error) {
      message = error.what();
    }
    CHECK(message.find(kind == 0   ? "deadlock in block (1,0,0)"
                       : kind == 1 ? "thrown by a kernel"
                                   : "__trap()") != message.npos);
    CHECK(visits > 64 && visits <= 128);
    test_named_barriers();  // and nothing is left behind
    test_shuffles();
  }
  auto refused = [](auto... launch) {
    try {
      simt::launch(launch...);
    } catch (const simt::Error&) {
      return true;
    }
    return false;
  };
  auto nothing = [] {};
  CHECK(!refused(nothing, dim3(1), dim3(1024), size_t{227 << 10}));
  CHECK(refused(nothing, dim3(1), dim3(1025), size_t{0}));
  CHECK(refused(nothing, dim3(1), dim3(0), size_t{0}));
  CHECK(refused(nothing, dim3(1), dim3(1, 1, 65), size_t{0}));
  CHECK(refused(nothing, dim3(1, 65536), dim3(1), size_t{0}));
  CHECK(refused(nothing, dim3(1), dim3(1), size_t{(227 << 10) + 1}));
  simt::config.shared_limit = 163 << 10;
  CHECK(refused(nothing, dim3(1), dim3(1), size_t{164 << 10}));
  CHECK(refused([=] { simt::launch(nothing, 1, 1, 0); }, dim3(1), dim3(1), size_t{0}));
}

void test_os_threads() {
  std::vector<int> taken[3];
  std::vector<std::thread> threads;
  for (auto& mine : taken) {
    threads.emplace_back([&mine] {
      for (int i = 0; i < 50; ++i) mine = numbers();
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& mine : taken) CHECK(mine == numbers());
}

__global__ void recurse(int* out, int depth) {
  volatile int frame[256];
  frame[depth % 256] = depth;
  __syncthreads();
  if (depth) recurse(out, depth - 1);
  if (!depth) out[threadIdx.x] = frame[0] + 1;
}

void test_stacks() {
  std::vector<int> out(256);
  for (size_t kib : {64, 128, 256}) {  // 32 frames of a KiB and some
    simt::config.stack_bytes = kib << 10;
    for (int threads : {32, 256, 64}) {
      out.assign(256, 0);
      simt::launch(recurse, 2, threads, 0, out.data(), 31);
      for (int thread = 0; thread < 256; ++thread) CHECK(out[thread] == (thread < threads));
    }
  }
}

__global__ void poisoned(int* out) {
  FASTDEBERTA_SHARED(raw);
  out[0] += std::isnan(*reinterpret_cast<float*>(raw));
  out[1] += std::isnan(__half2float(*reinterpret_cast<__half*>(raw + 62)));
  out[2] += reinterpret_cast<uintptr_t>(raw) % 128 == 0;
  std::memset(raw, 0, 64);  // which the next block must not see
}

void test_memory() {
  std::vector<int> out(3);
  simt::launch(poisoned, 4, 1, 64, out.data());
  CHECK((out == std::vector<int>{4, 4, 4}));
}

__global__ void atomics(int* integers, uint32_t* naturals, float* reals) {
  const int thread = threadIdx.x;
  atomicAdd(integers, thread - 100);
  atomicMax(integers + 1, thread * 37 % 64);
  atomicAdd(naturals, 3u);
  atomicAdd(reals, 0.5f);
}

void test_functions() {
  int integers[2] = {};
  uint32_t natural = 0;
  float real = 0;
  simt::launch(atomics, 2, 64, 0, integers, &natural, &real);
  CHECK(integers[0] == 2 * (63 * 32 - 6400) && integers[1] == 63);
  CHECK(natural == 3 * 128 && real == 64.0f);
  CHECK(__popc(0xF0F0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4);
  CHECK(__float_as_int(1.0f) == 0x3F800000 && __uint_as_float(0xC0000000u) == -2.0f);
  CHECK(__umulhi(0x80000000u, 6u) == 3 && min(2, 3) == 2 && max(2.0f, 3.0f) == 3.0f);
  CHECK(std::abs(__expf(1.0f) - 2.7182818f) < 1e-6f && __fdividef(6.0f, 3.0f) == 2.0f);
  for (float x : {-200.0f, -126.5f, -126.0f, -1.5f, 0.0f, 0.25f, 127.0f, 200.0f}) {
    CHECK(ptx::exp2_approx(x) == (x < -126.0f ? 0.0f : std::exp2(x)));
  }
  CHECK(ptx::exp2_approx(-INFINITY) == 0.0f && std::isnan(ptx::exp2_approx(NAN)));
}

int main(int count, char** arguments) {
  const std::map<std::string, std::function<void()>> tests = {
      {"statements_agree", test_statements_agree},
      {"mma_half", test_mma<__half>},
      {"mma_bfloat16", test_mma<__nv_bfloat16>},
      {"ldmatrix", test_ldmatrix},
      {"widen", test_widen},
      {"orders", test_orders},
      {"cp_async", test_cp_async},
      {"shuffles", test_shuffles},
      {"votes", test_votes},
      {"named_barriers", test_named_barriers},
      {"indices", test_indices},
      {"errors", test_errors},
      {"os_threads", test_os_threads},
      {"stacks", test_stacks},
      {"memory", test_memory},
      {"functions", test_functions},
  };
  if (count < 2) {
    for (const auto& test : tests) std::puts(test.first.c_str());
    return 0;
  }
  tests.at(arguments[1])();
  return failures != 0;
}
