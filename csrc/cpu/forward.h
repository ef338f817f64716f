// SPDX-License-Identifier: Apache-2.0
//
// Forward pass of some queries of one head: out = softmax(scores) · value and its log-sum-exp.
//
// Queries run in lanes: a score tile is [keys][kBlockM queries], its product with the values the
// transposed output [head dim][kBlockM]. Neither keys nor values are transposed, and every softmax
// step is lane by lane.
#pragma once

#include "tile.h"

namespace fastdeberta::cpu {
namespace {

// All that a thread holds. Its size does not depend on the sequences' lengths.
template <class T>
struct ForwardScratch {
  using Word = typename T::Word;
  Word *query_rows, *queries, *shifted, *key_rows, *value_rows, *values, *probs;
  float *c2p, *p2c, *scores, *out, *row_max, *row_sum, *far, *line;

  size_t carve(char* data, int dim, int64_t band_stride) {
    Arena arena(data);
    const int words = dim / T::kPerWord;
    query_rows = arena.take<Word>(kSuperM * words);
    queries = arena.take<Word>(kSuperM * words);
    shifted = arena.take<Word>(kBlockM * words);
    key_rows = arena.take<Word>(kSuperN * words);
    value_rows = arena.take<Word>(kSuperN * words);
    values = arena.take<Word>(T::kPerWord == 1 ? 0 : kSuperN * words);
    probs = arena.take<Word>(T::kPerWord == 1 ? 0 : kBlockN * kBlockM / 2);
    c2p = arena.take<float>(kSuperM * band_stride + kGroup);
    p2c = arena.take<float>(kSuperN * band_stride + kGroup);
    scores = arena.take<float>(kBlockN * kBlockM);
    out = arena.take<float>(kSuperM * dim);
    row_max = arena.take<float>(kSuperM);
    row_sum = arena.take<float>(kSuperM);
    far = arena.take<float>(kBlockM);
    line = arena.take<float>(kLanes * dim);
    return arena.used();
  }
};

// One tile's softmax, online: scores become probabilities relative to the running maximum, and the
// output so far is rescaled to it. kVecs vectors of queries at once, to hide latencies.
//
// u: what far tiles add to each query's scores; c: softmax scale times log2(e).
template <class T, int kVecs>
FD_INLINE void softmax_columns(float* scores, int keys, float c, const float* u, float* row_max,
                               float* row_sum, typename T::Word* probs, const DropoutBits* dropout,
                               int lane, float* out, int dim, bool first) {
  Vec shift[kVecs], old_max[kVecs], new_max[kVecs], total[kVecs];
  FD_UNROLL
  for (int n = 0; n < kVecs; ++n) new_max[n] = load(scores + n * kLanes);
  for (int j = 1; j < keys; ++j) {
    FD_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      new_max[n] = max(new_max[n], load(scores + j * kBlockM + n * kLanes));
    }
  }
  const Vec scale = set1(c);
  bool grown = false;
  Vec factor[kVecs];
  FD_UNROLL
  for (int n = 0; n < kVecs; ++n) {
    const Vec extra = u ? load(u + n * kLanes) : zero();
    old_max[n] = load(row_max + n * kLanes);
    // The first maximum is finite, so that a row of -inf alone makes no NaN.
    new_max[n] = max(old_max[n], add(new_max[n], extra));
    store(row_max + n * kLanes, new_max[n]);
    factor[n] = exp2(mul(sub(old_max[n], new_max[n]), scale));
    total[n] = zero();
    shift[n] = mul(sub(new_max[n], extra), scale);
    grown |= any_less(factor[n], 1.0f);
  }
  if constexpr (T::kPerWord == 1) {
    for (int j = 0; j < keys; ++j) {
      FD_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        float* at = scores + j * kBlockM + n * kLanes;
        Vec p = exp2(fms(load(at), scale, shift[n]));
        total[n] = add(total[n], p);
        if (dropout) p = keep(p, dropout->of(j, lane + n * kLanes));
        store(at, p);
      }
    }
  } else {
#ifdef FD_BF16
    for (int j = 0; j < keys; j += 2) {
      FD_UNROLL
      for (int n = 0; n < kVecs; ++n) {
        const float* at = scores + j * kBlockM + n * kLanes;
        Vec even = exp2_for_bf16(fms(load(at), scale, shift[n]));
        Vec odd = exp2_for_bf16(fms(load(at + kBlockM), scale, shift[n]));
        total[n] = add(total[n], add(even, odd));
        if (dropout) {
          even = keep(even, dropout->of(j, lane + n * kLanes));
          odd = keep(odd, dropout->of(j + 1, lane + n * kLanes));
        }
        store_pairs(probs + j / 2 * kBlockM + n * kLanes, even, odd);
      }
    }
#endif
  }
  FD_UNROLL
  for (int n = 0; n < kVecs; ++n) {
    // A tile is summed by itself: a long sum loses less that way.
    store(row_sum + n * kLanes, fma(load(row_sum + n * kLanes), factor[n], total[n]));
  }
  if (first || !grown) return;
  for (int d = 0; d < dim; ++d) {
    FD_UNROLL
    for (int n = 0; n < kVecs; ++n) {
      float* at = out + d * kBlockM + n * kLanes;
      store(at, mul(factor[n], load(at)));
    }
  }
}

