// SPDX-License-Identifier: Apache-2.0
//
// Position terms. A band holds, for each content vector of a super-tile, its products with the
// table rows that it meets there; a score reads the row of its distance. Along a row of scores the
// distance grows by one a lane, and so a vector of scores is a vector of the band at an offset
// (linear distances), or that vector with some lanes repeated (logarithmic ones): the skew.
#pragma once

#include <algorithm>

#include "pack.h"

namespace fastdeberta::cpu {
namespace {

// data[i * stride + r]: vector i times table row r, r absolute. Null: the term is off.
struct Band {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int i) const { return data + i * stride; }
  Band from(int i) const { return {data ? row(i) : nullptr, stride}; }
};

// Table rows in whole groups.
struct Rows {
  int begin, end;
};

inline Rows rows_met(const Positions& positions, int64_t low, int64_t high) {
  return {round_down_to_group(positions.row(low)),
          static_cast<int>(round_up(positions.row(high) + 1, kGroup))};
}

// Of all groups of `count` vectors, of which met(i) gives those of the group from the i-th on.
template <class Met>
Rows all_met(int count, const Met& met) {
  Rows all = met(0);
  for (int i = kGroup; i < count; i += kGroup) {
    const Rows rows = met(i);
    all = {std::min(all.begin, rows.begin), std::max(all.end, rows.end)};
  }
  return all;
}

// How the distances of a block of kGroup x kGroup scores choose rows.
enum class Slope { kConstant, kLinear, kBuckets, kJumps };

inline Slope slope_of(const Positions& positions, int distance) {
  const int low = positions.row(distance - (kGroup - 1));
  const int high = positions.row(distance + (kGroup - 1));
  if (low == high) return Slope::kConstant;
  if (high - low == 2 * (kGroup - 1) && !positions.has_jumps()) return Slope::kLinear;
  return positions.has_jumps() ? Slope::kJumps : Slope::kBuckets;
}

// The scores of kLanes consecutive distances from `row` on.
template <Slope kSlope>
FD_INLINE Vec read_band(const float* band, const int32_t* row) {
  if constexpr (kSlope == Slope::kConstant) {
    return set1(band[*row]);
  } else if constexpr (kSlope == Slope::kLinear) {
    return load(band + *row);
  } else if constexpr (kSlope == Slope::kBuckets) {
    return load_rows(band + *row, row);
  } else {
    float lanes[kLanes];
    for (int t = 0; t < kLanes; ++t) lanes[t] = band[row[t]];
    return load(lanes);
  }
}

// The mirror of read_band.
template <Slope kSlope>
FD_INLINE void add_to_band(float* band, const int32_t* row, Vec x) {
  if constexpr (kSlope == Slope::kConstant) {
    band[*row] += sum(x);
  } else if constexpr (kSlope == Slope::kLinear) {
    store(band + *row, add(load(band + *row), x));
  } else if constexpr (kSlope == Slope::kBuckets) {
    add_rows(band + *row, row, x);
  } else {
    float lanes[kLanes];
    store(lanes, x);
    for (int t = 0; t < kLanes; ++t) band[row[t]] += lanes[t];
  }
}

// scores[j][i] = c2p(i, j) + p2c(i, j) for kLanes x kLanes scores; `row` is that of i - j at the
// block's first query and key. Position terms begin the sum to which q·k is added.
template <Slope kSlope, bool kC2p, bool kP2c>
FD_INLINE void skew_block(const int32_t* row, const Band& c2p, const Band& p2c, float* scores) {
  Vec queries[kLanes];  // reversed keys in lanes, so that distances ascend; then transposed
  if constexpr (kC2p) {
    FD_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      queries[i] = read_band<kSlope>(c2p.row(i), row + i - (kLanes - 1));
    }
    transpose(queries);
  }
  FD_UNROLL
  for (int j = 0; j < kLanes; ++j) {
    Vec x;
    if constexpr (kC2p) x = queries[kLanes - 1 - j];
    if constexpr (kP2c) {
      const Vec y = read_band<kSlope>(p2c.row(j), row - j);
      x = kC2p ? add(x, y) : y;
    }
    store(scores + j * kBlockM, x);
  }
}

