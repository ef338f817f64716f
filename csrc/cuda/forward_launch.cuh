// SPDX-License-Identifier: Apache-2.0
//
// Which forward kernel takes a call. Each element type is compiled by itself.
#pragma once

#include "forward.cuh"
#include "launch.cuh"

namespace fastdeberta::cuda {

template <class T, int D, int kTiles, bool kPositions>
void launch_forward(const AttentionParams& p, void* stream) {
  using Kernel = Forward<T, D, kTiles, kPositions>;
  const int64_t tiles = (p.max_seqlen + Kernel::kBlockM - 1) / Kernel::kBlockM;
  launch("forward_kernel", forward_kernel<T, D, kTiles, kPositions>, tiles * p.heads * p.sequences,
         kThreads, Kernel::kSharedBytes, stream, p);
}

// 32 rows a warp halve the traffic between shared memory and registers. They are taken if they are
// there to fill, on every multiprocessor, and if two blocks fit on one: while one waits at a
// barrier, the other works.
template <class T, int D>
void choose_forward(const AttentionParams& p, void* stream) {
  const bool positions = p.pos_key.data || p.pos_query.data;
  if constexpr (D <= 64) {
    const Device d = device();
    const int64_t blocks = (p.max_seqlen + 127) / 128 * p.heads * p.sequences;
    constexpr int kReserved = 1024;  // bytes, of each block
    const int bytes = positions ? Forward<T, D, 2, true>::kSharedBytes + kReserved : 0;
    if (!p.rng_state && p.max_seqlen > 64 && blocks >= d.multiprocessors &&
        2 * bytes <= d.shared_memory) {
      return positions ? launch_forward<T, D, 2, true>(p, stream)
                       : launch_forward<T, D, 2, false>(p, stream);
    }
  }
  return positions ? launch_forward<T, D, 1, true>(p, stream)
                   : launch_forward<T, D, 1, false>(p, stream);
}

template <class T>
void forward_of(const AttentionParams& p, void* stream) {
  switch (p.head_dim) {
    case 32:
      return choose_forward<T, 32>(p, stream);
    case 64:
      return choose_forward<T, 64>(p, stream);
    case 96:
      return choose_forward<T, 96>(p, stream);
    case 128:
      return choose_forward<T, 128>(p, stream);
  }
}

}  // namespace fastdeberta::cuda