template <class T>
void softmax(float* scores, int keys, int lanes, float c, const float* u, float* row_max,
             float* row_sum, typename T::Word* probs, const DropoutBits* dropout, float* out,
             int dim, bool first) {
  const auto run = [&](auto count, int lane) {
    constexpr int kVecs = decltype(count)::value;
    softmax_columns<T, kVecs>(scores + lane, keys, c, u ? u + lane : nullptr, row_max + lane,
                              row_sum + lane, probs + lane, dropout, lane, out + lane, dim, first);
  };
  int lane = 0;
  for (; lane + 4 * kLanes <= lanes; lane += 4 * kLanes) {
    run(std::integral_constant<int, 4>(), lane);
  }
  for (; lane < lanes; lane += kLanes) run(std::integral_constant<int, 1>(), lane);
}

// Output of one block: divided by the sums, transposed, written; with the log-sum-exp.
template <class S>
void finish_block(const Call& call, const Sequence& sequence, int head, int query, int lanes,
                  float* out, const float* row_max, const float* row_sum, int dim, float* line) {
  const AttentionParams& p = call.p;
  const float scale = static_cast<float>(1.0 / (1.0 - p.dropout_p));
  for (int i = 0; i < lanes; i += kLanes) {
    const int count = std::min(kLanes, sequence.end - query - i);
    float factor[kLanes];
    for (int s = 0; s < kLanes; ++s) {
      factor[s] = row_sum[i + s] > 0 ? scale / row_sum[i + s] : 0.0f;
    }
    for (int d = 0; d < dim; d += kLanes) {
      Vec block[kLanes];
      FD_UNROLL
      for (int s = 0; s < kLanes; ++s) {
        block[s] = mul(load(factor), load(out + (d + s) * kBlockM + i));
      }
      transpose(block);
      for (int s = 0; s < count; ++s) store(line + s * dim + d, block[s]);
    }
    for (int s = 0; s < count; ++s) {
      const int64_t token = sequence.start + query + i + s;
      const bool attends = !p.key_mask || p.key_mask[token];
      if (query + i + s < sequence.begin) continue;  // belongs to nobody: see clear_padding
      S* to = static_cast<S*>(p.out) + (token * p.heads + head) * p.head_dim;
      if (attends) {
        from_float(line + s * dim, to, p.head_dim);
      } else {
        std::memset(to, 0, p.head_dim * sizeof(S));
      }
      const float sum = row_sum[i + s];
      // The maximum in base 2 as it was rounded when it was subtracted: the sum is relative to
      // that.
      const float shift = row_max[i + s] * (p.softmax_scale * kLog2E);
      p.lse[head * p.tokens + token] =
          attends && sum > 0 ? static_cast<float>((double{shift} + std::log2(sum)) * kLn2)
                             : -INFINITY;
    }
  }
}

