// SPDX-License-Identifier: Apache-2.0
//
// Backward pass of some keys of one head, from the saved log-sum-exp: scores and probabilities are
// made again, tile by tile as in the forward pass.
//
//   dscores = probs · (dprobs - delta) · scale,   delta = rowsum(dout · out)
//
// Gradients of the bands gather by table row (the mirror of the skew) and are multiplied with
// tables and contents once a super-tile. A far super-tile has one table row: there row sums and
// column sums of dscores are all that its position terms need.
#pragma once

#include "super_tile.h"

namespace fastdeberta::cpu {
namespace {

template <class T>
struct BackwardScratch {
  using Word = typename T::Word;
  // Rows are [n][words]; transposed ones [words][kBlockM] a block; paired ones as pair_rows makes.
  SuperTileScratch<T> super_tile;
  Word *query_rows, *queries, *query_pairs, *dout_rows, *douts, *dout_pairs;
  Word *key_rows, *key_pairs, *value_rows;
  Word *probs, *dscores_by_query, *dscores_by_key;
  BandPairs<T> pairs;
  float *dc2p, *dp2c, *scores, *dscores;
  float *dkey, *dvalue, *dquery, *dqueries, *lse, *delta;
  float *du, *dw, *line, *line2, *total, *dpos_key, *dpos_query;

  size_t carve(char* data, int dim, int64_t band_stride, int table_rows, int64_t queries_at_most) {
    Arena arena(data);
    const int words = dim / T::kPerWord;
    const bool paired = T::kPerWord > 1;
    super_tile.carve(arena, words, band_stride);
    query_rows = arena.take<Word>(kSuperM * words);
    queries = arena.take<Word>(kSuperM * words);
    query_pairs = arena.take<Word>(paired ? kSuperM * words : 0);
    dout_rows = arena.take<Word>(kSuperM * words);
    douts = arena.take<Word>(kSuperM * words);
    dout_pairs = arena.take<Word>(paired ? kSuperM * words : 0);
    key_rows = arena.take<Word>(kSuperN * words);
    key_pairs = arena.take<Word>(paired ? kSuperN * words : 0);
    value_rows = arena.take<Word>(kSuperN * words);
    const int tile = kBlockN * kBlockM, tile_pairs = paired ? tile / 2 : 0;
    probs = arena.take<Word>(tile_pairs);
    dscores_by_query = arena.take<Word>(tile_pairs);
    dscores_by_key = arena.take<Word>(tile_pairs);
    const int64_t band = kSuperM * band_stride;
    static_assert(kSuperM == kSuperN, "one size of band serves queries and keys");
    pairs.by_row = arena.take<Word>(paired ? band / 2 : 0);
    pairs.by_content = arena.take<Word>(paired ? band / 2 : 0);
    dc2p = arena.take<float>(band + kGroup);
    dp2c = arena.take<float>(band + kGroup);
    scores = arena.take<float>(tile);
    dscores = arena.take<float>(tile);
    dkey = arena.take<float>(kSuperN * dim);
    dvalue = arena.take<float>(kSuperN * dim);
    dqueries = arena.take<float>(kBlockM * dim);
    du = arena.take<float>(2 * kSuperM);
    dw = arena.take<float>(2 * kSuperN);
    line = arena.take<float>(dim);
    line2 = arena.take<float>(dim);
    total = arena.take<float>(dim);
    dpos_key = arena.take<float>(static_cast<int64_t>(round_up(table_rows, kPanel)) * dim);
    dpos_query = arena.take<float>(static_cast<int64_t>(round_up(table_rows, kPanel)) * dim);
    dquery = arena.take<float>(queries_at_most * dim);
    lse = arena.take<float>(queries_at_most);
    delta = arena.take<float>(queries_at_most);
    return arena.used();
  }
};

// Probabilities and dscores of one tile from scores and dprobs, both in place; for bfloat16 also as
// the words that products read.
//
// lse: +inf for queries that attend to nothing. It is subtracted before the change of base, after
// which the difference is small and so is its rounding error.
template <class T>
void score_gradients(const BackwardScratch<T>& w, const ScoreTile& tile, float scale,
                     float keep_scale, const float* lse, const float* delta,
                     const DropoutBits* dropout) {
  for (int i = 0; i < tile.lanes; i += kLanes) {
    const Vec far = tile.u ? mul(load(tile.u + i), set1(scale)) : zero();
    const Vec shift = sub(load(lse + i), far);
    const Vec row_delta = load(delta + i), factor = set1(scale), log2e = set1(kLog2E);
    const auto one = [&](int j, Vec& p, Vec& ds) {
      const int at = j * kBlockM + i;
      p = exp2(mul(fms(load(w.scores + at), factor, shift), log2e));
      Vec dp = load(w.dscores + at);
      if (dropout) {
        const unsigned bits = dropout->of(j, i);
        dp = keep(mul(dp, set1(keep_scale)), bits);
        ds = mul(mul(p, factor), sub(dp, row_delta));
        p = keep(mul(p, set1(keep_scale)), bits);
      } else {
        ds = mul(mul(p, factor), sub(dp, row_delta));
      }
      store(w.dscores + at, ds);
    };
    if constexpr (T::kPerWord == 1) {
      for (int j = 0; j < tile.keys; ++j) {
        Vec p, ds;
        one(j, p, ds);
        store(w.scores + j * kBlockM + i, p);
      }
    } else {
#ifdef FD_BF16
      for (int j = 0; j < tile.keys; j += 2) {
        Vec p0, p1, ds0, ds1;
        one(j, p0, ds0);
        one(j + 1, p1, ds1);
        store_pairs(w.dscores_by_key + j / 2 * kBlockM + i, ds0, ds1);
        const int at = (j * kBlockM + i) / 2;
        store_bf16(w.probs + at, p0), store_bf16(w.probs + at + kBlockM / 2, p1);
        store_bf16(w.dscores_by_query + at, ds0);
        store_bf16(w.dscores_by_query + at + kBlockM / 2, ds1);
      }
#endif
    }
  }
}

// Sums of dscores over keys and over queries, for a tile with one table row. Sums of a tile are
// made before they join those of others: long sums lose less that way.
inline void add_sums(const float* dscores, int keys, int lanes, float* du, float* dw) {
  for (int i = 0; i < lanes; i += kLanes) {
    Vec total = zero();
    for (int j = 0; j < keys; ++j) total = add(total, load(dscores + j * kBlockM + i));
    store(du + i, add(load(du + i), total));
  }
  for (int j = 0; j < keys; ++j) {
    Vec total = zero();
    for (int i = 0; i < lanes; i += kLanes) total = add(total, load(dscores + j * kBlockM + i));
    dw[j] += sum(total);
  }
}

// a += x · b
FD_INLINE void add_scaled(float* a, float x, const float* b, int dim) {
  const Vec factor = set1(x);
  for (int d = 0; d < dim; d += kLanes) store(a + d, fma(factor, load(b + d), load(a + d)));
}

template <class T, class S>
class BackwardHead {
 public:
  using Word = typename T::Word;

