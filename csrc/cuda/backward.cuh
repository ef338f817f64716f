// SPDX-License-Identifier: Apache-2.0
//
// The backward pass, from the saved log-sum-exp. No kernel adds to what another one has written, so
// that every sum has one order and two runs give the same bits:
//
//   delta_kernel     delta = rowsum(dout * out) of every query
//   side_kernel      a block owns queries (dquery) or keys (dkey, dvalue) and meets all tiles of
//                    the other side; both are one problem, seen from either side
//   table_kernel     a block owns one diagonal of near tiles, all of which have the same shifts,
//                    and gathers the gradients of both tables over it
//   fold_kernel      adds these up, shifts of one row together, and what far tiles gave
//
// Here is what they have in common, and the first.
#pragma once

#include "bands.cuh"
#include "workspace.h"

namespace fastdeberta::cuda {

constexpr int kBlock = kBlockN;  // tiles are square here
using Square = BandShape<1>;

// One warp: one query of one head.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Workspace w) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.tokens * p.heads) return;
  const int64_t token = row % p.tokens, head = row / p.tokens;
  const T* out = static_cast<const T*>(p.out) + (token * p.heads + head) * p.head_dim;
  const T* dout = rows_of<T>(p.dout, token, head);
  float sum = 0.f;
  for (int d = threadIdx.x % 32 * 2; d < p.head_dim; d += 64) {
    const float2 x = Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(out + d));
    const float2 y = Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(dout + d));
    sum += x.x * y.x + x.y * y.y;
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32) return;
  const float lse = p.lse[row];
  w.delta[row] = sum;
  // Rows without a key have no probabilities: exp2 of -infinity each.
  w.shift[row] = lse == -kInfinity ? -kInfinity : -lse * kLog2e;
}

// One head of one sequence, as the blocks of side_kernel and table_kernel know it.
template <class T, int D>
struct Problem {
  const AttentionParams& p;
  const Workspace& w;
  Sequence seq;
  int64_t sequence, head;
  float scale;

  __device__ Problem(const AttentionParams& params, const Workspace& workspace)
      : p(params), w(workspace), scale(params.softmax_scale * kLog2e) {}

  __device__ __forceinline__ void begin(int64_t n, int64_t h, int* scratch) {
    sequence = n;
    head = h;
    seq = sequence_bounds(p, n);
    read_mask(p, seq, scratch);
  }

  __device__ __forceinline__ void load_tile(T* tile, const HeadsView& x, int first) const {
    Tile<T, D>::template load<kBlock>(tile, rows_of<T>(x, seq.start + first, head), x.stride,
                                      seq.tokens - first);
  }

  // Adds the position terms of a near tile to scores of 16 rows in units of log2.
  static __device__ __forceinline__ void add_terms(Accumulator<kBlock / 8>& scores,
                                                   const __half* own, const __half* other) {
    const auto add = [](float& score, const __half& term) { score += __half2float(term); };
    if (own) each_own<1>(scores, own, add);
    if (other) each_other<1>(scores, other, threadIdx.x / 32, add);
  }

  // Draws of the lane's four scores per eight columns, rows being queries.
  __device__ __forceinline__ void draw_rows(uint64_t& keep, const DropoutRule& rule, int row,
                                            int column) const {
    const auto stream = static_cast<uint32_t>(sequence * p.heads + head);
    keep = 0;
#pragma unroll 1  // several draws at once would take the registers of the sums
    for (int n = 0; n < kBlock / 8; ++n) {
      const Philox4 draw = rule.draw(stream, row, column + 8 * n);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        keep |= static_cast<uint64_t>(rule.keeps(draw.word[c])) << (4 * n + c);
      }
    }
  }

  // The same, rows being keys. A draw serves queries i and i + 8 and keys j and j + 1: two lanes,
  // four apart, share their draws, each making half of them.
  __device__ __forceinline__ void draw_columns(uint64_t& keep, const DropoutRule& rule, int row,
                                               int column) const {
    const auto stream = static_cast<uint32_t>(sequence * p.heads + head);
    const int odd = row & 1;
    keep = 0;
#pragma unroll 1
    for (int n = 0; n < kBlock / 8; n += 2) {  // queries 8 n + .. and 8 (n + 1) + ..
#pragma unroll 1
      for (int below = 0; below < 2; ++below) {  // keys row and row + 8
        const Philox4 mine = rule.draw(stream, column + 8 * n + odd, row + 8 * below);
        // Of my draw: words of query i, then i + 8, for my key and the other lane's.
        uint32_t kept = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) kept |= static_cast<uint32_t>(rule.keeps(mine.word[c])) << c;
        const uint32_t theirs = __shfl_xor_sync(~0u, kept, 4);
#pragma unroll
        for (int c = 0; c < 2; ++c) {  // query column + c
          const uint32_t draw = c == odd ? kept : theirs;
          keep |= static_cast<uint64_t>(draw >> odd & 1) << (4 * n + 2 * below + c);
          keep |= static_cast<uint64_t>(draw >> (2 + odd) & 1) << (4 * (n + 1) + 2 * below + c);
        }
      }
    }
  }
};

}  // namespace fastdeberta::cuda
