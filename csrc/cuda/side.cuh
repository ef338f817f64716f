// SPDX-License-Identifier: Apache-2.0
//
// Gradients of queries, and of keys and values; see backward.cuh.
#pragma once

#include "backward.cuh"

namespace fastdeberta::cuda {

template <Side kSide, class T, int D, bool kPositions>
struct SideBlock : Problem<T, D> {
  using Base = Problem<T, D>;
  using Base::head;
  using Base::p;
  using Base::scale;
  using Base::seq;
  using Base::w;
  static constexpr bool kKeys = kSide == Side::kKey;
  static constexpr int kTileElements = kBlock * D;
  static constexpr int kBandElements =
      2 * Square::kRing * D + Square::kOwnElements + Square::kOtherElements;
  static constexpr int kColumnBytes = 2 * kBlock * sizeof(float);
  // Rows of wide heads do not fit the registers, and are read from shared memory each time.
  static constexpr bool kResident = D <= 64;
  static constexpr int kSharedBytes =
      2 * ((kResident ? 2 : 4) * kTileElements + (kPositions ? kBandElements : 0)) + kColumnBytes;

  int x0, lane_row, warp_row;
  T *x_tile, *v_tile;  // the block's own rows, unless resident
  T *y_tile, *z_tile;  // keys and values, or queries and dout
  Rings<T, D, 1> rings;
  __half *own_strips, *other_strips;
  float* columns;  // shift and delta of a tile's queries, where these are columns

  RowFragments<T, D> x[1], v[1];  // the warp's own rows
  Accumulator<D / 8> dx[1], dvalue[1];
  float shift[2], delta[2];  // of the lane's queries, where these are rows
  float row_sums[2];         // of gradients of far scores
  bool counts[2];            // the lane's rows are neither masked nor past the end
  bool some_uniform;         // scores of queries that average all values may be met

  __device__ SideBlock(const AttentionParams& params, const Workspace& workspace)
      : Base(params, workspace) {}

  __device__ __forceinline__ const HeadsView& x_rows() const { return kKeys ? p.key : p.query; }
  __device__ __forceinline__ const HeadsView& y_rows() const { return kKeys ? p.query : p.key; }
  __device__ __forceinline__ const HeadsView& own_table() const {
    return kKeys ? p.pos_query : p.pos_key;
  }
  __device__ __forceinline__ const HeadsView& other_table() const {
    return kKeys ? p.pos_key : p.pos_query;
  }