  BackwardHead(const Call& call, int head, const BackwardScratch<T>& scratch,
               const DropoutRule* rule)
      : call_(call), p_(call.p), w_(scratch), tables_(call, head), rule_(rule), head_(head) {
    dim_ = padded_dim<T>(p_.head_dim);
    words_ = dim_ / T::kPerWord;
  }

  void run(const BackwardPart& part, float* dquery_share) {
    const int64_t used = static_cast<int64_t>(call_.used_begin) * dim_;
    const size_t used_bytes = sizeof(float) * (call_.used_end - call_.used_begin) * dim_;
    if (tables_.key_panels) std::memset(w_.dpos_key + used, 0, used_bytes);
    if (tables_.query_panels) std::memset(w_.dpos_query + used, 0, used_bytes);
    for (int n = part.first; n < part.last; ++n) {
      const Sequence& sequence = call_.sequences[n];
      if (sequence.begin == sequence.end) continue;
      const int begin = sequence.aligned_begin();
      const int supers = static_cast<int>(round_up(sequence.end - begin, kSuperN)) / kSuperN;
      start(sequence);
      for (int s = supers * part.share / part.shares; s < supers * (part.share + 1) / part.shares;
           ++s) {
        keys(sequence, n, begin + s * kSuperN);
      }
      finish(sequence, dquery_share);
    }
  }

