// SPDX-License-Identifier: Apache-2.0
//
// The kernels of one backward pass, in their order. Each element type is compiled by itself.
#pragma once

#include "launch.cuh"
#include "side.cuh"
#include "table.cuh"

namespace fastdeberta::cuda {

template <Side kSide, class T, int D, bool kPositions>
void launch_side(const AttentionParams& p, const Workspace& w, void* stream) {
  launch(kSide == Side::kQuery ? "side_kernel of queries" : "side_kernel of keys",
         side_kernel<kSide, T, D, kPositions>, w.tiles * p.heads, kThreads,
         SideBlock<kSide, T, D, kPositions>::kSharedBytes, stream, p, w);
}

template <class T, int D>
void launch_backward(const AttentionParams& p, const Workspace& w, void* stream) {
  launch("delta_kernel", delta_kernel<T>, (p.tokens * p.heads + kWarps - 1) / kWarps, kThreads, 0,
         stream, p, w);
  if (!p.pos_key.data && !p.pos_query.data) {
    launch_side<Side::kQuery, T, D, false>(p, w, stream);
    launch_side<Side::kKey, T, D, false>(p, w, stream);
    return;
  }
  launch_side<Side::kQuery, T, D, true>(p, w, stream);
  launch_side<Side::kKey, T, D, true>(p, w, stream);
  using Table = TableBlock<T, D>;
  launch("table_kernel", table_kernel<T, D>, Table::kSplits * w.chunks * w.diagonals * p.heads,
         kThreads, Table::kSharedBytes, stream, p, w);
  launch("fold_kernel", fold_kernel<T, D>, 2 * p.heads * p.table_rows, kThreads,
         kThreads * sizeof(float), stream, p, w);
}

template <class T>
void backward_of(const AttentionParams& p, const Workspace& w, void* stream) {
  switch (p.head_dim) {
    case 32:
      return launch_backward<T, 32>(p, w, stream);
    case 64:
      return launch_backward<T, 64>(p, w, stream);
    case 96:
      return launch_backward<T, 96>(p, w, stream);
    case 128:
      return launch_backward<T, 128>(p, w, stream);
  }
}

}  // namespace fastdeberta::cuda