  // Calls visit(fragment, first column) for the warp's own rows, wherever they are.
  template <class Visit>
  __device__ __forceinline__ void each_x(const Visit& visit) {
    if constexpr (kResident) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) visit(x[0].of[k], 16 * k);
    } else {
      const int row = warp_row - x0;
#pragma unroll 1
      for (int k = 0; k < D / 16; ++k) {
        Fragment<T> fragment;
        Tile<T, D>::a(fragment.at, x_tile, row, 16 * k);
        visit(fragment, 16 * k);
        __syncwarp();
        fragment.template store<D>(x_tile, row, 2 * k);
      }
      __syncwarp();
    }
  }

  // The warp's own rows of a tensor, into registers or shared memory.
  __device__ __forceinline__ void load_rows(RowFragments<T, D>& rows, T* tile,
                                            const HeadsView& of) {
    const T* const source = rows_of<T>(of, seq.start + warp_row, head);
    if constexpr (kResident) {
      rows.load(source, of.stride, seq.tokens - warp_row);
    } else {
#pragma unroll 1
      for (int k = 0; k < D / 16; ++k) {
        Fragment<T> fragment;
        fragment.load(source + 16 * k, of.stride, seq.tokens - warp_row);
        fragment.template store<D>(tile, warp_row - x0, 2 * k);
      }
      __syncwarp();
    }
  }

  template <int kRows>
  __device__ __forceinline__ void load_band(int tile) {
    rings.template load<kRows>(own_table(), other_table(), head, Rows(p, kSide),
                               x0 - (tile + 1) * kBlock);
  }

  __device__ __forceinline__ void load_tiles(int tile) {
    const int y0 = tile * kBlock;
    this->load_tile(y_tile, y_rows(), y0);
    this->load_tile(z_tile, kKeys ? p.dout : p.value, y0);
    if constexpr (kKeys) {
      const int y = y0 + threadIdx.x % kBlock;
      const float* source = threadIdx.x < kBlock ? w.shift : w.delta;
      // Queries past the end have no probabilities.
      columns[threadIdx.x] = y < seq.tokens ? source[head * p.tokens + seq.start + y]
                                            : (threadIdx.x < kBlock ? -kInfinity : 0.f);
    }
  }

  // Probabilities in place of scores, before dropout; gradients of scores take none of `frozen`.
  __device__ __forceinline__ void probabilities(Accumulator<kBlock / 8>& scores, uint32_t& frozen,
                                                int y0) {
    const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float less = kKeys ? columns[8 * n + lane_column + c % 2] : shift[c / 2];
        scores.at[n][c] = ptx::exp2_approx(scores.at[n][c] + less);
      }
    }
    frozen = 0;
    const bool future = p.causal && (kKeys ? y0 < warp_row + 15 : y0 + kBlock - 1 > warp_row);
    if (!future && !some_uniform && (kKeys || y0 + kBlock <= seq.plain)) return;
    const uint64_t bits = attended_bits(p, seq, y0);
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = 8 * n + lane_column + c % 2, half = c / 2;
        const int i = kKeys ? y0 + column : lane_row + 8 * half;
        const int j = kKeys ? lane_row + 8 * half : y0 + column;
        const bool column_counts = bits >> column & 1;
        const bool key_counts = kKeys ? counts[half] : column_counts;
        const bool query_counts = kKeys ? column_counts : counts[half];
        float& prob = scores.at[n][c];
        if (!key_counts || (p.causal && j > i)) prob = 0.f;
        if (some_uniform && !query_counts) {
          prob = i < seq.tokens && j < seq.tokens ? 1.f / seq.tokens : 0.f;
          frozen |= 1u << (4 * n + c);
        }
      }
    }
  }

  // Tiles begin to end, all near or all far. terms: what far tiles add to every score of a row.
  __device__ __forceinline__ void tiles(int begin, int end, bool near, const float (&terms)[2]) {
    __syncthreads();
    load_tiles(begin);
    if (kPositions && near) load_band<Square::kRing>(begin);
    ptx::cp_async_commit();
    __half* const own = own_strips + threadIdx.x / 32 * Square::kOwnStrip;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int y0 = tile * kBlock;
      ptx::cp_async_wait<0>();
      __syncthreads();  // Everything is here.
      if (kPositions && near && own_table().data) {
        if constexpr (!kResident) x[0].load(x_tile, warp_row - x0);
        own_products(own, x, rings, scale);
      }
      const TileFragments<T, D, kResident> y(y_tile);
      if (kPositions && near && other_table().data) {
        other_products(other_strips, y, rings, scale);
      }
      Accumulator<kBlock / 8> scores[1], dprobs[1];
      scores[0].clear();
      if constexpr (kResident) {
        multiply_transposed(scores, x, y);
      } else {
        multiply_transposed(scores[0], x_tile, warp_row - x0, y);
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scores[0].at[n][c] = fmaf(scores[0].at[n][c], scale, terms[c / 2]);
        }
      }
      if (kPositions && near) {
        __syncthreads();  // All strips are here.
        this->add_terms(scores[0], own_table().data ? own : nullptr,
                        other_table().data ? other_strips : nullptr);
      }
      uint32_t frozen;
      probabilities(scores[0], frozen, y0);
      uint64_t keep = ~uint64_t{0};
      float keep_scale = 1.f;
      if (p.rng_state) {
        const DropoutRule rule(p.rng_state, p.dropout_threshold);
        const int column = y0 + threadIdx.x % 4 * 2;
        if (kKeys) {
          this->draw_columns(keep, rule, lane_row, column);
        } else {
          this->draw_rows(keep, rule, lane_row, column);
        }
        keep_scale = p.keep_scale;
      }
      if constexpr (kKeys) {
        Accumulator<kBlock / 8> used[1];
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            used[0].at[n][c] = keep >> (4 * n + c) & 1 ? scores[0].at[n][c] : 0.f;
          }
        }
        multiply<T, D>(dvalue, used, z_tile);
      }
      dprobs[0].clear();
      if constexpr (kResident) {
        multiply_transposed(dprobs, v, TileFragments<T, D, false>(z_tile));
      } else {
        multiply_transposed(dprobs[0], v_tile, warp_row - x0, TileFragments<T, D, false>(z_tile));
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int bit = 4 * n + c, column = 8 * n + threadIdx.x % 4 * 2 + c % 2;
          const float minus = kKeys ? columns[kBlock + column] : delta[c / 2];
          const float dprob = keep >> bit & 1 ? dprobs[0].at[n][c] * keep_scale : 0.f;
          float& score = scores[0].at[n][c];
          score = frozen >> bit & 1 ? 0.f : score * (dprob - minus);
          if (kPositions) row_sums[c / 2] += score;
        }
      }
      if (kPositions && near && own_table().data) {
        __syncwarp();  // The warp has read its strip's terms.
        T* const gradients = reinterpret_cast<T*>(own);
        clear_own<1>(reinterpret_cast<uint16_t*>(own));
        each_own<1>(scores[0], gradients, [](float x, T& place) { place = Pair<T>::one(x); });
        __syncwarp();
        add_band_gradients(gradients);
      }
      multiply<T, D>(dx, scores, y_tile);
      __syncthreads();  // Everything is free.
      if (tile + 1 < end) {
        load_tiles(tile + 1);
        if (kPositions && near) {
          rings.advance();
          load_band<kBlock>(tile + 1);
        }
      }
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
  }

  // dx += gradients of scores, by shifts, times the rows of the table for these.
  __device__ __forceinline__ void add_band_gradients(const T* gradients) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < Square::kOwnBlocks; ++k) {
      uint32_t a[4];
      const int shift = 16 * k + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix_x4_trans(a, gradients + shift * Square::kOwnPitch + lane / 8 % 2 * 8);
      const int row = rings.place(16 * (threadIdx.x / 32 + k));
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        Tile<T, D>::b_of_rows(b, rings.own, row, 16 * n);
        ptx::mma<T>(dx[0].at[2 * n], a, b[0], b[1]);
        ptx::mma<T>(dx[0].at[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // Far tiles of one row of the tables: x.y + x.own[row] + y.other[row] = (x + other[row]).y + ...
  __device__ __forceinline__ void begin_far(int row, float (&terms)[2]) {
    const T* const own = rows_of<T>(own_table(), row, head);
    const T* const other = rows_of<T>(other_table(), row, head);
    each_x([&](Fragment<T>& fragment, int column) {
      if (own_table().data) fragment.dot(terms, own + column);
      if (other_table().data) fragment.add(other + column);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) terms[half] = row_total(terms[half]) * scale;
  }

  // Gradients of x and of the table's row from sums over far tiles. end: 0 before the first
  // distance, 1 after the last.
  __device__ __forceinline__ void end_far(int row, int end) {
    if (!own_table().data || !w.far) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sums[half] = row_total(row_sums[half]);
      // Masked keys have been computed like others.
      if (!counts[half]) row_sums[half] = 0.f;
    }
    const int column = threadIdx.x % 4 * 2;
    const T* const table = rows_of<T>(own_table(), row, head) + column;
    const T* const own = rows_of<T>(x_rows(), seq.start + lane_row, head) + column;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 t = Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(table + 8 * n));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dx[0].at[n][2 * half] += row_sums[half] * t.x;
        dx[0].at[n][2 * half + 1] += row_sums[half] * t.y;
      }
    }
    float* sums = reinterpret_cast<float*>(y_tile);  // [kWarps, D]
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < D / 8; ++n) {
      float2 part = {0.f, 0.f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!counts[half]) continue;
        const T* const place = own + 8 * half * x_rows().stride + 8 * n;
        const float2 row = Pair<T>::unpack(*reinterpret_cast<const uint32_t*>(place));
        part.x += row_sums[half] * row.x;
        part.y += row_sums[half] * row.y;
      }
      for (int step = 4; step < 32; step *= 2) {
        part.x += __shfl_xor_sync(~0u, part.x, step);
        part.y += __shfl_xor_sync(~0u, part.y, step);
      }
      if (threadIdx.x % 32 < 4) {
        float* place = sums + threadIdx.x / 32 * D + 8 * n + column;
        place[0] = part.x, place[1] = part.y;
      }
    }
    __syncthreads();
    if (threadIdx.x < D) {
      float sum = 0.f;
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * D + threadIdx.x];
      far_part(end)[threadIdx.x] = sum;
    }
    __syncthreads();
  }

  __device__ __forceinline__ float* far_part(int end) const {
    const int64_t part = ((kKeys * 2 + end) * p.heads + head) * w.tiles + blockIdx.x % w.tiles;
    return w.far + part * D;
  }

  __device__ __forceinline__ void run(unsigned char* shared) {
    const int64_t blocks = w.tiles / p.sequences;
    x0 = static_cast<int>(blockIdx.x % blocks) * kBlock;
    y_tile = reinterpret_cast<T*>(shared);
    z_tile = y_tile + kTileElements;
    rings.own = z_tile + kTileElements;
    rings.other = rings.own + rings.kElements;
    own_strips = reinterpret_cast<__half*>(rings.other + rings.kElements);
    other_strips = own_strips + Square::kOwnElements;
    x_tile = reinterpret_cast<T*>(shared + kSharedBytes - kColumnBytes) - 2 * kTileElements;
    v_tile = x_tile + kTileElements;
    columns = reinterpret_cast<float*>(shared + kSharedBytes - kColumnBytes);
    this->begin(blockIdx.x / blocks % p.sequences, blockIdx.x / blocks / p.sequences,
                reinterpret_cast<int*>(shared));
    if (x0 >= seq.tokens) {
      if (kPositions && w.far && own_table().data && threadIdx.x < D) {
        far_part(0)[threadIdx.x] = far_part(1)[threadIdx.x] = 0.f;
      }
      return;
    }
    warp_row = x0 + threadIdx.x / 32 * 16;
    lane_row = warp_row + threadIdx.x % 32 / 4;
    some_uniform = p.uniform_padding && (kKeys ? seq.plain < seq.tokens : x0 + kBlock > seq.plain);
    load_rows(v[0], v_tile, kKeys ? p.value : p.dout);
    dx[0].clear();
    if (kKeys) dvalue[0].clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row + 8 * half;
      const bool inside = row < seq.tokens;
      const int64_t n = head * p.tokens + seq.start + row;
      counts[half] = inside && attended(p, seq, row);
      shift[half] = inside && !kKeys ? w.shift[n] : -kInfinity;
      delta[half] = inside && !kKeys ? w.delta[n] : 0.f;
    }
    // Causal: queries attend to the past, keys are attended to from the future.
    const int limit = some_uniform ? seq.tokens : seq.length;
    int first = 0, end = limit;
    if (p.causal && !some_uniform) {
      if (kKeys) {
        first = x0 / kBlock;
      } else {
        end = min(end, x0 + kBlock);
      }
    }
    end = (end + kBlock - 1) / kBlock;
    TileRanges ranges = {first, first, end};
    if (kPositions) {
      ranges = tile_ranges(Rows(p, kSide), x0, kBlock, end);
      ranges.near = max(ranges.near, first);
      ranges.far = max(ranges.far, ranges.near);
    }
    // Far tiles to the left, near tiles, far tiles to the right: one loop, or the compiler keeps
    // what several of them need in registers at once.
