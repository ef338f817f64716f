// SPDX-License-Identifier: Apache-2.0
//
// A call cut into work, once, before the threads start. Independent of the instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../attention.h"
#include "../philox.h"

namespace fastdeberta::cpu {

// Rows of bands and of tables come in groups of this many, and so do positions in a sequence.
constexpr int kGroup = 16;
constexpr int kBlockM = 64;  // queries of a score tile
constexpr int kBlockN = 128;
// Queries and keys of a super-tile, whose position bands are made at once: these bands, most of a
// thread's scratch, do not grow with the sequences.
constexpr int kSuperM = 512;
constexpr int kSuperN = 512;
// Lanes of a panel of a packed table.
constexpr int kPanel = 64;

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
constexpr int round_down_to_group(int x) { return x & ~(kGroup - 1); }

struct Sequence {
  int64_t start;   // first token
  int length;      // tokens
  int begin, end;  // from the first token to attend to, to after the last
  int aligned_begin() const { return round_down_to_group(begin); }
  int aligned_length() const { return static_cast<int>(round_up(end - aligned_begin(), kGroup)); }
};

// distance -> table row, with a margin on either side so that vectors may be read whole.
class Positions {
 public:
  Positions() = default;
  // Distances that occur lie within +-reach.
  Positions(const AttentionParams& params, int reach);

  int row(int64_t distance) const {
    return center_[std::min<int64_t>(std::max<int64_t>(distance, -limit_), limit_)];
  }
  // Whether all distances from `low` to `high` read one row, that of saturation.
  bool is_far(int64_t low, int64_t high) const { return low >= last_ || high <= first_; }
  // rows_from(d)[n] is the row of distance d + n for |n| < 2 * kGroup.
  const int32_t* rows_from(int distance) const {
    return center_ + std::min(std::max(distance, -limit_), limit_);
  }
  // Whether neighbouring distances may lie more than one row apart.
  bool has_jumps() const { return has_jumps_; }
  // The most rows, in whole groups, that `distances` consecutive ones meet.
  int most_rows(int distances) const;

 private:
  std::vector<int32_t> storage_;
  const int32_t* center_ = nullptr;
  int limit_ = 0, first_ = 0, last_ = 0;
  bool has_jumps_ = false;
};

// Queries [begin, begin + query_block) of one head of one sequence.
struct ForwardItem {
  int sequence, begin;
};

// Keys of some sequences for one head: whole sequences [first, last), or of each a share.
struct BackwardPart {
  int first, last;
  int share, shares;
};

// Where threads take scratch memory from: kept from call to call, because fresh pages cost more
// than the attention of a short sequence does. What exceeds kKept bytes is given back.
class Scratch {
 public:
  static constexpr size_t kKept = size_t{16} << 20;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  char* reserve(size_t bytes);
  void trim();

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out aligned pieces of a Scratch. First pass with no memory: `used()` is what is needed.
class Arena {
 public:
  explicit Arena(char* data = nullptr) : data_(data) {}
  template <class X>
  X* take(int64_t count) {
    // A whole vector may be read or written at the end of any piece.
    char* piece = data_ ? data_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(X)) + 64, 64);
    return reinterpret_cast<X*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

inline std::optional<DropoutRule> dropout_rule(const AttentionParams& p) {
  if (!p.rng_state) return std::nullopt;
  return DropoutRule(p.rng_state, p.dropout_threshold);
}

struct Call {
  explicit Call(const AttentionParams& params) : p(params) {}
  const AttentionParams& p;
  std::vector<Sequence> sequences;
  int longest = 0;  // of their aligned lengths
  Positions positions;
  int used_begin = 0, used_end = 0;  // table rows that any distance reads, in whole groups
  int band_stride = 0;               // floats from row to row of a band

  // Packed tables, [H] of each: panels for products with contents, rows for gradients.
  char *key_panels = nullptr, *query_panels = nullptr, *key_rows = nullptr, *query_rows = nullptr;

  int query_block = kSuperM;
  std::vector<ForwardItem> items;
  std::vector<BackwardPart> parts;
  // Gradients that several parts share, float32: [parts, 2, H, table_rows, D], [shares, T, H, D].
  float *dtables = nullptr, *dquery = nullptr;

  std::atomic<int64_t> next{0};
};

// What one instruction set offers. Workers take work from `call.next` until none is left.
struct Kernels {
  const char* name;
  size_t (*table_bytes)(const Call& call);  // of one packed table, all heads
  void (*pack_tables)(Call& call, bool backward, int64_t head);
  void (*forward)(Call& call);
  void (*backward)(Call& call);
  double (*gemm_peak)(bool bf16, int repeats);  // FLOP/s of one thread; 0: no such instruction
};

extern const Kernels kAvx512Bf16, kAvx512, kAvx2, kPortable;

}  // namespace fastdeberta::cpu