// Adds gradients of kLanes x kLanes scores to both bands: the mirror of skew_block.
template <Slope kSlope, bool kC2p, bool kP2c>
FD_INLINE void unskew_block(const int32_t* row, const Band& dc2p, const Band& dp2c,
                            const float* dscores) {
  Vec queries[kLanes];
  FD_UNROLL
  for (int j = 0; j < kLanes; ++j) {
    const Vec x = load(dscores + j * kBlockM);
    queries[kLanes - 1 - j] = x;
    if constexpr (kP2c) add_to_band<kSlope>(dp2c.row(j), row - j, x);
  }
  if constexpr (!kC2p) return;
  transpose(queries);
  FD_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    add_to_band<kSlope>(dc2p.row(i), row + i - (kLanes - 1), queries[i]);
  }
}

// The blocks of a score tile of `keys` x `queries`, both whole groups, whose first query and key
// are `distance` apart: skewed, or with kBackward unskewed.
template <bool kBackward, bool kC2p, bool kP2c>
void skew_tile(const Positions& positions, int distance, const Band& c2p, const Band& p2c,
               float* scores, int keys, int queries) {
  for (int i = 0; i < queries; i += kGroup) {
    for (int j = 0; j < keys; j += kGroup) {
      const auto run = [&](auto constant) {
        constexpr Slope kSlope = decltype(constant)::value;
        for (int jj = j; jj < j + kGroup; jj += kLanes) {
          for (int ii = i; ii < i + kGroup; ii += kLanes) {
            const int32_t* row = positions.rows_from(distance + ii - jj);
            const Band c = c2p.from(ii), p = p2c.from(jj);
            float* block = scores + jj * kBlockM + ii;
            if constexpr (kBackward) {
              unskew_block<kSlope, kC2p, kP2c>(row, c, p, block);
            } else {
              skew_block<kSlope, kC2p, kP2c>(row, c, p, block);
            }
          }
        }
      };
      switch (slope_of(positions, distance + i - j)) {
        case Slope::kConstant:
          run(std::integral_constant<Slope, Slope::kConstant>());
          break;
        case Slope::kLinear:
          run(std::integral_constant<Slope, Slope::kLinear>());
          break;
        case Slope::kBuckets:
          run(std::integral_constant<Slope, Slope::kBuckets>());
          break;
        case Slope::kJumps:
          run(std::integral_constant<Slope, Slope::kJumps>());
      }
    }
  }
}

template <bool kBackward>
void skew(const Positions& positions, int distance, const Band& c2p, const Band& p2c, float* scores,
          int keys, int queries) {
  const auto run = [&](auto has_c2p, auto has_p2c) {
    skew_tile<kBackward, decltype(has_c2p)::value, decltype(has_p2c)::value>(
        positions, distance, c2p, p2c, scores, keys, queries);
  };
  if (!c2p.data) return run(std::false_type(), std::true_type());
  if (!p2c.data) return run(std::true_type(), std::false_type());
  run(std::true_type(), std::true_type());
}

// band = content · tableᵀ for `count` packed rows, whole groups. `met(i)` gives the table rows that
// the group from vector i on needs. Panel by panel, so that a panel is read from the cache.
template <class T, class Met>
void make_band(const typename T::Word* content, int count, int words,
               const typename T::Word* panels, const Band& band, const Met& met) {
  const Rows all = all_met(count, met);
  for (int panel = all.begin / kPanel * kPanel; panel < all.end; panel += kPanel) {
    for (int i = 0; i < count; i += kGroup) {
      const Rows rows = met(i);
      const int begin = std::max(rows.begin, panel), end = std::min(rows.end, panel + kPanel);
      if (begin >= end) continue;
      gemm<T, false>(kGroup, end - begin, words, content + static_cast<int64_t>(i) * words, words,
                     1, panels + static_cast<int64_t>(panel) * words + (begin - panel), kPanel,
                     band.row(i) + begin, band.stride);
    }
  }
}

