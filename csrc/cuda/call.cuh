// SPDX-License-Identifier: Apache-2.0
//
// One sequence of a call, and which of its scores count.
#pragma once

#include <limits>

#include "../attention.h"
#include "../philox.h"
#include "ptx.cuh"

namespace fastdeberta::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockN = 64;  // columns of a tile of scores, and rows of a tile in the backward pass
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sequence {
  int64_t start;  // its first token
  int tokens;
  int length;  // one more than its last attended token
  int plain;   // its first masked token
};

__device__ __forceinline__ Sequence sequence_bounds(const AttentionParams& p, int64_t n) {
  const int64_t start = p.cu_seqlens ? p.cu_seqlens[n] : n * p.max_seqlen;
  const int64_t end = p.cu_seqlens ? p.cu_seqlens[n + 1] : start + p.max_seqlen;
  const int tokens = static_cast<int>(end - start);
  return {start, tokens, tokens, tokens};
}

// Reads the key mask, if there is one, into length and plain. All threads of the block take part;
// scratch: kWarps * 2 ints in shared memory, free again at the block's next barrier.
__device__ __forceinline__ void read_mask(const AttentionParams& p, Sequence& s, int* scratch) {
  if (!p.key_mask) return;
  int last = 0, masked = s.tokens;
  for (int n = threadIdx.x; n < s.tokens; n += kThreads) {
    if (p.key_mask[s.start + n]) {
      last = n + 1;
    } else {
      masked = min(masked, n);
    }
  }
  for (int step = 16; step; step /= 2) {
    last = max(last, __shfl_xor_sync(~0u, last, step));
    masked = min(masked, __shfl_xor_sync(~0u, masked, step));
  }
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32 * 2] = last;
    scratch[threadIdx.x / 32 * 2 + 1] = masked;
  }
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    last = max(last, scratch[warp * 2]);
    masked = min(masked, scratch[warp * 2 + 1]);
  }
  s.length = last;
  s.plain = masked;
}

__device__ __forceinline__ bool attended(const AttentionParams& p, const Sequence& s, int token) {
  return token < s.length && (!p.key_mask || p.key_mask[s.start + token]);
}

// Bit n: token first + n is attended to. The warp's lanes take part together.
__device__ __forceinline__ uint64_t attended_bits(const AttentionParams& p, const Sequence& s,
                                                  int first) {
  const int token = first + threadIdx.x % 32;
  const uint32_t low = __ballot_sync(~0u, attended(p, s, token));
  const uint32_t high = __ballot_sync(~0u, attended(p, s, token + 32));
  return low | static_cast<uint64_t>(high) << 32;
}

// Which side of the scores a block owns rows of; the other side streams past. Everything below
// is written for a block that owns x, streams y and speaks of shift = x - y. For a query that is
// the distance and pos_key the table of its own products; for a key it is the negative distance,
// pos_query is its own table and pos_key the other side's.
enum class Side { kQuery, kKey };

// The tables' rows over shifts, seen from one side.
struct Rows {
  const int32_t* rows;  // of distances
  int first, last;      // distances
  bool mirrored;

  __device__ Rows(const AttentionParams& p, Side side)
      : rows(p.rows),
        first(p.first_distance),
        last(p.last_distance),
        mirrored(side == Side::kKey) {}

  __device__ __forceinline__ int low() const { return mirrored ? -last : first; }
  __device__ __forceinline__ int high() const { return mirrored ? -first : last; }
  __device__ __forceinline__ int operator()(int shift) const {
    const int distance = mirrored ? -shift : shift;
    return rows[max(first, min(last, distance)) - first];
  }
};

// Tiles of kBlockN columns: [0, near) are far to the left, where shifts are at least high();
// [near, far) meet several rows of the tables; [far, end) are far to the right.
struct TileRanges {
  int near, far, end;
};

// Of the rows x0 .. x0 + block - 1. end: tiles that count at all.
__device__ __forceinline__ TileRanges tile_ranges(const Rows& rows, int x0, int block, int end) {
  const auto ceil_tiles = [](int n) { return n <= 0 ? 0 : (n + kBlockN - 1) / kBlockN; };
  // Far left: x0 - (y0 + kBlockN - 1) >= high.
  const int left = x0 - rows.high() + 1;
  const int near = left <= 0 ? 0 : min(end, left / kBlockN);
  const int far = min(end, max(near, ceil_tiles(x0 + block - 1 - rows.low())));
  return {near, far, end};
}

}  // namespace fastdeberta::cuda
