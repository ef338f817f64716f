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
//   own(x, y)   = x . own_table[row(x - y)]       strips of x: [x - y, less the strip's first][x]
//   other(x, y) = y . other_table[row(x - y)]     strips of y: [y][x - y, less the strip's first]
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
  // In blocks of 16 shifts. A strip's first shift is never used, that the blocks be aligned.
  static constexpr int kOwnBlocks = kBlockN / 16 + 1;
  static constexpr int kOtherBlocks = kBlockM / 16 + 1;
  // Eight elements more keep stores, diagonal reads and ldmatrix free of bank conflicts.
  static constexpr int kOwnPitch = 16 + 8;
  static constexpr int kOtherPitch = 16 * kOtherBlocks + 8;
  static constexpr int kOwnStrip = 16 * kOwnBlocks * kOwnPitch;
  static constexpr int kOwnElements = kOwnStrip * kTiles * kWarps;
  static constexpr int kOtherElements = kBlockN * kOtherPitch;
};

// Rows of both tables for shifts x0 - y0 - kBlockN to x0 - y0 + kBlockM - 1.
template <class T, int D, int kTiles>
struct Rings {
  using Shape = BandShape<kTiles>;
  static constexpr int kElements = Shape::kRing * D;  // of each
  T *own, *other;
  int base = 0;  // place of the first row

  __device__ __forceinline__ int place(int row) const {
    const int n = base + row;
    return n < Shape::kRing ? n : n - Shape::kRing;
  }

  // The first kRows rows of the tables that are there. shift: of the first one.
  template <int kRows>
  __device__ __forceinline__ void load(const HeadsView& own_table, const HeadsView& other_table,
                                       int64_t head, const Rows& rows, int shift) const {
    load<kRows>(own, own_table, head, rows, shift);
    load<kRows>(other, other_table, head, rows, shift);
  }

  template <int kRows>
  __device__ __forceinline__ void load(T* tile, const HeadsView& table, int64_t head,
                                       const Rows& rows, int shift) const {
    using Tile = cuda::Tile<T, D>;
    if (!table.data) return;
    const T* const first = rows_of<T>(table, 0, head);
#pragma unroll 2
    for (int n = threadIdx.x; n < kRows * Tile::kChunks; n += kThreads) {
      const int row = n / Tile::kChunks, chunk = n % Tile::kChunks;
      ptx::cp_async16(tile + Tile::offset(place(row), chunk),
                      first + rows(shift + row) * table.stride + chunk * 8, true);
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
                                             const Rings<T, D, kTiles>& rings, float scale) {
  using Shape = BandShape<kTiles>;
  const int warp = threadIdx.x / 32;
#pragma unroll(kTiles == 1 ? Shape::kOwnBlocks : 1)
  for (int n = 0; n < Shape::kOwnBlocks + kTiles - 1; ++n) {
    Accumulator<2> sums[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) sums[m].clear();
    const int row = rings.place(16 * (kTiles * warp + n));
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[4];
      Tile<T, D>::a(a, rings.own, row, 16 * k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (n < m || n - m >= Shape::kOwnBlocks) continue;
        // As operand B, rows of x are columns.
        const uint32_t (&b)[4] = x[m].of[k].at;
        ptx::mma<T>(sums[m].at[0], a, b[0], b[2]);
        ptx::mma<T>(sums[m].at[1], a, b[1], b[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (n < m || n - m >= Shape::kOwnBlocks) continue;
      __half* strip = strips + m * Shape::kOwnStrip + 16 * (n - m) * Shape::kOwnPitch;
      store_strip(strip, Shape::kOwnPitch, sums[m].at[0], scale);
      store_strip(strip + 8, Shape::kOwnPitch, sums[m].at[1], scale);
    }
  }
}

// Products of the tile's y with the other table, times scale. Every fourth block of shifts is a
// warp's, for all strips that it meets: no row of the ring is read twice, and all warps have as
// much to do.
template <class T, int D, int kTiles, bool kHeld>
__device__ __forceinline__ void other_products(__half* strips, const TileFragments<T, D, kHeld>& y,
                                               const Rings<T, D, kTiles>& rings, float scale) {
  using Shape = BandShape<kTiles>;
  constexpr int kStrips = kBlockN / 16;
  static_assert(Shape::kRing % (16 * kWarps) == 0, "as many blocks for each warp");
#pragma unroll 1
  for (int block = threadIdx.x / 32; block < Shape::kRing / 16; block += kWarps) {
    uint32_t b[D / 16][4];
    const int row = rings.place(16 * block);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) Tile<T, D>::b(b[k], rings.other, row, 16 * k);
#pragma unroll(kHeld ? kStrips : 1)
    for (int s = 0; s < kStrips; ++s) {
      // Strips of larger y begin with smaller shifts.
      const int n = block - (kStrips - 1 - s);
      if (n < 0 || n >= Shape::kOtherBlocks) continue;
      Accumulator<2> sums;
      sums.clear();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        uint32_t a[4];
        y.get(a, s, k);
        ptx::mma<T>(sums.at[0], a, b[k][0], b[k][1]);
        ptx::mma<T>(sums.at[1], a, b[k][2], b[k][3]);
      }
      __half* const strip = strips + 16 * s * Shape::kOtherPitch + 16 * n;
      store_strip(strip, Shape::kOtherPitch, sums.at[0], scale);
      store_strip(strip + 8, Shape::kOtherPitch, sums.at[1], scale);
    }
  }
}

// Calls visit(score, place) for the lane's scores of 16 rows and their places in the own strip.
template <int kTiles, class Scores, class Element, class Visit>
__device__ __forceinline__ void each_own(Scores& scores, Element* strip, const Visit& visit) {
  constexpr int kPitch = BandShape<kTiles>::kOwnPitch;
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  Element* first = strip + (kBlockN + row - column) * kPitch + row;
#pragma unroll
  for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      visit(scores.at[n][c], first[c / 2 * (8 * kPitch + 8) - (8 * n + c % 2) * kPitch]);
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

// Clears those places of a warp's own strip that no score has, and others of the same shifts.
template <int kTiles>
__device__ __forceinline__ void clear_own(uint16_t* strip) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int last = 0; last < 2; ++last) {  // the first 16 shifts and the last, two chunks each
    const int shift = lane / 2 + last * kBlockN;
    *reinterpret_cast<uint4*>(strip + shift * BandShape<kTiles>::kOwnPitch + lane % 2 * 8) = {};
  }
  __syncwarp();
}

// Clears those places of the other side's strips that no score has, by the whole block.
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
