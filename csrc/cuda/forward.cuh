// SPDX-License-Identifier: Apache-2.0
//
// The forward pass: one block owns kBlockM queries of one head and meets every tile of keys with
// the online softmax of FlashAttention-2 (Dao 2023). Scores are held in units of log2.
//
// Far tiles, in which all shifts have one row r, cost what plain attention costs:
//   q.k + q.pos_key[r] + k.pos_query[r] = (q + pos_query[r]).k + q.pos_key[r]
#pragma once

#include "bands.cuh"

namespace fastdeberta::cuda {

template <class T, int D, int kTiles, bool kPositions>
struct Forward {
  using Shape = BandShape<kTiles>;
  static constexpr int kBlockM = Shape::kBlockM;
  static constexpr bool kHeld = D <= 64;  // keys of wide heads do not fit the registers
  // There are no registers for dropout's generator beside 32 rows a warp.
  static constexpr bool kDropout = kTiles == 1;
  static constexpr int kTileElements = kBlockN * D;
  static constexpr int kBandElements =
      2 * Shape::kRing * D + Shape::kOwnElements + Shape::kOtherElements;
  static constexpr int kSharedBytes = 2 * (2 * kTileElements + (kPositions ? kBandElements : 0));

  const AttentionParams& p;
  Sequence seq;
  int64_t sequence, head;
  int x0;        // the block's first query
  int warp_row;  // the warp's
  int lane_row;  // the lane's; its others are 8 and 16 rows on
  float scale;

  T *key_tile, *value_tile;
  Rings<T, D, kTiles> rings;
  __half *own_strips, *other_strips;

  RowFragments<T, D> query[kTiles];
  Accumulator<D / 8> out[kTiles];
  float row_max[kTiles][2], row_sum[kTiles][2];
  uint32_t uniform = 0;  // bit 2 * tile + half: the row averages all values
  bool some_uniform;     // the block may have such

