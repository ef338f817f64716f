// SPDX-License-Identifier: Apache-2.0
//
// Tiles of 16-bit rows in shared memory, and the operands of mma.m16n8k16 that lie in them.
#pragma once

#include "call.cuh"

namespace fastdeberta::cuda {

// The D elements of one token (or of one row of a table) of one head.
template <class T>
__device__ __forceinline__ const T* rows_of(const HeadsView& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.stride + head * x.head_stride;
}

template <class T>
struct Pair;  // two elements in one register

template <>
struct Pair<__half> {
  static __device__ __forceinline__ __half one(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, static_cast<const void*>(&pair), sizeof bits);
    return bits;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof bits);
    return __half22float2(pair);
  }
};

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 one(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, static_cast<const void*>(&pair), sizeof bits);
    return bits;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
};

// Rows of D elements without padding. 16-byte chunks of a row are exchanged so that the eight rows
// of one ldmatrix phase lie in different banks, whether they are read along rows or columns.
template <class T, int D>
struct Tile {
  static_assert(D % 32 == 0, "the swizzle works on four chunks or eight");
  static constexpr int kChunks = D / 8;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int swizzle = D % 64 == 0 ? row & 7 : row >> 1 & 3;
    return row * D + (chunk ^ swizzle) * 8;
  }

  // Copies rows asynchronously, zeros from row `valid` on. source: first row.
  template <int kRows>
  static __device__ __forceinline__ void load(T* tile, const T* source, int64_t stride, int valid) {
#pragma unroll 2
    for (int n = threadIdx.x; n < kRows * kChunks; n += kThreads) {
      const int row = n / kChunks, chunk = n % kChunks;
      const bool inside = row < valid;
      ptx::cp_async16(tile + offset(row, chunk), source + (inside ? row * stride + chunk * 8 : 0),
                      inside);
    }
  }

  // A, 16x16, rows of the tile being rows of A.
  static __device__ __forceinline__ void a(uint32_t (&a)[4], const T* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(a, tile + offset(row + lane % 16, column / 8 + lane / 16));
  }

  // B, 16x16 (two of n8), rows of the tile being columns of B: b[0], b[1] are the first eight.
  static __device__ __forceinline__ void b(uint32_t (&b)[4], const T* tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(b, tile + offset(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
  }

  // B, 16x16, rows of the tile being rows of B.
  static __device__ __forceinline__ void b_of_rows(uint32_t (&b)[4], const T* tile, int row,
                                                   int column) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(b, tile + offset(row + lane % 16, column / 8 + lane / 16));
  }
};

// Accumulators of rows x 8 * N: [n][0], [n][1] are row lane / 4, columns 8 n + lane % 4 * 2 and
// the next; [n][2], [n][3] the same columns of row lane / 4 + 8.
template <int N>
struct Accumulator {
  float at[N][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < N; ++n) at[n][0] = at[n][1] = at[n][2] = at[n][3] = 0.f;
  }

  // Columns 16 k to 16 k + 15 as operand A.
  template <class T>
  __device__ __forceinline__ void a(uint32_t (&a)[4], int k) const {
    a[0] = Pair<T>::pack(at[2 * k][0], at[2 * k][1]);
    a[1] = Pair<T>::pack(at[2 * k][2], at[2 * k][3]);
    a[2] = Pair<T>::pack(at[2 * k + 1][0], at[2 * k + 1][1]);
    a[3] = Pair<T>::pack(at[2 * k + 1][2], at[2 * k + 1][3]);
  }
};

// Operand A of 16 rows in registers: at[n] are elements 8 (n / 2) + lane % 4 * 2 and the next of
// row lane / 4 + n % 2 * 8.
template <class T>
struct Fragment {
  uint32_t at[4];

  static __device__ __forceinline__ int row(int n) { return threadIdx.x % 32 / 4 + n % 2 * 8; }
  static __device__ __forceinline__ int column(int n) { return n / 2 * 8 + threadIdx.x % 4 * 2; }

  // From global memory; rows from `valid` on are zero. source: the first of the rows.
  __device__ __forceinline__ void load(const T* source, int64_t stride, int valid) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const T* const place = source + row(n) * stride + column(n);
      at[n] = row(n) < valid ? *reinterpret_cast<const uint32_t*>(place) : 0u;
    }
  }

  // To a tile in shared memory; others of the warp need __syncwarp before they read it.
  template <int D>
  __device__ __forceinline__ void store(T* tile, int first, int chunk) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      T* const place = tile + Tile<T, D>::offset(first + row(n), chunk + n / 2) + column(n) % 8;
      *reinterpret_cast<uint32_t*>(place) = at[n];
    }
  }

  // Adds 16 elements to every row.
  __device__ __forceinline__ void add(const T* elements) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 x = Pair<T>::unpack(at[n]), y = pair(elements, n);
      at[n] = Pair<T>::pack(x.x + y.x, x.y + y.y);
    }
  }

  // Adds the lane's part of the products of rows lane / 4 and lane / 4 + 8 with 16 elements.
  __device__ __forceinline__ void dot(float (&dots)[2], const T* elements) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 x = Pair<T>::unpack(at[n]), y = pair(elements, n);
      dots[n % 2] += x.x * y.x + x.y * y.y;
    }
  }

  static __device__ __forceinline__ float2 pair(const T* elements, int n) {
    return Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(elements + column(n)));
  }
};

// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_total(float part) {
  part += __shfl_xor_sync(~0u, part, 1);
  return part + __shfl_xor_sync(~0u, part, 2);
}

// 16 rows of D elements as operand A, in registers.
template <class T, int D>
struct RowFragments {
  Fragment<T> of[D / 16];

  // From global memory; rows from `valid` on are zero. source: the first of the rows.
  __device__ __forceinline__ void load(const T* source, int64_t stride, int valid) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) of[k].load(source + 16 * k, stride, valid);
  }

  // From a tile in shared memory.
  __device__ __forceinline__ void load(const T* tile, int row) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) Tile<T, D>::a(of[k].at, tile, row, 16 * k);
  }
};

// The kBlockN rows of a tile as operands A, 16 rows each; as operands B they are columns. In
// registers if kHeld, else fetched from the tile whenever they are asked for.
template <class T, int D, bool kHeld>
struct TileFragments {
  const T* tile;
  RowFragments<T, D> held[kBlockN / 16];

  __device__ __forceinline__ explicit TileFragments(const T* tile) : tile(tile) {
#pragma unroll
    for (int n = 0; kHeld && n < kBlockN / 16; ++n) held[n].load(tile, 16 * n);
  }

  // Rows 16 n to 16 n + 15, elements 16 k to 16 k + 15.
  __device__ __forceinline__ void get(uint32_t (&a)[4], int n, int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = held[n].of[k].at[r];
    } else {
      Tile<T, D>::a(a, tile, 16 * n, 16 * k);
    }
  }
};

// scores += rows * tile^T
template <class T, int D, int M, bool kHeld>
__device__ __forceinline__ void multiply_transposed(Accumulator<kBlockN / 8> (&scores)[M],
                                                    const RowFragments<T, D> (&rows)[M],
                                                    const TileFragments<T, D, kHeld>& tile) {
#pragma unroll
  for (int n = 0; n < kBlockN / 16; ++n) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t y[4];
      tile.get(y, n, k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma<T>(scores[m].at[2 * n], rows[m].of[k].at, y[0], y[2]);
        ptx::mma<T>(scores[m].at[2 * n + 1], rows[m].of[k].at, y[1], y[3]);
      }
    }
  }
}

// The same with 16 rows that lie in shared memory, which takes fewer registers.
template <class T, int D, bool kHeld>
__device__ __forceinline__ void multiply_transposed(Accumulator<kBlockN / 8>& scores, const T* rows,
                                                    int row,
                                                    const TileFragments<T, D, kHeld>& tile) {
#pragma unroll 1  // loads made ahead would take the registers that this saves
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    Tile<T, D>::a(a, rows, row, 16 * k);
#pragma unroll
    for (int n = 0; n < kBlockN / 16; ++n) {
      uint32_t y[4];
      tile.get(y, n, k);
      ptx::mma<T>(scores.at[2 * n], a, y[0], y[2]);
      ptx::mma<T>(scores.at[2 * n + 1], a, y[1], y[3]);
    }
  }
}

// sums += scores * tile
template <class T, int D, int M>
__device__ __forceinline__ void multiply(Accumulator<D / 8> (&sums)[M],
                                         const Accumulator<kBlockN / 8> (&scores)[M],
                                         const T* tile) {
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) scores[m].template a<T>(a[m], k);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      Tile<T, D>::b_of_rows(b, tile, 16 * k, 16 * n);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma<T>(sums[m].at[2 * n], a[m], b[0], b[1]);
        ptx::mma<T>(sums[m].at[2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Writes accumulated rows times `factor`. out: the first of the 16 rows; from `valid` on no row is
// written.
template <class T, int D>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, const Accumulator<D / 8>& sums,
                                           const float (&factor)[2], int valid) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + half * 8;
    if (r >= valid) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float* x = sums.at[n] + half * 2;
      // A factor of zero clears what was never meant to count, whatever it is.
      const uint32_t pair =
          factor[half] == 0.f ? 0u : Pair<T>::pack(x[0] * factor[half], x[1] * factor[half]);
      *reinterpret_cast<uint32_t*>(out + r * stride + n * 8 + column) = pair;
    }
  }
}

}  // namespace fastdeberta::cuda
