// SPDX-License-Identifier: Apache-2.0
//
// The two position terms of a near tile, and the gradients of its scores as their tables see them.
//
// A tile of kBlockM x kBlockN scores meets only kBlockM + kBlockN - 1 shifts x - y. The rows of the
// tables that belong to these lie in two rings in shared memory, one row a shift, so that every
// near tile is linear whatever the bucketing; the next tile of y replaces kBlockN of them. Products
// with 16 rows of x (y) at a time go to strips of 16-bit numbers, in which score (x, y) finds its
// terms along a diagonal:
//
//   own(x, y)   = x . own_table[row(x - y)]       strip of x: column x - y, less the strip's first
//   other(x, y) = y . other_table[row(x - y)]     strip of y: the same
//
// Backward, gradients of scores take the same places, and products with the ring and with x or y
// are plain matrix products again.
#pragma once

#include "tile.cuh"

namespace fastdeberta::cuda {

// kTiles: tiles of 16 rows of x that a warp owns.
template <int kTiles>
struct BandShape {
  static constexpr int kBlockM = 16 * kTiles * kWarps;
  static constexpr int kRing = kBlockM + kBlockN;
  // In blocks of 16 columns. A strip's first column is never used, that the blocks be aligned.
  static constexpr int kOwnBlocks = kBlockN / 16 + 1;
  static constexpr int kOtherBlocks = kBlockM / 16 + 1;
  // Eight elements more keep the diagonal reads and ldmatrix free of bank conflicts.
  static constexpr int kOwnPitch = 16 * kOwnBlocks + 8;
  static constexpr int kOtherPitch = 16 * kOtherBlocks + 8;
  static constexpr int kOwnStrip = 16 * kOwnPitch;
  static constexpr int kOwnElements = kOwnStrip * kTiles * kWarps;
  static constexpr int kOtherElements = kBlockN * kOtherPitch;
};

// Rows of one table for shifts x0 - y0 - kBlockN to x0 - y0 + kBlockM - 1.
template <class T, int D, int kTiles>
struct Ring {
  using Shape = BandShape<kTiles>;
  T* tile;
  int base = 0;  // place of the first row

  __device__ __forceinline__ int place(int row) const {
    const int n = base + row;
    return n < Shape::kRing ? n : n - Shape::kRing;
  }

  // The first kRows rows. shift: of the first one.
  template <int kRows>
  __device__ __forceinline__ void load(const T* table, int64_t stride, const Rows& rows,
                                       int shift) {
    using Tile = cuda::Tile<T, D>;
#pragma unroll 2
    for (int n = threadIdx.x; n < kRows * Tile::kChunks; n += kThreads) {
      const int row = n / Tile::kChunks, chunk = n % Tile::kChunks;
      ptx::cp_async16(tile + Tile::offset(place(row), chunk),
                      table + rows(shift + row) * stride + chunk * 8, true);
    }
  }

