// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of the backward pass hand to each other.
#pragma once

#include "attention.h"

namespace fastdeberta::cuda {

// Arrays of float32, one after another in one allocation.
struct Workspace {
  float* delta;  // [H, T]: rowsum(dout * out)
  float* shift;  // [H, T]: minus the log-sum-exp, in units of log2
  // [2 tables, 2 ends, H, tiles, D]: gradients of the rows before the first distance and after the
  // last, from far tiles; null: there are none.
  float* far;
  float* near;  // [chunks, diagonals, H, 2 tables, 128 shifts, D]: gradients of the tables by shift
  int64_t size;                 // of all
  int tiles;                    // of 64 tokens, of all sequences
  int low_diagonal, diagonals;  // those of near tiles
  int chunks;                   // blocks that share a diagonal
};

}  // namespace fastdeberta::cuda
