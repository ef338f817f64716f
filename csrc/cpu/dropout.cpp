// SPDX-License-Identifier: Apache-2.0
#include "dropout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace fastdeberta::cpu {

void dropout_keep(const DropoutRule& rule, int64_t sequence_heads, int64_t query_len,
                  int64_t key_len, bool* keep) {
  // Draws a grain: some 60 us of work, enough to pay for waking a thread.
  constexpr int64_t kGrain = 4096;
  const int64_t tiles = (query_len + 15) / 16;
  const int64_t draws_per_tile = 8 * ((key_len + 1) / 2);

  // One unit is a 16-row tile, so that each draw is made once and its four words are all used.
  torch::stable::parallel_for(
      0, sequence_heads * tiles,
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, draws_per_tile)),
      [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t sequence_head = unit / tiles;
          const int64_t tile_row = unit % tiles * 16;
          bool* block = keep + sequence_head * query_len * key_len;
          for (int64_t i = tile_row; i < std::min(tile_row + 8, query_len); ++i) {
            for (int64_t j = 0; j < key_len; j += 2) {
              const Philox4 draw = rule.draw(sequence_head, i, j);
              for (int64_t row = i; row < std::min(i + 9, query_len); row += 8) {
                for (int64_t column = j; column < std::min(j + 2, key_len); ++column) {
                  block[row * key_len + column] =
                      rule.keeps(draw.word[DropoutRule::word_index(row, column)]);
                }
              }
            }
          }
        }
      });
}

}  // namespace fastdeberta::cpu
