// SPDX-License-Identifier: Apache-2.0
//
// What the forward and the backward pass do alike to a tile of scores, stored as [keys][kBlockM]:
// queries lie in lanes, so that a softmax row never crosses a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "bands.h"
#include "exp.h"

namespace fastdeberta::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

// One tile of scores: keys [key, key + keys) in rows, queries [query, query + lanes) in lanes.
struct ScoreTile {
  int query, lanes, key, keys;
  bool is_near;
  const float* u;  // what far scores lack, by query; or null
};

// Which keys of a super-tile count, from the call's mask and the sequence's end.
struct KeyList {
  uint8_t dead[kSuperN];
  bool any_dead[kSuperN / kBlockN];

  // Of the tile from key j on; null if all count.
  const uint8_t* dead_from(int j) const { return any_dead[j / kBlockN] ? dead + j : nullptr; }

  void fill(const AttentionParams& p, const Sequence& sequence, int begin, int padded_count) {
    std::fill(any_dead, any_dead + kSuperN / kBlockN, false);
    for (int j = 0; j < padded_count; ++j) {
      const int key = begin + j;
      const bool attend = key < sequence.end && (!p.key_mask || p.key_mask[sequence.start + key]);
      dead[j] = !attend;
      any_dead[j / kBlockN] |= !attend;
    }
  }
};

// Lanes of kLanes queries from `query` on that must not see `key`.
FD_INLINE unsigned future(int query, int key) {
  const int lanes = std::min(std::max(key - query, 0), kLanes);
  return (1u << lanes) - 1;
}

// Sets to -inf what is not attended to. dead: by key, or null.
inline void mask_scores(float* scores, const ScoreTile& tile, const uint8_t* dead, bool causal) {
  const int query = tile.query, lanes = tile.lanes, key = tile.key, keys = tile.keys;
  const Vec minus_infinity = set1(-INFINITY);
  const bool diagonal = causal && key + keys - 1 > query;
  if (!dead && !diagonal) return;
  for (int j = 0; j < keys; ++j) {
    float* row = scores + j * kBlockM;
    if (dead && dead[j]) {
      for (int i = 0; i < lanes; i += kLanes) store(row + i, minus_infinity);
    } else if (diagonal && key + j > query) {
      for (int i = 0; i < lanes; i += kLanes) {
        store(row + i, select(future(query + i, key + j), minus_infinity, load(row + i)));
      }
    }
  }
}

// Which scores of a tile dropout keeps: bits[j][i / kGroup], one bit a query.
struct DropoutBits {
  uint16_t bits[kBlockN][kBlockM / kGroup];

  unsigned of(int key, int lane) const {
    return static_cast<unsigned>(bits[key][lane / kGroup]) >> (lane % kGroup);
  }

  // Of tiles that begin at multiples of kGroup.
  void fill(const DropoutRule& rule, uint32_t sequence_head, const ScoreTile& tile) {
    for (int group = 0; group * kGroup < tile.lanes; ++group) {
      // 16 draws at once: 8 draw rows, which serve 16 queries, times two pairs of keys.
      const uint32_t row = DropoutRule::draw_row(tile.query + group * kGroup);
      for (int j = 0; j < tile.keys; j += 4) {
        const uint32_t pair = static_cast<uint32_t>(tile.key + j) / 2;
        uint32_t c0[16], c1[16], c2[16], c3[16];
        for (int n = 0; n < 16; ++n) {
          c0[n] = pair + (n >> 3), c1[n] = row + (n & 7), c2[n] = sequence_head;
          c3[n] = rule.offset;
        }
        uint32_t key0 = rule.key0, key1 = rule.key1;
        for (int round = 0; round < kPhiloxRounds; ++round) {
          for (int n = 0; n < 16; ++n) {
            philox_round(c0[n], c1[n], c2[n], c3[n], key0, key1);
          }
          philox_bump(key0, key1);
        }
        unsigned kept[4] = {0, 0, 0, 0};  // by word; bit n: draw n
        for (int n = 0; n < 16; n += kLanes) {
          kept[0] |= at_least(c0 + n, rule.threshold) << n;
          kept[1] |= at_least(c1 + n, rule.threshold) << n;
          kept[2] |= at_least(c2 + n, rule.threshold) << n;
          kept[3] |= at_least(c3 + n, rule.threshold) << n;
        }
        // Words 0 and 1 are queries 0 to 7 with an even and an odd key, 2 and 3 queries 8 to 15.
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned low = kept[odd], high = kept[2 + odd];
          bits[j + odd][group] = static_cast<uint16_t>((low & 0xff) | (high & 0xff) << 8);
          bits[j + 2 + odd][group] = static_cast<uint16_t>(low >> 8 | (high & 0xff00));
        }
      }
    }
  }
};

}  // namespace
}  // namespace fastdeberta::cpu
