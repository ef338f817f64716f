// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attention.h"
#include "backward_launch.cuh"
#include "forward_launch.cuh"

namespace fastdeberta::cuda {

extern template void forward_of<__half>(const AttentionParams&, void*);
extern template void forward_of<__nv_bfloat16>(const AttentionParams&, void*);
extern template void backward_of<__half>(const AttentionParams&, const Workspace&, void*);
extern template void backward_of<__nv_bfloat16>(const AttentionParams&, const Workspace&, void*);

namespace {

template <int D>
int64_t shared_memory_of(bool positions, bool backward) {
  using T = __half;
  if (!backward) {
    return positions ? Forward<T, D, 1, true>::kSharedBytes : Forward<T, D, 1, false>::kSharedBytes;
  }
  if (!positions) return SideBlock<Side::kKey, T, D, false>::kSharedBytes;
  return std::max(SideBlock<Side::kKey, T, D, true>::kSharedBytes, TableBlock<T, D>::kSharedBytes);
}

// One array after another, or without a buffer only their size.
Workspace workspace(const AttentionParams& p, float* buffer) {
  Workspace w{};
  const auto take = [&](int64_t size) {
    float* const array = buffer ? buffer + w.size : nullptr;
    w.size += size;
    return array;
  };
  w.delta = take(p.heads * p.tokens);
  w.shift = take(p.heads * p.tokens);
  const int tiles = static_cast<int>((p.max_seqlen + kBlock - 1) / kBlock);
  w.tiles = static_cast<int>(tiles * p.sequences);
  if ((!p.pos_key.data && !p.pos_query.data) || !w.tiles) return w;
  // The reach of the longest sequence.
  const int64_t longest = p.max_seqlen - 1;
  if (longest > p.last_distance || -longest < p.first_distance) {
    w.far = take(4 * p.heads * w.tiles * p.head_dim);
  }
  // Near diagonals have 64 d + 63 > first and 64 d - 63 < last; see tile_ranges.
  const auto floor_div = [](int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); };
  int low = floor_div(p.first_distance - 63, kBlock) + 1;
  int high = floor_div(p.last_distance + 62, kBlock);
  low = std::max(low, p.causal ? 0 : 1 - tiles);
  high = std::min(high, tiles - 1);
  w.low_diagonal = low;
  w.diagonals = std::max(0, high - low + 1);
  if (!w.diagonals) return w;
  const int64_t splits = p.head_dim <= 64 ? 1 : 2;
  const int64_t blocks = w.diagonals * p.heads * splits, wanted = 2 * device().multiprocessors;
  const int64_t steps = (tiles - std::max(0, std::max(low, -high))) * p.sequences;
  w.chunks = static_cast<int>(std::min(steps, (wanted + blocks - 1) / blocks));
  w.near = take(w.chunks * w.diagonals * p.heads * 2 * (2 * kBlock) * p.head_dim);
  return w;
}

}  // namespace

int64_t shared_memory(int head_dim, bool positions, bool backward) {
  switch (head_dim) {
    case 32:
      return shared_memory_of<32>(positions, backward);
    case 64:
      return shared_memory_of<64>(positions, backward);
    case 96:
      return shared_memory_of<96>(positions, backward);
    case 128:
      return shared_memory_of<128>(positions, backward);
    default:
      return 0;
  }
}

int64_t backward_workspace(const AttentionParams& params) {
  return workspace(params, nullptr).size;
}

void forward(const AttentionParams& params, void* stream) {
  const bool half = params.dtype == Dtype::kFloat16;
  half ? forward_of<__half>(params, stream) : forward_of<__nv_bfloat16>(params, stream);
}

void backward(const AttentionParams& params, float* buffer, void* stream) {
  const Workspace w = workspace(params, buffer);
  const bool half = params.dtype == Dtype::kFloat16;
  half ? backward_of<__half>(params, w, stream) : backward_of<__nv_bfloat16>(params, w, stream);
}

}  // namespace fastdeberta::cuda