  // To the next tile of y: its new rows are the first kBlockN.
  __device__ __forceinline__ void advance() {
    base = base < kBlockN ? base - kBlockN + Shape::kRing : base - kBlockN;
  }
};

__device__ __forceinline__ void store_strip(__half* strip, int pitch, const float (&c)[4],
                                            float scale) {
  __half* place = strip + threadIdx.x % 32 / 4 * pitch + threadIdx.x % 4 * 2;
  *reinterpret_cast<__half2*>(place) = __floats2half2_rn(c[0] * scale, c[1] * scale);
  *reinterpret_cast<__half2*>(place + 8 * pitch) = __floats2half2_rn(c[2] * scale, c[3] * scale);
}

// Products of the warp's rows with its own table, times scale, into its strips.
template <class T, int D, int kTiles>
__device__ __forceinline__ void own_products(__half* strips, const RowFragments<T, D> (&x)[kTiles],
                                             const Ring<T, D, kTiles>& ring, float scale) {
  using Shape = BandShape<kTiles>;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < Shape::kOwnBlocks + kTiles - 1; ++n) {
    Accumulator<2> sums[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) sums[m].clear();
    const int row = ring.place(16 * (kTiles * warp + n));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      Tile<T, D>::b(b, ring.tile, row, 16 * k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (n < m || n - m >= Shape::kOwnBlocks) continue;
        ptx::mma<T>(sums[m].at[0], x[m].of[k].at, b[0], b[1]);
        ptx::mma<T>(sums[m].at[1], x[m].of[k].at, b[2], b[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (n < m || n - m >= Shape::kOwnBlocks) continue;
      __half* strip = strips + m * Shape::kOwnStrip + 16 * (n - m);
      store_strip(strip, Shape::kOwnPitch, sums[m].at[0], scale);
      store_strip(strip + 8, Shape::kOwnPitch, sums[m].at[1], scale);
    }
  }
}

// Products of the tile's y with the other table, times scale. Two warps share two strips, each
// does half of the shifts: a row of the ring is then read for 32 y at once.
template <class T, int D, int kTiles>
__device__ __forceinline__ void other_products(__half* strips, const T* y,
                                               const Ring<T, D, kTiles>& ring, float scale) {
  using Shape = BandShape<kTiles>;
  constexpr int kBlocks = Shape::kOtherBlocks + 1;  // of two strips together
  static_assert(kBlocks % 2 == 0, "halves");
  const int pair = threadIdx.x / 64, half = threadIdx.x / 32 % 2;
  strips += 32 * pair * Shape::kOtherPitch;
  RowFragments<T, D> held[2];
  constexpr bool kHeld = D <= 64;  // rows of wide heads do not fit the registers
#pragma unroll
  for (int s = 0; kHeld && s < 2; ++s) held[s].load(y, 32 * pair + 16 * s);
#pragma unroll 1
  for (int n = half * kBlocks / 2; n < (half + 1) * kBlocks / 2; ++n) {
    Accumulator<2> sums[2];
    sums[0].clear(), sums[1].clear();
    const int row = ring.place(16 * (2 - 2 * pair + n));
#pragma unroll(kHeld ? D / 16 : 1)
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      Tile<T, D>::b(b, ring.tile, row, 16 * k);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (n == (s ? kBlocks - 1 : 0)) continue;
        uint32_t (&a)[4] = held[s].of[k].at;
        if (!kHeld) Tile<T, D>::a(a, y, 32 * pair + 16 * s, 16 * k);
        ptx::mma<T>(sums[s].at[0], a, b[0], b[1]);
        ptx::mma<T>(sums[s].at[1], a, b[2], b[3]);
      }
    }
    // The second strip, of larger y, begins and ends one block of shifts before the first.
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (n == (s ? kBlocks - 1 : 0)) continue;
      __half* strip = strips + 16 * s * Shape::kOtherPitch + 16 * (n - 1 + s);
      store_strip(strip, Shape::kOtherPitch, sums[s].at[0], scale);
      store_strip(strip + 8, Shape::kOtherPitch, sums[s].at[1], scale);
    }
  }
}

// Calls visit(score, place) for the lane's scores of 16 rows and their places in the own strip.
template <int kTiles, class Scores, class Element, class Visit>
__device__ __forceinline__ void each_own(Scores& scores, Element* strip, const Visit& visit) {
  constexpr int kPitch = BandShape<kTiles>::kOwnPitch;
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  Element* first = strip + row * kPitch + kBlockN + row - column;
#pragma unroll
  for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      visit(scores.at[n][c], first[c / 2 * (8 * kPitch + 8) - 8 * n - c % 2]);
    }
  }
}

// The same in the other side's strips. tile: which of the block's 16-row tiles.
template <int kTiles, class Scores, class Element, class Visit>
__device__ __forceinline__ void each_other(Scores& scores, Element* strips, int tile,
                                           const Visit& visit) {
  constexpr int kPitch = BandShape<kTiles>::kOtherPitch;
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  Element* first = strips + column * kPitch + 16 + 16 * tile + row - column;
#pragma unroll
  for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      visit(scores.at[n][c], first[8 * n * kPitch - n % 2 * 8 + c % 2 * (kPitch - 1) + c / 2 * 8]);
    }
  }
}

// Clears those places of a warp's own strip that no score has.
template <int kTiles>
__device__ __forceinline__ void clear_own(uint16_t* strip) {
  const int row = threadIdx.x % 32 / 2;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int column = threadIdx.x % 2 * 8 + n;
    strip[row * BandShape<kTiles>::kOwnPitch + column + (column <= row ? 0 : kBlockN)] = 0;
  }
}

// The same in the other side's strips, by the whole block.
template <int kTiles>
__device__ __forceinline__ void clear_other(uint16_t* strips) {
  using Shape = BandShape<kTiles>;
  const int row = threadIdx.x / 2;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int column = threadIdx.x % 2 * 8 + n;
    strips[row * Shape::kOtherPitch + column + (column <= 15 - row % 16 ? 0 : Shape::kBlockM)] = 0;
  }
}

}  // namespace fastdeberta::cuda
