// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the tables; see backward.cuh. All near tiles on one diagonal, of all sequences, have
// the same shifts: a block stays on its diagonal, sums over it in registers and writes once.
#pragma once

#include "backward.cuh"

namespace fastdeberta::cuda {

template <class T, int D>
struct TableBlock : Problem<T, D> {
  using Base = Problem<T, D>;
  using Base::head;
  using Base::p;
  using Base::scale;
  using Base::seq;
  using Base::w;
  static constexpr int kTileElements = kBlock * D;
  static constexpr int kShifts = Square::kRing;
  // More columns of sums than these do not fit the registers: wider heads take two blocks.
  static constexpr int kColumns = D <= 64 ? D : D / 2;
  static constexpr int kSplits = D / kColumns;
  static constexpr int kSharedBytes =
      2 * (4 * kTileElements + 2 * kShifts * D + Square::kOwnElements + Square::kOtherElements);

  int tile_shift;  // x0 - y0, in tiles: the block's diagonal
  int x0, y0;
  T *query, *key, *value, *dout;
  Rings<T, D, 1> rings;
  __half *own_strips, *other_strips;
  // Of shifts 16 b to 16 b + 15, b = warp and warp + 4: so every warp has as much to do.
  Accumulator<kColumns / 8> own_sums[2], other_sums[2];

  __device__ TableBlock(const AttentionParams& params, const Workspace& workspace)
      : Base(params, workspace) {}

