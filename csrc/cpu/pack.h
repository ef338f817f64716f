// SPDX-License-Identifier: Apache-2.0
//
// Copies of the arguments in the layouts that products read: words, padded with zeros.
#pragma once

#include <cstring>

#include "call.h"
#include "gemm.h"

namespace fastdeberta::cpu {
namespace {

// Head dims are padded to this many elements: whole groups of words.
template <class T>
constexpr int kDimMultiple = kGroup * T::kPerWord;

template <class T>
int padded_dim(int head_dim) {
  return static_cast<int>(round_up(head_dim, kDimMultiple<T>));
}

template <class S>
const S* at(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<const S*>(view.data) + token * view.stride + head * view.head_stride;
}

constexpr int kPrefetched = 12;

// [padded_rows][words of a row] from `rows` rows of `dim` elements.
template <class T, class S>
void pack_rows(const S* from, int64_t stride, int rows, int padded_rows, int dim,
               typename T::Word* to) {
  const int words = padded_dim<T>(dim) / T::kPerWord;
  for (int i = 0; i < rows; ++i, from += stride, to += words) {
    // Rows lie a whole token apart, too far for the hardware to foresee.
    if (i + kPrefetched < rows) {
      const char* next = reinterpret_cast<const char*>(from + kPrefetched * stride);
      for (size_t n = 0; n < dim * sizeof(S); n += 64) __builtin_prefetch(next + n);
    }
    if constexpr (T::kPerWord == 1) {
      to_float(from, to, dim);
      for (int d = dim; d < words; ++d) to[d] = 0.0f;
    } else {
      std::memcpy(to, from, dim * sizeof(S));
      std::memset(reinterpret_cast<S*>(to) + dim, 0, (words * T::kPerWord - dim) * sizeof(S));
    }
  }
  if (padded_rows > rows) {
    std::memset(to, 0, static_cast<size_t>(padded_rows - rows) * words * sizeof(*to));
  }
}

// [words][stride] from packed rows [rows][words], both multiples of a group.
template <class T>
void transpose_words(const typename T::Word* from, int rows, int words, typename T::Word* to,
                     int64_t stride) {
  for (int i = 0; i < rows; i += kLanes) {
    for (int k = 0; k < words; k += kLanes) {
      Vec block[kLanes];
      FD_UNROLL
      for (int s = 0; s < kLanes; ++s) block[s] = T::load_words(from + (i + s) * words + k);
      transpose(block);
      FD_UNROLL
      for (int s = 0; s < kLanes; ++s) {
        store(reinterpret_cast<float*>(to + (k + s) * stride + i), block[s]);
      }
    }
  }
}

// pack_rows, and the same rows transposed block by block: [words][kBlockM].
template <class T, class S>
void pack_blocks(const S* from, int64_t stride, int rows, int padded_rows, int dim,
                 typename T::Word* packed, typename T::Word* transposed) {
  const int words = padded_dim<T>(dim) / T::kPerWord;
  pack_rows<T>(from, stride, rows, padded_rows, dim, packed);
  for (int64_t i = 0; i < padded_rows; i += kBlockM) {
    transpose_words<T>(packed + i * words, std::min<int>(kBlockM, padded_rows - i), words,
                       transposed + i * words, kBlockM);
  }
}

#ifdef FD_BF16
// Two vectors of 32 bfloat16 to 32 words: pairs of the same place, the first one's lower.
FD_INLINE void store_pairs(uint32_t* to, __m512i even, __m512i odd) {
  alignas(64) static const uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
}
#endif

// Words along the rows, [rows / kPerWord][dim]: for products that sum over rows. Packed rows of
// floats serve as they are; of bfloat16, each word pairs two rows.
template <class T>
const typename T::Word* pair_rows(const typename T::Word* rows, int count, int words,
                                  typename T::Word* to) {
  if constexpr (T::kPerWord == 1) {
    return rows;
  } else {
#ifdef FD_BF16
    for (int i = 0; i < count; i += 2) {
      for (int k = 0; k < words; k += 16) {
        const auto* from = rows + static_cast<int64_t>(i) * words + k;
        store_pairs(to + static_cast<int64_t>(i) * words + 2 * k, _mm512_loadu_si512(from),
                    _mm512_loadu_si512(from + words));
      }
    }
#endif
    return to;
  }
}

}  // namespace
}  // namespace fastdeberta::cpu
