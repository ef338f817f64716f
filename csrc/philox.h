// SPDX-License-Identifier: Apache-2.0
//
// Which scores dropout keeps: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) and the one rule by which every backend maps a score to a random word.
//
// A counter-based generator has no state to carry: the backward pass draws the very words of the
// forward pass again, in any order, and no mask is stored.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTDEBERTA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTDEBERTA_HOST_DEVICE inline
#endif

namespace fastdeberta {

struct Philox4 {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;

FASTDEBERTA_HOST_DEVICE void philox_round(uint32_t& word0, uint32_t& word1, uint32_t& word2,
                                          uint32_t& word3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53u} * word0;
  const uint64_t product1 = uint64_t{0xCD9E8D57u} * word2;
  word0 = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
  word1 = static_cast<uint32_t>(product1);
  word2 = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
  word3 = static_cast<uint32_t>(product0);
}

FASTDEBERTA_HOST_DEVICE void philox_bump(uint32_t& key0, uint32_t& key1) {
  key0 += 0x9E3779B9u;
  key1 += 0xBB67AE85u;
}

FASTDEBERTA_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(counter.word[0], counter.word[1], counter.word[2], counter.word[3], key0, key1);
    philox_bump(key0, key1);
  }
  return counter;
}

// The dropout rule for the scores (i, j), query by key, of one sequence and head.
//
// One draw serves rows i and i + 8 and columns j and j + 1: exactly the four scores that a thread
// holds of an m16n8 tensor-core tile, in the order of its four accumulators. A GPU thread thus uses
// every word it draws and needs no word of a neighbour.
struct DropoutRule {
  uint32_t key0, key1, offset, threshold;

  // rng_state = (seed, offset), of which the offset changes from call to call.
  FASTDEBERTA_HOST_DEVICE DropoutRule(const int64_t* rng_state, uint32_t threshold)
      : key0(static_cast<uint32_t>(rng_state[0])),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(rng_state[0]) >> 32)),
        offset(static_cast<uint32_t>(rng_state[1])),
        threshold(threshold) {}

  // 0 <= dropout_p < 1: the threshold of 1 would not fit 32 bits.
  static uint32_t threshold_of(double dropout_p) {
    return static_cast<uint32_t>(dropout_p * 4294967296.0);
  }

  // Row of draws that serves score row i: rows i and i + 8 of a 16-row tile share it.
  FASTDEBERTA_HOST_DEVICE static uint32_t draw_row(uint32_t i) { return (i & 7) | (i >> 4 << 3); }

  // Of a draw's four words, the one that belongs to score (i, j).
  FASTDEBERTA_HOST_DEVICE static int word_index(uint32_t i, uint32_t j) {
    return static_cast<int>(2 * (i >> 3 & 1) + (j & 1));
  }

  // sequence_head = sequence * heads + head.
  FASTDEBERTA_HOST_DEVICE Philox4 draw(uint32_t sequence_head, uint32_t i, uint32_t j) const {
    return philox4x32_10({{j >> 1, draw_row(i), sequence_head, offset}}, key0, key1);
  }

  FASTDEBERTA_HOST_DEVICE bool keeps(uint32_t sequence_head, uint32_t i, uint32_t j) const {
    return keeps(draw(sequence_head, i, j).word[word_index(i, j)]);
  }

  // A score is kept with probability 1 - dropout_p, to within 2^-32.
  FASTDEBERTA_HOST_DEVICE bool keeps(uint32_t word) const { return word >= threshold; }
};

}  // namespace fastdeberta
