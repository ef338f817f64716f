// SPDX-License-Identifier: Apache-2.0
//
// Scores of one head's queries and keys in a super-tile, the same in the forward and the backward
// pass. Bands are made once for all of it, and score tiles [kBlockN keys][kBlockM queries] from
// them.
#pragma once

#include "tile.h"

namespace fastdeberta::cpu {
namespace {

// One head's packed tables; null where a term is off.
template <class T>
struct Tables {
  using Word = typename T::Word;
  const Word *key_panels = nullptr, *query_panels = nullptr;
  const Word *key_rows = nullptr, *query_rows = nullptr;  // in the backward pass

  Tables(const Call& call, int head) {
    const int64_t words = padded_dim<T>(call.p.head_dim) / T::kPerWord;
    const int64_t offset = head * round_up(call.p.table_rows, kPanel) * words;
    const auto of_head = [&](char* data) {
      return data ? reinterpret_cast<const Word*>(data) + offset : nullptr;
    };
    if (call.p.pos_key.data) {
      key_panels = of_head(call.key_panels), key_rows = of_head(call.key_rows);
    }
    if (call.p.pos_query.data) {
      query_panels = of_head(call.query_panels), query_rows = of_head(call.query_rows);
    }
  }
  bool any() const { return key_panels || query_panels; }
};

// Memory of a SuperTile.
template <class T>
struct SuperTileScratch {
  float *c2p, *p2c, *u;       // bands; [kBlockM]
  typename T::Word* shifted;  // [words][kBlockM]

  void carve(Arena& arena, int words, int64_t band_stride) {
    c2p = arena.take<float>(kSuperM * band_stride + kGroup);
    p2c = arena.take<float>(kSuperN * band_stride + kGroup);
    u = arena.take<float>(kBlockM);
    shifted = arena.take<typename T::Word>(kBlockM * words);
  }
};

template <class T>
class SuperTile {
 public:
  using Word = typename T::Word;

  // Queries and keys are whole groups, as packed rows [n][words]; `query_columns` holds the
  // queries transposed, block by block: [words][kBlockM].
  SuperTile(const Call& call, const Tables<T>& tables, const SuperTileScratch<T>& scratch,
            int words, int query_begin, int queries, const Word* query_rows,
            const Word* query_columns, int key_begin, int keys, const Word* key_rows)
      : call_(call),
        tables_(tables),
        w_(scratch),
        words_(words),
        query_begin_(query_begin),
        queries_(queries),
        key_begin_(key_begin),
        keys_(keys),
        query_columns_(query_columns),
        key_rows_(key_rows) {
    const int low = query_begin - (key_begin + keys - 1),
              high = query_begin + queries - 1 - key_begin;
    is_near_ = tables.any() && !call.positions.is_far(low, high);
    if (!is_near_) return;
    base_ = rows_met(call.positions, low, high).begin;
    if (tables.key_panels) {
      c2p_ = {w_.c2p - base_, call.band_stride};
      make_band<T>(query_rows, queries, words, tables.key_panels, c2p_,
                   [&](int i) { return met_by_query(i); });
    }
    if (tables.query_panels) {
      p2c_ = {w_.p2c - base_, call.band_stride};
      make_band<T>(key_rows, keys, words, tables.query_panels, p2c_,
                   [&](int j) { return met_by_key(j); });
    }
  }

  // Table rows that the group of queries (of keys) from the i-th (j-th) on meets here.
  Rows met_by_query(int i) const {
    const int query = query_begin_ + i;
    return rows_met(call_.positions, query - (key_begin_ + keys_ - 1),
                    query + kGroup - 1 - key_begin_);
  }
  Rows met_by_key(int j) const {
    const int key = key_begin_ + j;
    return rows_met(call_.positions, query_begin_ - (key + kGroup - 1),
                    query_begin_ + queries_ - 1 - key);
  }

  bool is_near() const { return is_near_; }
  int base() const { return base_; }  // the first table row that any of its scores reads

  // The tile from the i-th query and the j-th key on, not masked.
  ScoreTile scores(int i, int j, float* scores) {
    ScoreTile tile{query_begin_ + i,
                   std::min(kBlockM, queries_ - i),
                   key_begin_ + j,
                   std::min(kBlockN, keys_ - j),
                   false,
                   nullptr};
    const int distance = tile.query - tile.key;
    const Word* keys = key_rows_ + static_cast<int64_t>(j) * words_;
    const Word* queries = query_columns_ + static_cast<int64_t>(i) * words_;
    tile.is_near =
        is_near_ && !call_.positions.is_far(distance - tile.keys + 1, distance + tile.lanes - 1);
    if (tile.is_near) {
      skew<false>(call_.positions, distance, c2p_.from(i), p2c_.from(j), scores, tile.keys,
                  tile.lanes);
      gemm<T, true>(tile.keys, tile.lanes, words_, keys, words_, 1, queries, kBlockM, scores,
                    kBlockM);
      return tile;
    }
    if (tables_.any()) {
      prepare_far(call_.positions.row(distance), i, tile.lanes, queries);
      if (tables_.query_panels) queries = w_.shifted;
      if (tables_.key_panels) tile.u = w_.u;
    }
    gemm<T, false>(tile.keys, tile.lanes, words_, keys, words_, 1, queries, kBlockM, scores,
                   kBlockM);
    return tile;
  }

 private:
  // A far tile reads one table row r, and q·k + k·pos_query[r] = (q + pos_query[r])·k. With
  // u = q·pos_key[r], which the softmax adds, it then costs what plain attention does.
  void prepare_far(int row, int i, int lanes, const Word* queries) {
    if (far_row_ == row && far_block_ == i) return;
    far_row_ = row, far_block_ = i;
    const int64_t at = static_cast<int64_t>(row / kPanel) * words_ * kPanel + row % kPanel;
    if (tables_.key_panels) {
      gemm<T, false>(1, lanes, words_, tables_.key_panels + at, 0, kPanel, queries, kBlockM, w_.u,
                     kBlockM);
    }
    if (!tables_.query_panels) return;
    for (int k = 0; k < words_; ++k) {
      for (int n = 0; n < lanes; n += kLanes) {
        T::shift(w_.shifted + k * kBlockM + n, queries + k * kBlockM + n,
                 tables_.query_panels[at + k * kPanel]);
      }
    }
  }

  const Call& call_;
  const Tables<T>& tables_;
  const SuperTileScratch<T>& w_;
  const int words_, query_begin_, queries_, key_begin_, keys_;
  const Word *query_columns_, *key_rows_;
  Band c2p_, p2c_;
  bool is_near_ = false;
  int base_ = 0, far_row_ = -1, far_block_ = -1;
};

}  // namespace
}  // namespace fastdeberta::cpu