template <class T, class S>
void forward_item(const Call& call, const ForwardItem& item, int head, const ForwardScratch<T>& w,
                  const DropoutRule* rule) {
  using Word = typename T::Word;
  const AttentionParams& p = call.p;
  const Positions& positions = call.positions;
  const Sequence& sequence = call.sequences[item.sequence];
  const int dim = padded_dim<T>(p.head_dim), words = dim / T::kPerWord;
  const bool has_c2p = p.pos_key.data, has_p2c = p.pos_query.data,
             has_positions = has_c2p || has_p2c;
  const int64_t panel_words = round_up(p.table_rows, kPanel) * words;
  const Word* key_panels =
      has_c2p ? reinterpret_cast<const Word*>(call.key_panels) + head * panel_words : nullptr;
  const Word* query_panels =
      has_p2c ? reinterpret_cast<const Word*>(call.query_panels) + head * panel_words : nullptr;
  const uint32_t sequence_head = static_cast<uint32_t>(item.sequence * p.heads + head);
  const float c = p.softmax_scale * kLog2E;

  const int query_begin = item.begin;
  const int query_end = std::min(item.begin + call.query_block, sequence.end);
  const int queries = static_cast<int>(round_up(query_end - query_begin, kGroup));
  const int key_end = p.causal ? std::min(sequence.end, query_end) : sequence.end;

  pack_rows<T>(at<S>(p.query, sequence.start + query_begin, head), p.query.stride,
               query_end - query_begin, queries, p.head_dim, w.query_rows);
  for (int i = 0; i < queries; i += kBlockM) {
    transpose_words<T>(w.query_rows + static_cast<int64_t>(i) * words,
                       std::min(kBlockM, queries - i), words,
                       w.queries + static_cast<int64_t>(i) * words, kBlockM);
  }
  std::fill(w.row_max, w.row_max + queries, -1e30f);
  std::fill(w.row_sum, w.row_sum + queries, 0.0f);

  KeyList list;
  DropoutBits dropout;
  for (int super = sequence.aligned_begin(); super < key_end; super += kSuperN) {
    const int super_keys = std::min(kSuperN, key_end - super);
    const int keys = static_cast<int>(round_up(super_keys, kGroup));
    pack_rows<T>(at<S>(p.key, sequence.start + super, head), p.key.stride, super_keys, keys,
                 p.head_dim, w.key_rows);
    pack_rows<T>(at<S>(p.value, sequence.start + super, head), p.value.stride, super_keys, keys,
                 p.head_dim, w.value_rows);
    const Word* values = pair_rows<T>(w.value_rows, keys, words, w.values);
    list.fill(p, sequence, super, keys);

    // Distances of the super-tile, as far as any query or key exists.
    const int low = query_begin - (super + keys - 1), high = query_begin + queries - 1 - super;
    const bool is_near = has_positions && !positions.is_far(low, high);
    Band c2p, p2c;
    if (is_near) {
      const int base = rows_met(positions, low, high).begin;
      if (has_c2p) {
        c2p = {w.c2p - base, call.band_stride};
        make_band<T>(w.query_rows, queries, words, key_panels, c2p, [&](int i) {
          return rows_met(positions, low + i, query_begin + i + kGroup - 1 - super);
        });
      }
      if (has_p2c) {
        p2c = {w.p2c - base, call.band_stride};
        make_band<T>(w.key_rows, keys, words, query_panels, p2c, [&](int j) {
          return rows_met(positions, query_begin - (super + j + kGroup - 1), high - j);
        });
      }
    }

    for (int i = 0; i < queries; i += kBlockM) {
      const int lanes = std::min(kBlockM, queries - i), query = query_begin + i;
      const Word* content = w.queries + static_cast<int64_t>(i) * words;
      float* out = w.out + static_cast<int64_t>(i) * dim;
      FarQueries<T> far{content, w.shifted, w.far};
      for (int j = 0; j < keys; j += kBlockN) {
        const int key = super + j, tile_keys = std::min(kBlockN, keys - j);
        if (p.causal && key > query + lanes - 1) break;
        const Word* key_rows = w.key_rows + static_cast<int64_t>(j) * words;
        const int distance = query - key;
        const float* u = nullptr;
        if (is_near && !positions.is_far(distance - tile_keys + 1, distance + lanes - 1)) {
          const Band c{c2p.data ? c2p.row(i) : nullptr, c2p.stride};
          const Band r{p2c.data ? p2c.row(j) : nullptr, p2c.stride};
          skew<false>(positions, distance, c, r, w.scores, tile_keys, lanes);
          gemm<T, true>(tile_keys, lanes, words, key_rows, words, 1, content, kBlockM, w.scores,
                        kBlockM);
        } else {
          const Word* seen = content;
          if (has_positions) {
            far.prepare(positions.row(distance), words, lanes, key_panels, query_panels);
            seen = has_p2c ? w.shifted : content;
            u = has_c2p ? w.far : nullptr;
          }
          gemm<T, false>(tile_keys, lanes, words, key_rows, words, 1, seen, kBlockM, w.scores,
                         kBlockM);
        }
        mask_scores(w.scores, tile_keys, lanes,
                    list.any_dead[j / kBlockN] ? list.dead + j : nullptr, p.causal, query, key);
        if (rule) dropout.fill(*rule, sequence_head, query, key, tile_keys, lanes);
        const bool first = super == sequence.aligned_begin() && j == 0;
        softmax<T>(w.scores, tile_keys, lanes, c, u, w.row_max + i, w.row_sum + i, w.probs,
                   rule ? &dropout : nullptr, out, dim, first);
        const Word* probs = nullptr;
        if constexpr (T::kPerWord == 1) {
          probs = w.scores;
        } else {
          probs = w.probs;
        }
        const Word* tile_values = values + static_cast<int64_t>(j) / T::kPerWord * dim;
        const int depth = tile_keys / T::kPerWord;
        if (first) {
          gemm<T, false>(dim, lanes, depth, tile_values, 1, dim, probs, kBlockM, out, kBlockM);
        } else {
          gemm<T, true>(dim, lanes, depth, tile_values, 1, dim, probs, kBlockM, out, kBlockM);
        }
      }
    }
  }
  for (int i = 0; i < queries; i += kBlockM) {
    finish_block<S>(call, sequence, head, query_begin + i, std::min(kBlockM, queries - i),
                    w.out + static_cast<int64_t>(i) * dim, w.row_max + i, w.row_sum + i, dim,
                    w.line);
  }
}

template <class T, class S>
void forward_worker(Call& call) {
  static thread_local Scratch scratch;
  const int dim = padded_dim<T>(call.p.head_dim);
  ForwardScratch<T> w;
  w.carve(scratch.reserve(w.carve(nullptr, dim, call.band_stride)), dim, call.band_stride);
  std::optional<DropoutRule> rule;
  if (call.p.rng_state) rule.emplace(call.p.rng_state, call.p.dropout_p);
  const int64_t blocks = static_cast<int64_t>(call.items.size());
  for (int64_t n; (n = call.next.fetch_add(1)) < blocks * call.p.heads;) {
    // Neighbours read the same keys and values.
    forward_item<T, S>(call, call.items[n % blocks], static_cast<int>(n / blocks), w,
                       rule ? &*rule : nullptr);
  }
  scratch.trim();
}

}  // namespace
}  // namespace fastdeberta::cpu