 private:
  // What all keys of a sequence need of its queries.
  void start(const Sequence& sequence) {
    const int begin = sequence.aligned_begin();
    const int count = sequence.aligned_length();
    std::memset(w_.dquery, 0, sizeof(float) * count * dim_);
    for (int i = 0; i < count; ++i) {
      const int query = begin + i;
      const int64_t token = sequence.start + query;
      const bool attends = query >= sequence.begin && query < sequence.end &&
                           (!p_.key_mask || p_.key_mask[token]) &&
                           p_.lse[head_ * p_.tokens + token] != -INFINITY;
      w_.lse[i] = attends ? p_.lse[head_ * p_.tokens + token] : INFINITY;
      w_.delta[i] = 0.0f;
      if (!attends) continue;
      to_float(at<S>(p_.dout, token, head_), w_.line, p_.head_dim);
      to_float(static_cast<const S*>(p_.out) + (token * p_.heads + head_) * p_.head_dim, w_.line2,
               p_.head_dim);
      for (int d = p_.head_dim; d < dim_; ++d) w_.line[d] = w_.line2[d] = 0.0f;
      Vec total = zero();
      for (int d = 0; d < dim_; d += kLanes) {
        total = fma(load(w_.line + d), load(w_.line2 + d), total);
      }
      w_.delta[i] = sum(total);
    }
  }

  void finish(const Sequence& sequence, float* share) {
    const int begin = sequence.aligned_begin();
    for (int query = sequence.begin; query < sequence.end; ++query) {
      const float* from = w_.dquery + static_cast<int64_t>(query - begin) * dim_;
      const int64_t to = ((sequence.start + query) * p_.heads + head_) * p_.head_dim;
      if (share) {
        std::memcpy(share + to, from, p_.head_dim * sizeof(float));
      } else {
        from_float(from, static_cast<S*>(p_.dquery) + to, p_.head_dim);
      }
    }
  }

  // One super-tile of keys against all queries.
  void keys(const Sequence& sequence, int n, int super) {
    const int count = std::min(kSuperN, sequence.end - super);
    const int keys = static_cast<int>(round_up(count, kGroup));
    pack_rows<T>(at<S>(p_.key, sequence.start + super, head_), p_.key.stride, count, keys,
                 p_.head_dim, w_.key_rows);
    pack_rows<T>(at<S>(p_.value, sequence.start + super, head_), p_.value.stride, count, keys,
                 p_.head_dim, w_.value_rows);
    key_pairs_ = pair_rows<T>(w_.key_rows, keys, words_, w_.key_pairs);
    list_.fill(p_, sequence, super, keys);
    std::memset(w_.dkey, 0, sizeof(float) * keys * dim_);
    std::memset(w_.dvalue, 0, sizeof(float) * keys * dim_);

    const int begin = sequence.aligned_begin();
    const int first = p_.causal ? begin + (super - begin) / kSuperM * kSuperM : begin;
    for (int query = first; query < sequence.end; query += kSuperM) {
      super_tile(sequence, n, query, super, keys);
    }

    for (int j = 0; j < count; ++j) {
      const int key = super + j;
      if (key < sequence.begin) continue;
      const int64_t to = ((sequence.start + key) * p_.heads + head_) * p_.head_dim;
      from_float(w_.dkey + j * dim_, static_cast<S*>(p_.dkey) + to, p_.head_dim);
      from_float(w_.dvalue + j * dim_, static_cast<S*>(p_.dvalue) + to, p_.head_dim);
    }
  }

