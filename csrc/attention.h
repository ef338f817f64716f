// SPDX-License-Identifier: Apache-2.0
//
// One call of the op, as every launcher takes it.
#pragma once

#include <cstdint>

namespace fastdeberta {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// A tensor [T, H, D] (or a table [rows, H, D]) whose last dimension is contiguous; strides in
// elements. Null data: the argument is absent.
struct HeadsView {
  const void* data = nullptr;
  int64_t stride = 0;       // from token to token
  int64_t head_stride = 0;  // from head to head
};

struct AttentionParams {
  Dtype dtype;
  int64_t tokens, heads;
  int head_dim, table_rows;
  HeadsView query, key, value;   // [T, H, D]
  HeadsView pos_key, pos_query;  // [table_rows, H, D]; null: the term is off

  const int32_t* cu_seqlens;  // [sequences + 1]; null: every sequence has max_seqlen tokens
  int64_t sequences, max_seqlen;
  const bool* key_mask;  // [T], true = attend; null: attend to all

  // Table row of each distance from first_distance to last_distance; constant beyond either.
  const int32_t* rows;
  int first_distance, last_distance;

  const int64_t* rng_state;    // (seed, offset); null: no dropout
  uint32_t dropout_threshold;  // DropoutRule::threshold_of
  float keep_scale;            // 1 / (1 - dropout_p)
  float softmax_scale;
  bool causal;
  bool uniform_padding;  // masked queries average all values of their sequence

  // Results of the forward pass, which the backward pass reads: [T, H, D] contiguous and [H, T].
  void* out;
  float* lse;  // natural logarithm

  // Backward pass alone: gradients, contiguous.
  HeadsView dout;
  void *dquery, *dkey, *dvalue;  // [T, H, D]
  void *dpos_key, *dpos_query;   // [table_rows, H, D]
};

}  // namespace fastdeberta