  // Gradients of scores, unscaled, in `scores`; their strips hold the position terms before.
  __device__ __forceinline__ void score_gradients(Accumulator<kBlock / 8> (&scores)[1],
                                                  uint64_t bits) {
    const int warp = threadIdx.x / 32;
    const int lane_row = x0 + 16 * warp + threadIdx.x % 32 / 4;
    const int lane_column = y0 + threadIdx.x % 4 * 2;
    __half* const own = own_strips + warp * Square::kOwnStrip;
    scores[0].clear();
    const TileFragments<T, D, false> keys(key);
    if (p.pos_query.data) other_products(other_strips, keys, rings, scale);
    if (p.pos_key.data) {
      RowFragments<T, D> x[1];
      x[0].load(query, 16 * warp);
      own_products(own, x, rings, scale);
    }
    multiply_transposed(scores[0], query, 16 * warp, keys);
    __syncthreads();  // All strips are here.
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[0].at[n][c] *= scale;
    }
    this->add_terms(scores[0], p.pos_key.data ? own : nullptr,
                    p.pos_query.data ? other_strips : nullptr);
    Accumulator<kBlock / 8> dprobs[1];
    dprobs[0].clear();
    multiply_transposed(dprobs[0], dout, 16 * warp, TileFragments<T, D, false>(value));
    float shift[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row + 8 * half;
      const int64_t n = head * p.tokens + seq.start + row;
      shift[half] = row < seq.tokens ? w.shift[n] : -kInfinity;
      delta[half] = row < seq.tokens ? w.delta[n] : 0.f;
    }
    uint64_t keep = ~uint64_t{0};
    float keep_scale = 1.f;
    if (p.rng_state) {
      this->draw_rows(keep, DropoutRule(p.rng_state, p.dropout_threshold), lane_row, lane_column);
      keep_scale = p.keep_scale;
    }
    const bool masked = ~bits || (p.causal && y0 + kBlock - 1 > x0);
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int j = lane_column + 8 * n + c % 2, i = lane_row + c / 2 * 8;
        const float prob = ptx::exp2_approx(scores[0].at[n][c] + shift[c / 2]);
        const float dprob = keep >> (4 * n + c) & 1 ? dprobs[0].at[n][c] * keep_scale : 0.f;
        float gradient = prob * (dprob - delta[c / 2]);
        if (masked && (!(bits >> (j - y0) & 1) || (p.causal && j > i))) gradient = 0.f;
        scores[0].at[n][c] = gradient;
      }
    }
  }

  // sums += strips^T * rows, by shifts. kOwn: which strips, of x or of y.
  template <bool kOwn>
  __device__ __forceinline__ void gather(Accumulator<kColumns / 8> (&sums)[2], const T* strips,
                                         const T* rows, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
      for (int strip = 0; strip < kBlock / 16; ++strip) {
        // The strip's first block of shifts moves up with x and down with y.
        const int block = threadIdx.x / 32 + 4 * half - (kOwn ? strip : 3 - strip);
        if (block < 0 || block >= Square::kOwnBlocks) continue;
        uint32_t a[4];
        if constexpr (kOwn) {
          const T* const own = strips + strip * Square::kOwnStrip;
          const int shift = 16 * block + lane % 16;
          ptx::ldmatrix_x4(a, own + shift * Square::kOwnPitch + lane / 16 * 8);
        } else {
          const int row = 16 * strip + lane % 8 + lane / 16 * 8;
          const int shift = 16 * block + lane / 8 % 2 * 8;
          ptx::ldmatrix_x4_trans(a, strips + row * Square::kOtherPitch + shift);
        }
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          uint32_t b[4];
          Tile<T, D>::b_of_rows(b, rows, 16 * strip, column + 16 * n);
          ptx::mma<T>(sums[half].at[2 * n], a, b[0], b[1]);
          ptx::mma<T>(sums[half].at[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Accumulator<kColumns / 8> (&sums)[2], float* out) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
          const int shift = 16 * (threadIdx.x / 32 + 4 * half) + row + 4 * c;
          *reinterpret_cast<float2*>(out + shift * D + 8 * n + column) = {sums[half].at[n][c],
                                                                          sums[half].at[n][c + 1]};
        }
      }
    }
  }

  // One tile of the diagonal, by number.
  struct Step {
    int number;
    uint64_t bits;  // keys that are attended to; none: the diagonal is done
  };

  // The first step from `number` on that has something to add. Its place is then the block's.
  __device__ __forceinline__ Step find_step(int number) {
    const int tiles = static_cast<int>((p.max_seqlen + kBlock - 1) / kBlock);
    const int steps = tiles - (tile_shift < 0 ? -tile_shift : tile_shift);
    for (; number < steps * p.sequences; number += w.chunks) {
      this->sequence = number / steps;
      seq = sequence_bounds(p, this->sequence);
      x0 = (number % steps + max(tile_shift, 0)) * kBlock;
      y0 = x0 - tile_shift * kBlock;
      if (max(x0, y0) >= seq.tokens) continue;
      if (const uint64_t bits = attended_bits(p, seq, y0)) return {number, bits};
    }
    return {number, 0};
  }

  __device__ __forceinline__ void run(T* shared) {
    int64_t n = blockIdx.x;
    const int column = static_cast<int>(n % kSplits) * kColumns;
    n /= kSplits;
    const int chunk = static_cast<int>(n % w.chunks);
    n /= w.chunks;
    const int diagonal = static_cast<int>(n % w.diagonals);
    head = n / w.diagonals;
    tile_shift = w.low_diagonal + diagonal;
    query = shared;
    dout = query + kTileElements;
    key = dout + kTileElements;
    value = key + kTileElements;
    rings.own = value + kTileElements;
    rings.other = rings.own + rings.kElements;
    own_strips = reinterpret_cast<__half*>(rings.other + rings.kElements);
    other_strips = own_strips + Square::kOwnElements;
#pragma unroll
    for (int half = 0; half < 2; ++half) own_sums[half].clear(), other_sums[half].clear();

    rings.template load<kShifts>(p.pos_key, p.pos_query, head, Rows(p, Side::kQuery),
                                 (tile_shift - 1) * kBlock);
    const auto load = [&](T* x_tile, const HeadsView& x, T* y_tile, const HeadsView& y) {
      this->load_tile(x_tile, x, x0);
      this->load_tile(y_tile, y, y0);
    };
    Step step = find_step(chunk);
    if (step.bits) {
      load(query, p.query, key, p.key);
      load(dout, p.dout, value, p.value);
    }
    ptx::cp_async_commit();
#pragma unroll 1
    while (step.bits) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // Everything is here.
      Accumulator<kBlock / 8> scores[1];
      score_gradients(scores, step.bits);
      __syncthreads();  // All terms have been read, and half of the tiles are free.
      step = find_step(step.number + w.chunks);
      if (step.bits) load(dout, p.dout, value, p.value);
      T* const own = reinterpret_cast<T*>(own_strips);
      T* const other = reinterpret_cast<T*>(other_strips);
      const auto put = [](float x, T& place) { place = Pair<T>::one(x); };
      const int warp = threadIdx.x / 32;
      clear_own<1>(reinterpret_cast<uint16_t*>(own + warp * Square::kOwnStrip));
      clear_other<1>(reinterpret_cast<uint16_t*>(other));
      each_own<1>(scores[0], own + warp * Square::kOwnStrip, put);
      each_other<1>(scores[0], other, warp, put);
      __syncthreads();  // All gradients are here.
      if (p.pos_key.data) gather<true>(own_sums, own, query, column);
      if (p.pos_query.data) gather<false>(other_sums, other, key, column);
      __syncthreads();  // Everything is free.
      if (step.bits) load(query, p.query, key, p.key);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
    const int64_t part = (static_cast<int64_t>(chunk) * w.diagonals + diagonal) * p.heads + head;
    float* out = w.near + part * 2 * kShifts * D + column;
    store(own_sums, out);
    store(other_sums, out + kShifts * D);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    table_kernel(const __grid_constant__ AttentionParams params,
                 const __grid_constant__ Workspace workspace) {
  FASTDEBERTA_SHARED(shared);
  TableBlock<T, D>(params, workspace).run(reinterpret_cast<T*>(shared));
}

// One block: one row of one table of one head. Threads share the terms of its sums by turns.
template <class T, int D>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Workspace w) {
  FASTDEBERTA_SHARED(shared);
  constexpr int kShifts = Square::kRing, kTurns = kThreads / D;
  const int row = static_cast<int>(blockIdx.x % p.table_rows);
  const int64_t head = blockIdx.x / p.table_rows % p.heads;
  const int table = static_cast<int>(blockIdx.x / p.table_rows / p.heads);
  T* const out = static_cast<T*>(table ? p.dpos_query : p.dpos_key);
  if (!out) return;
  const int d = threadIdx.x % D, turn = threadIdx.x / D;
  const int distances = p.last_distance - p.first_distance + 1;
  // Rows grow with distances: those of this row are begin to end - 1.
  const auto bound = [&](int above) {
    int low = 0, high = distances;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (p.rows[middle] < above) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int begin = bound(row), end = bound(row + 1);
  float sum = 0.f;
  if (begin < end && turn < kTurns) {
    const int lowest = (w.low_diagonal - 1) * kBlock;
    const int highest = lowest + (w.diagonals + 1) * kBlock - 1;
    // Beyond the first and the last distance the row stays.
    const int low = begin == 0 ? lowest : max(lowest, p.first_distance + begin);
    const int high = end == distances ? highest : min(highest, p.first_distance + end - 1);
    for (int distance = low + turn; distance <= high; distance += kTurns) {
      // Two diagonals meet this distance.
      const int above = (distance - lowest) / kBlock;
      for (int diagonal = max(0, above - 1); diagonal <= min(above, w.diagonals - 1); ++diagonal) {
        const int shift = distance - lowest - diagonal * kBlock;
        for (int chunk = 0; chunk < w.chunks; ++chunk) {
          const int64_t part =
              (static_cast<int64_t>(chunk) * w.diagonals + diagonal) * p.heads + head;
          sum += w.near[((part * 2 + table) * kShifts + shift) * D + d];
        }
      }
    }
    for (int side = 0; w.far && side < 2; ++side) {
      if (side ? end < distances : begin > 0) continue;
      const float* parts = w.far + ((table * 2 + side) * p.heads + head) * w.tiles * D;
      for (int n = turn; n < w.tiles; n += kTurns) sum += parts[static_cast<int64_t>(n) * D + d];
    }
  }
  float* const sums = reinterpret_cast<float*>(shared);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (turn) return;
  for (int other = 1; other < kTurns; ++other) sum += sums[other * D + d];
  out[(row * p.heads + head) * D + d] = Pair<T>::one(sum * p.softmax_scale);
}

}  // namespace fastdeberta::cuda