  void super_tile(const Sequence& sequence, int n, int query_begin, int super, int keys) {
    const int count = std::min(kSuperM, sequence.end - query_begin);
    const int queries = static_cast<int>(round_up(count, kGroup));
    const int offset = query_begin - sequence.aligned_begin();
    const int64_t first_token = sequence.start + query_begin;
    pack_blocks<T>(at<S>(p_.query, first_token, head_), p_.query.stride, count, queries,
                   p_.head_dim, w_.query_rows, w_.queries);
    pack_blocks<T>(at<S>(p_.dout, first_token, head_), p_.dout.stride, count, queries, p_.head_dim,
                   w_.dout_rows, w_.douts);
    query_pairs_ = pair_rows<T>(w_.query_rows, queries, words_, w_.query_pairs);
    dout_pairs_ = pair_rows<T>(w_.dout_rows, queries, words_, w_.dout_pairs);

    SuperTile<T> super_tile(call_, tables_, w_.super_tile, words_, query_begin, queries,
                            w_.query_rows, w_.queries, super, keys, w_.key_rows);
    const auto met_by_query = [&](int i) { return super_tile.met_by_query(i); };
    const auto met_by_key = [&](int j) { return super_tile.met_by_key(j); };
    Band dc2p, dp2c;
    if (super_tile.is_near() && tables_.key_panels) {
      dc2p = {w_.dc2p - super_tile.base(), call_.band_stride};
      clear_band(dc2p, queries, met_by_query);
    }
    if (super_tile.is_near() && tables_.query_panels) {
      dp2c = {w_.dp2c - super_tile.base(), call_.band_stride};
      clear_band(dp2c, keys, met_by_key);
    }
    // Sums of far tiles, for either side of saturation.
    bool is_summed[2] = {false, false};
    int far_row[2] = {0, 0};

    for (int i = 0; i < queries; i += kBlockM) {
      const Word* douts = w_.douts + static_cast<int64_t>(i) * words_;
      bool first = true;
      for (int j = 0; j < keys; j += kBlockN) {
        if (p_.causal && super + j > query_begin + std::min(i + kBlockM, queries) - 1) break;
        const ScoreTile tile = super_tile.scores(i, j, w_.scores);
        gemm<T, false>(tile.keys, tile.lanes, words_,
                       w_.value_rows + static_cast<int64_t>(j) * words_, words_, 1, douts, kBlockM,
                       w_.dscores, kBlockM);
        mask_scores(w_.scores, tile, list_.dead_from(j), p_.causal);
        if (rule_) dropout_.fill(*rule_, static_cast<uint32_t>(n * p_.heads + head_), tile);
        score_gradients<T>(w_, tile, p_.softmax_scale, p_.keep_scale, w_.lse + offset + i,
                           w_.delta + offset + i, rule_ ? &dropout_ : nullptr);
        content_gradients(i, j, tile.keys, tile.lanes, first);
        first = false;
        const int distance = tile.query - tile.key;
        if (tile.is_near) {
          skew<true>(call_.positions, distance, dc2p.from(i), dp2c.from(j), w_.dscores, tile.keys,
                     tile.lanes);
        } else if (tables_.any()) {
          const int side = distance > 0;
          if (!is_summed[side]) {
            is_summed[side] = true;
            far_row[side] = call_.positions.row(distance);
            std::memset(w_.du + side * kSuperM, 0, sizeof(float) * kSuperM);
            std::memset(w_.dw + side * kSuperN, 0, sizeof(float) * kSuperN);
          }
          add_sums(w_.dscores, tile.keys, tile.lanes, w_.du + side * kSuperM + i,
                   w_.dw + side * kSuperN + j);
        }
      }
      if (!first) {
        add_transposed(w_.dquery + static_cast<int64_t>(offset + i) * dim_,
                       std::min(kBlockM, queries - i));
      }
    }

    float* dquery = w_.dquery + static_cast<int64_t>(offset) * dim_;
    if (dc2p.data) {
      multiply_band<T>(w_.pairs, dc2p, super_tile.base(), queries, dim_, query_pairs_,
                       tables_.key_rows, dquery, w_.dpos_key, met_by_query);
    }
    if (dp2c.data) {
      multiply_band<T>(w_.pairs, dp2c, super_tile.base(), keys, dim_, key_pairs_,
                       tables_.query_rows, w_.dkey, w_.dpos_query, met_by_key);
    }
    for (int side = 0; side < 2; ++side) {
      if (!is_summed[side]) continue;
      if (tables_.key_panels) {
        far_gradients(p_.pos_key, far_row[side], p_.query, first_token, count,
                      w_.du + side * kSuperM, dquery, w_.dpos_key);
      }
      if (tables_.query_panels) {
        far_gradients(p_.pos_query, far_row[side], p_.key, sequence.start + super,
                      std::min(keys, sequence.end - super), w_.dw + side * kSuperN, w_.dkey,
                      w_.dpos_query);
      }
    }
  }

  // dvalue += probsᵀ · dout, dkey += dscoresᵀ · query, dqueries (+)= keyᵀ · dscores
  void content_gradients(int i, int j, int keys, int lanes, bool first) {
    const Word *probs, *by_query, *by_key;
    if constexpr (T::kPerWord == 1) {
      probs = w_.scores, by_query = by_key = w_.dscores;
    } else {
      probs = w_.probs, by_query = w_.dscores_by_query, by_key = w_.dscores_by_key;
    }
    constexpr int kStride = kBlockM / T::kPerWord;
    const int depth = lanes / T::kPerWord;
    const int64_t pairs = static_cast<int64_t>(i) / T::kPerWord * dim_;
    const int64_t row = static_cast<int64_t>(j) * dim_;
    gemm<T, true>(keys, dim_, depth, probs, kStride, 1, dout_pairs_ + pairs, dim_, w_.dvalue + row,
                  dim_);
    gemm<T, true>(keys, dim_, depth, by_query, kStride, 1, query_pairs_ + pairs, dim_,
                  w_.dkey + row, dim_);
    const Word* tile_keys = key_pairs_ + row / T::kPerWord;
    if (first) {
      gemm<T, false>(dim_, lanes, keys / T::kPerWord, tile_keys, 1, dim_, by_key, kBlockM,
                     w_.dqueries, kBlockM);
    } else {
      gemm<T, true>(dim_, lanes, keys / T::kPerWord, tile_keys, 1, dim_, by_key, kBlockM,
                    w_.dqueries, kBlockM);
    }
  }