#pragma unroll 1
    for (int kind = kPositions ? 0 : 2; kind < 3; ++kind) {
      const bool near = kind == 1;
      const int begin = kind == 0 ? first : near ? ranges.near : ranges.far;
      const int stop = kind == 0 ? ranges.near : near ? ranges.far : ranges.end;
      const Rows rows(p, kSide);
      const int row = kPositions && !near ? rows(kind ? rows.low() : rows.high()) : 0;
      float terms[2] = {};
      row_sums[0] = row_sums[1] = 0.f;
      if (begin < stop) {
        load_rows(x[0], x_tile, x_rows());
        if (kPositions && !near) begin_far(row, terms);
        tiles(begin, stop, near, terms);
      }
      // The highest shifts are the largest distances of a query, and the smallest of a key.
      if (kPositions && !near) end_far(row, (kind == 0) != kKeys);
    }
    store();
  }

  __device__ __forceinline__ void store() {
    const int64_t first = ((seq.start + warp_row) * p.heads + head) * D, stride = p.heads * D;
    const int valid = seq.tokens - warp_row;
    const float factor[2] = {counts[0] ? p.softmax_scale : 0.f, counts[1] ? p.softmax_scale : 0.f};
    store_rows<T, D>(static_cast<T*>(kKeys ? p.dkey : p.dquery) + first, stride, dx[0], factor,
                     valid);
    if constexpr (kKeys) {
      const float keep_scale = p.rng_state ? p.keep_scale : 1.f;
      const float factor[2] = {counts[0] || some_uniform ? keep_scale : 0.f,
                               counts[1] || some_uniform ? keep_scale : 0.f};
      store_rows<T, D>(static_cast<T*>(p.dvalue) + first, stride, dvalue[0], factor, valid);
    }
  }
};

template <Side kSide, class T, int D, bool kPositions>
__global__ void __launch_bounds__(kThreads, 2)
    side_kernel(const __grid_constant__ AttentionParams params,
                const __grid_constant__ Workspace workspace) {
  FASTDEBERTA_SHARED(shared);
  SideBlock<kSide, T, D, kPositions>(params, workspace).run(shared);
}

}  // namespace fastdeberta::cuda
