// SPDX-License-Identifier: Apache-2.0
//
// Forward pass of some queries of one head: out = softmax(scores) · value and its log-sum-exp.
//
// Queries run in lanes: a score tile is [keys][kBlockM queries], its product with the values the
// transposed output [head dim][kBlockM]. Neither keys nor values are transposed, and every softmax
// step is lane by lane.
#pragma once

#include "super_tile.h"

namespace fastdeberta::cpu {
namespace {

// All that a thread holds. Its size does not depend on the sequences' lengths.
template <class T>
struct ForwardScratch {
  using Word = typename T::Word;
  SuperTileScratch<T> super_tile;
  Word *query_rows, *queries, *key_rows, *value_rows, *values, *probs;
  float *scores, *out, *row_max, *row_sum, *line;

  size_t carve(char* data, int dim, int64_t band_stride) {
    Arena arena(data);
    const int words = dim / T::kPerWord;
    query_rows = arena.take<Word>(kSuperM * words);
    queries = arena.take<Word>(kSuperM * words);
    super_tile.carve(arena, words, band_stride);
    key_rows = arena.take<Word>(kSuperN * words);
    value_rows = arena.take<Word>(kSuperN * words);
    values = arena.take<Word>(T::kPerWord == 1 ? 0 : kSuperN * words);
    probs = arena.take<Word>(T::kPerWord == 1 ? 0 : kBlockN * kBlockM / 2);
    scores = arena.take<float>(kBlockN * kBlockM);
    out = arena.take<float>(kSuperM * dim);
    row_max = arena.take<float>(kSuperM);
    row_sum = arena.take<float>(kSuperM);
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
  const float scale = p.keep_scale;
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
      if (query + i + s < sequence.begin) continue;  // padding: the launcher's
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
  const Sequence& sequence = call.sequences[item.sequence];
  const int dim = padded_dim<T>(p.head_dim), words = dim / T::kPerWord;
  const Tables<T> tables(call, head);
  const uint32_t sequence_head = static_cast<uint32_t>(item.sequence * p.heads + head);
  const float c = p.softmax_scale * kLog2E;

  const int query_begin = item.begin;
  const int query_end = std::min(item.begin + call.query_block, sequence.end);
  const int queries = static_cast<int>(round_up(query_end - query_begin, kGroup));
  const int key_end = p.causal ? std::min(sequence.end, query_end) : sequence.end;

  pack_blocks<T>(at<S>(p.query, sequence.start + query_begin, head), p.query.stride,
                 query_end - query_begin, queries, p.head_dim, w.query_rows, w.queries);
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

    SuperTile<T> super_tile(call, tables, w.super_tile, words, query_begin, queries, w.query_rows,
                            w.queries, super, keys, w.key_rows);
    for (int i = 0; i < queries; i += kBlockM) {
      float* out = w.out + static_cast<int64_t>(i) * dim;
      for (int j = 0; j < keys; j += kBlockN) {
        if (p.causal && super + j > query_begin + std::min(i + kBlockM, queries) - 1) break;
        const ScoreTile tile = super_tile.scores(i, j, w.scores);
        mask_scores(w.scores, tile, list.dead_from(j), p.causal);
        if (rule) dropout.fill(*rule, sequence_head, tile);
        const bool first = super == sequence.aligned_begin() && j == 0;
        softmax<T>(w.scores, tile.keys, tile.lanes, c, tile.u, w.row_max + i, w.row_sum + i,
                   w.probs, rule ? &dropout : nullptr, out, dim, first);
        const Word* probs = nullptr;
        if constexpr (T::kPerWord == 1) {
          probs = w.scores;
        } else {
          probs = w.probs;
        }
        const Word* tile_values = values + static_cast<int64_t>(j) / T::kPerWord * dim;
        const int depth = tile.keys / T::kPerWord;
        if (first) {
          gemm<T, false>(dim, tile.lanes, depth, tile_values, 1, dim, probs, kBlockM, out, kBlockM);
        } else {
          gemm<T, true>(dim, tile.lanes, depth, tile_values, 1, dim, probs, kBlockM, out, kBlockM);
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
  const auto rule = dropout_rule(call.p);
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