  // to[lane][d] += dqueries[d][lane]
  void add_transposed(float* to, int lanes) {
    for (int i = 0; i < lanes; i += kLanes) {
      for (int d = 0; d < dim_; d += kLanes) {
        Vec block[kLanes];
        FD_UNROLL
        for (int s = 0; s < kLanes; ++s) block[s] = load(w_.dqueries + (d + s) * kBlockM + i);
        transpose(block);
        FD_UNROLL
        for (int s = 0; s < kLanes; ++s) {
          float* line = to + static_cast<int64_t>(i + s) * dim_ + d;
          store(line, add(load(line), block[s]));
        }
      }
    }
  }

  // dcontent[n] += x[n] · table[row], dtable[row] += sum_n x[n] · content[n]
  void far_gradients(const HeadsView& table, int row, const HeadsView& content, int64_t token,
                     int count, const float* x, float* dcontent, float* dtable) {
    for (int d = p_.head_dim; d < dim_; ++d) w_.line[d] = w_.line2[d] = 0.0f;
    to_float(at<S>(table, row, head_), w_.line, p_.head_dim);
    for (int begin = 0; begin < count; begin += kBlockM) {
      std::memset(w_.total, 0, sizeof(float) * dim_);
      for (int n = begin; n < std::min(begin + kBlockM, count); ++n) {
        to_float(at<S>(content, token + n, head_), w_.line2, p_.head_dim);
        add_scaled(dcontent + static_cast<int64_t>(n) * dim_, x[n], w_.line, dim_);
        add_scaled(w_.total, x[n], w_.line2, dim_);
      }
      add_scaled(dtable + static_cast<int64_t>(row) * dim_, 1.0f, w_.total, dim_);
    }
  }

  const Call& call_;
  const AttentionParams& p_;
  const BackwardScratch<T>& w_;
  const Tables<T> tables_;
  const DropoutRule* rule_;
  const int head_;
  int dim_, words_;
  const Word *key_pairs_, *query_pairs_, *dout_pairs_;
  KeyList list_;
  DropoutBits dropout_;
};

// Rows that no distance reads are the launcher's to clear.
template <class S>
void write_table(const Call& call, int head, const float* from, int dim, float* shared, void* to) {
  const AttentionParams& p = call.p;
  for (int r = call.used_begin; r < std::min(call.used_end, p.table_rows); ++r) {
    const int64_t at = (static_cast<int64_t>(r) * p.heads + head) * p.head_dim;
    const float* row = from + static_cast<int64_t>(r) * dim;
    if (shared) {
      std::memcpy(shared + at, row, p.head_dim * sizeof(float));
    } else {
      from_float(row, static_cast<S*>(to) + at, p.head_dim);
    }
  }
}

template <class T, class S>
void backward_worker(Call& call) {
  static thread_local Scratch scratch;
  const AttentionParams& p = call.p;
  const int dim = padded_dim<T>(p.head_dim);
  const auto carve = [&](BackwardScratch<T>& w, char* data) {
    return w.carve(data, dim, call.band_stride, p.table_rows, call.longest);
  };
  BackwardScratch<T> w;
  carve(w, scratch.reserve(carve(w, nullptr)));
  const auto rule = dropout_rule(p);
  const int64_t parts = static_cast<int64_t>(call.parts.size());
  const int64_t table = static_cast<int64_t>(p.table_rows) * p.heads * p.head_dim;
  for (int64_t n; (n = call.next.fetch_add(1)) < parts * p.heads;) {
    const int64_t index = n % parts;
    const int head = static_cast<int>(n / parts);
    const BackwardPart& part = call.parts[index];
    float* share =
        call.dquery ? call.dquery + part.share * p.tokens * p.heads * p.head_dim : nullptr;
    BackwardHead<T, S>(call, head, w, rule ? &*rule : nullptr).run(part, share);
    float* shared = call.dtables ? call.dtables + index * 2 * table : nullptr;
    if (p.pos_key.data) write_table<S>(call, head, w.dpos_key, dim, shared, p.dpos_key);
    if (p.pos_query.data) {
      write_table<S>(call, head, w.dpos_query, dim, shared ? shared + table : nullptr,
                     p.dpos_query);
    }
  }
  scratch.trim();
}

}  // namespace
}  // namespace fastdeberta::cpu
