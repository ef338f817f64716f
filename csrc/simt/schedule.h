// SPDX-License-Identifier: Apache-2.0
//
// Which of the fibers that can run does so next. Part of simt.cpp.
#pragma once

#include <cstdlib>
#include <string>

#include "simt.h"

namespace simt {

class Schedule {
 public:
  // Before every launch.
  void begin(const Config& config) {
    order_ = config.order;
    uint32_t seed = config.seed;
    if (const char* variable = std::getenv("FASTDEBERTA_SIMT_ORDER")) order_ = read(variable, seed);
    random_ = seed * 2654435761u | 1;  // never zero, where the generator would stay
  }

  // Before every block of so many warps.
  void begin_block(int warps) { warp_ = order_ == Order::kReverse ? warps - 1 : 0; }

  // Of those ready, one bit each. In order, a warp runs as far as it can: its stacks are in the
  // cache then.
  int next_warp(uint32_t ready) {
    if (order_ == Order::kRandom) warp_ = random_bits() & 31;
    return warp_ = first(ready, warp_);
  }
  int next_lane(uint32_t ready) {
    if (order_ == Order::kRandom) return first(ready, random_bits() & 31);
    return first(ready, order_ == Order::kReverse ? 31 : 0);
  }

  // Whether the lane that completes a collective goes on before the others. No rule says so.
  bool last_lane_goes_on() const { return order_ == Order::kForward; }

 private:
  static Order read(const std::string& text, uint32_t& seed) {
    if (text == "forward") return Order::kForward;
    if (text == "reverse") return Order::kReverse;
    if (text == "random") return Order::kRandom;
    const std::string seeded = "random:";
    if (text.size() > seeded.size() && text.compare(0, seeded.size(), seeded) == 0) {
      char* end;
      seed = std::strtoul(&text[seeded.size()], &end, 10);
      if (!*end) return Order::kRandom;
    }
    throw Error("simt: FASTDEBERTA_SIMT_ORDER=" + text +
                " is not forward, reverse or random[:seed]");
  }

  // The first bit set from `start` on, which may be `start`, going up or down and around.
  int first(uint32_t bits, int start) const {
    auto rotate_right = [](uint32_t x, int by) { return x >> (by & 31) | x << (-by & 31); };
    if (order_ == Order::kReverse) {
      return (start - __builtin_clz(rotate_right(bits, start + 1))) & 31;
    }
    return (start + __builtin_ctz(rotate_right(bits, start))) & 31;
  }

  uint32_t random_bits() {  // xorshift32
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    random_ ^= random_ << 5;
    return random_;
  }

  Order order_ = Order::kForward;
  uint32_t random_ = 1;
  int warp_ = 0;
};

}  // namespace simt