  __device__ explicit Forward(const AttentionParams& params) : p(params) {}

  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int row = warp_row + 16 * m;
      query[m].load(rows_of<T>(p.query, seq.start + row, head), p.query.stride, seq.tokens - row);
    }
  }

  template <int kRows>
  __device__ __forceinline__ void load_band(int tile) {
    rings.template load<kRows>(p.pos_key, p.pos_query, head, Rows(p, Side::kQuery),
                               x0 - (tile + 1) * kBlockN);
  }

  __device__ __forceinline__ void load_tile(T* tile, const HeadsView& x, int n) {
    const int first = n * kBlockN;
    Tile<T, D>::template load<kBlockN>(tile, rows_of<T>(x, seq.start + first, head), x.stride,
                                       seq.tokens - first);
  }

  // Scores that do not count become -infinity.
  __device__ __forceinline__ void mask(Accumulator<kBlockN / 8> (&scores)[kTiles], int y0) {
    const uint64_t bits = attended_bits(p, seq, y0);
    const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int column = 8 * n + lane_column + c % 2, y = y0 + column;
          bool counts = bits >> column & 1;
          if (p.causal) counts = counts && y <= lane_row + 16 * m + c / 2 * 8;
          float& score = scores[m].at[n][c];
          if (uniform >> (2 * m + c / 2) & 1) {
            score = y < seq.tokens ? 0.f : -kInfinity;
          } else if (!counts) {
            score = -kInfinity;
          }
        }
      }
    }
  }

  // Probabilities in place of scores, less a factor common to the row that row_sum has too.
  __device__ __forceinline__ void softmax(Accumulator<kBlockN / 8>& scores, int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = row_max[m][half];
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        highest = fmaxf(highest, fmaxf(scores.at[n][2 * half], scores.at[n][2 * half + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
      // A row without keys so far keeps -infinity: less itself it would be NaN.
      const float shift = highest == -kInfinity ? 0.f : highest;
      const float factor = ptx::exp2_approx(row_max[m][half] - shift);
      row_max[m][half] = highest;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          scores.at[n][c] = ptx::exp2_approx(scores.at[n][c] - shift);
          sum += scores.at[n][c];
        }
      }
      row_sum[m][half] = row_sum[m][half] * factor + sum;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[m].at[n][2 * half] *= factor;
        out[m].at[n][2 * half + 1] *= factor;
      }
    }
  }

  __device__ __forceinline__ void drop(Accumulator<kBlockN / 8> (&probs)[kTiles], int y0) {
    const DropoutRule rule(p.rng_state, p.dropout_threshold);
    const auto stream = static_cast<uint32_t>(sequence * p.heads + head);
    const int column = y0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        const Philox4 draw = rule.draw(stream, lane_row + 16 * m, column + 8 * n);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (!rule.keeps(draw.word[c])) probs[m].at[n][c] = 0.f;
        }
      }
    }
  }

  // Tiles begin to end, all near or all far. terms: what far tiles add to every score of a row.
  __device__ __forceinline__ void tiles(int begin, int end, bool near,
                                        const float (&terms)[kTiles][2]) {
    __syncthreads();
    load_tile(key_tile, p.key, begin);
    if (kPositions && near) load_band<Shape::kRing>(begin);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int y0 = tile * kBlockN;
      ptx::cp_async_wait<0>();
      __syncthreads();  // The keys and the band are here, and the values and strips are free.
      load_tile(value_tile, p.value, tile);
      ptx::cp_async_commit();
      __half* const own = own_strips + threadIdx.x / 32 * kTiles * Shape::kOwnStrip;
      if (kPositions && near && p.pos_key.data) own_products(own, query, rings, scale);
      const TileFragments<T, D, kHeld> keys(key_tile);
      if (kPositions && near && p.pos_query.data) {
        other_products(other_strips, keys, rings, scale);
      }
      Accumulator<kBlockN / 8> scores[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) scores[m].clear();
      multiply_transposed(scores, query, keys);
      __syncthreads();  // All strips are here, and the keys and the band are free.
      if (tile + 1 < end) {
        load_tile(key_tile, p.key, tile + 1);
        if (kPositions && near) {
          rings.advance();
          load_band<kBlockN>(tile + 1);
        }
      }
      ptx::cp_async_commit();

#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& score = scores[m].at[n][c];
            score = fmaf(score, scale, terms[m][c / 2]);
          }
        }
        if (kPositions && near) {
          const auto add = [](float& score, const __half& term) { score += __half2float(term); };
          if (p.pos_key.data) each_own<kTiles>(scores[m], own + m * Shape::kOwnStrip, add);
          if (p.pos_query.data) {
            each_other<kTiles>(scores[m], other_strips, threadIdx.x / 32 * kTiles + m, add);
          }
        }
      }
      const bool future = p.causal && y0 + kBlockN - 1 > warp_row;
      if (future || some_uniform || y0 + kBlockN > seq.plain) mask(scores, y0);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) softmax(scores[m], m);
      if constexpr (kDropout) {
        if (p.rng_state) drop(scores, y0);
      }

      ptx::cp_async_wait<1>();
      __syncthreads();  // The values are here.
      multiply<T, D>(out, scores, value_tile);
    }
  }

  // Far tiles of one row of the tables; see the top.
  __device__ __forceinline__ void begin_far(int row, float (&terms)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        Fragment<T>& q = query[m].of[k];
        if (p.pos_key.data) q.dot(terms[m], rows_of<T>(p.pos_key, row, head) + 16 * k);
        if (p.pos_query.data) q.add(rows_of<T>(p.pos_query, row, head) + 16 * k);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) terms[m][half] = row_total(terms[m][half]) * scale;
    }
  }

  __device__ __forceinline__ void store() {
    const float keep_scale = p.rng_state ? p.keep_scale : 1.f;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_total(row_sum[m][half]);
        const int row = lane_row + 16 * m + 8 * half;
        const bool real = row < seq.tokens && attended(p, seq, row);
        // Masked rows have been computed, but only those that average values were meant to be.
        factor[half] =
            sum > 0.f && (real || (uniform >> (2 * m + half) & 1)) ? keep_scale / sum : 0.f;
        if (row < seq.tokens && threadIdx.x % 4 == 0) {
          p.lse[head * p.tokens + seq.start + row] =
              real && sum > 0.f ? (row_max[m][half] + log2f(sum)) * kLn2 : -kInfinity;
        }
      }
      const int row = warp_row + 16 * m;
      store_rows<T, D>(static_cast<T*>(p.out) + ((seq.start + row) * p.heads + head) * D,
                       p.heads * D, out[m], factor, seq.tokens - row);
    }
  }

  __device__ __forceinline__ void run(T* shared) {
    const int64_t blocks = (p.max_seqlen + kBlockM - 1) / kBlockM;
    const int64_t group = blockIdx.x / blocks;  // the sequences of one head follow each other
    sequence = group % p.sequences;
    head = group / p.sequences;
    x0 = static_cast<int>(blockIdx.x % blocks) * kBlockM;
    seq = sequence_bounds(p, sequence);
    if (x0 >= seq.tokens) return;
    key_tile = shared;
    value_tile = key_tile + kTileElements;
    rings.own = value_tile + kTileElements;
    rings.other = rings.own + rings.kElements;
    own_strips = reinterpret_cast<__half*>(rings.other + rings.kElements);
    other_strips = own_strips + Shape::kOwnElements;
    read_mask(p, seq, reinterpret_cast<int*>(shared));
    scale = p.softmax_scale * kLog2e;
    warp_row = x0 + threadIdx.x / 32 * 16 * kTiles;
    lane_row = warp_row + threadIdx.x % 32 / 4;
    some_uniform = p.uniform_padding && x0 + kBlockM > seq.plain;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      out[m].clear();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row + 16 * m + 8 * half;
        row_max[m][half] = -kInfinity;
        row_sum[m][half] = 0.f;
        if (p.uniform_padding && row < seq.tokens && !attended(p, seq, row)) {
          uniform |= 1u << (2 * m + half);
        }
      }
    }
    int columns = p.causal ? min(seq.length, x0 + kBlockM) : seq.length;
    if (some_uniform) columns = seq.tokens;
    const int end = (columns + kBlockN - 1) / kBlockN;
    TileRanges ranges = {0, 0, end};
    if (kPositions) ranges = tile_ranges(Rows(p, Side::kQuery), x0, kBlockM, end);
    // Far tiles to the left, near tiles, far tiles to the right: one loop, or the compiler keeps
    // what several of them need in registers at once.
#pragma unroll 1
    for (int kind = kPositions ? 0 : 2; kind < 3; ++kind) {
      const bool near = kind == 1;
      const int begin = kind == 0 ? 0 : near ? ranges.near : ranges.far;
      const int stop = kind == 0 ? ranges.near : near ? ranges.far : ranges.end;
      if (begin >= stop) continue;
      float terms[kTiles][2] = {};
      load_queries();
      if (kPositions && !near) {
        const Rows rows(p, Side::kQuery);
        begin_far(rows(kind ? rows.low() : rows.high()), terms);
      }
      tiles(begin, stop, near, terms);
    }
    store();
  }
};

template <class T, int D, int kTiles, bool kPositions>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const __grid_constant__ AttentionParams params) {
  FASTDEBERTA_SHARED(shared);
  Forward<T, D, kTiles, kPositions>(params).run(reinterpret_cast<T*>(shared));
}

}  // namespace fastdeberta::cuda