// Zeros what multiply_band reads of a band.
template <class Met>
void clear_band(const Band& band, int count, const Met& met) {
  for (int i = 0; i < count; ++i) {
    const Rows rows = met(i & ~(kGroup - 1));
    // A vector's unused lanes are written too, as they were.
    std::memset(band.row(i) + rows.begin, 0, (rows.end - rows.begin + kGroup) * sizeof(float));
  }
}

// A band's gradient as words of bfloat16 pairs; unused for floats, which are read as they are.
template <class T>
struct BandPairs {
  typename T::Word *by_row, *by_content;  // pairs of table rows, of contents
};

// What a band's gradient adds to its contents and to its table:
//   dcontent += dband · table,   dtable += dbandᵀ · content
template <class T, class Met>
void multiply_band(const BandPairs<T>& pairs, const Band& dband, int base, int count, int dim,
                   const typename T::Word* content_pairs, const typename T::Word* table_pairs,
                   float* dcontent, float* dtable, const Met& met) {
  using Word = typename T::Word;
  // Rows of the content that a block of the second product sums over: its panel of them is read
  // from the nearest cache.
  constexpr int kChunk = 64;
  const Word *rows = nullptr, *columns = nullptr;
  int64_t row_stride = 0, column_stride = 0;
  if constexpr (T::kPerWord == 1) {
    rows = columns = dband.data;
    row_stride = column_stride = dband.stride;
  } else {
#ifdef FD_BF16
    // Both products sum over pairs: of table rows, and of contents.
    row_stride = dband.stride / 2, column_stride = dband.stride;
    rows = pairs.by_row - base / 2, columns = pairs.by_content - base;
    for (int i = 0; i < count; i += 2) {
      const Rows r = met(i & ~(kGroup - 1));
      for (int n = r.begin; n < r.end; n += kGroup) {
        const Vec even = load(dband.row(i) + n), odd = load(dband.row(i + 1) + n);
        uint32_t* row = pairs.by_row + i * row_stride + (n - base) / 2;
        store_bf16(row, even);
        store_bf16(row + row_stride, odd);
        store_pairs(pairs.by_content + i / 2 * column_stride + (n - base), even, odd);
      }
    }
#endif
  }
  for (int i = 0; i < count; i += kGroup) {
    const Rows r = met(i);
    gemm<T, true>(kGroup, dim, (r.end - r.begin) / T::kPerWord,
                  rows + i * row_stride + r.begin / T::kPerWord, row_stride, 1,
                  table_pairs + static_cast<int64_t>(r.begin) / T::kPerWord * dim, dim,
                  dcontent + static_cast<int64_t>(i) * dim, dim);
  }
  const Rows all = all_met(count, met);
  for (int chunk = 0; chunk < count; chunk += kChunk) {
    const int chunk_end = std::min(chunk + kChunk, count);
    for (int n = all.begin; n < all.end; n += kGroup) {
      int first = chunk_end, last = chunk;
      for (int i = chunk; i < chunk_end; i += kGroup) {
        const Rows r = met(i);
        if (n < r.begin || n >= r.end) continue;
        first = std::min(first, i), last = i + kGroup;
      }
      if (first >= last) continue;
      gemm<T, true>(kGroup, dim, (last - first) / T::kPerWord,
                    columns + first / T::kPerWord * column_stride + n, 1, column_stride,
                    content_pairs + static_cast<int64_t>(first) / T::kPerWord * dim, dim,
                    dtable + static_cast<int64_t>(n) * dim, dim);
    }
  }
}

}  // namespace
}  // namespace fastdeberta::cpu
