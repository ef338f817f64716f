// SPDX-License-Identifier: Apache-2.0
//
// The memory of fibers: their stacks, and the shared memory of the block. It is mapped once, and
// every block finds it as new.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "simt.h"
#include "tools.h"

namespace simt {

inline unsigned char* map_pages(void* address, size_t bytes, int flags = 0) {
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags;
  void* mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, kind, -1, 0);
  if (mapped == MAP_FAILED) throw Error("simt: no memory for stacks");
  return static_cast<unsigned char*>(mapped);
}

// TSan forgets who accessed memory when it is mapped again.
inline void forget([[maybe_unused]] unsigned char* pages, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_TSAN
  map_pages(pages, bytes, MAP_FIXED);
#endif
}

class Stacks {
 public:
  void reserve(int threads, size_t wanted) {
    const size_t bytes = (wanted + page_ - 1) / page_ * page_;
    if (bytes == bytes_ && threads <= threads_) return;
    if (memory_) munmap(memory_, threads_ * (page_ + bytes_));
    memory_ = nullptr;
    memory_ = map_pages(nullptr, threads * (page_ + bytes));
    bytes_ = bytes;
    threads_ = threads;
    for (int thread = 0; thread < threads; ++thread) {
      // Whoever runs out of stack crashes here, rather than in another's.
      mprotect(begin(thread) - page_, page_, PROT_NONE);
#ifdef SIMT_VALGRIND
      static unsigned known[1024];
      if (known[thread]) VALGRIND_STACK_DEREGISTER(known[thread]);
      known[thread] = VALGRIND_STACK_REGISTER(begin(thread), begin(thread) + bytes);
#endif
    }
  }

  void renew(int thread) {
    forget(begin(thread), bytes_);
#ifdef SIMT_ASAN
    allow(begin(thread), bytes_);  // frames that a launch which failed has left
#endif
  }

  unsigned char* begin(int thread) const { return memory_ + thread * (page_ + bytes_) + page_; }
  size_t bytes() const { return bytes_; }

 private:
  const size_t page_ = sysconf(_SC_PAGESIZE);
  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0;  // of each
  int threads_ = 0;
};

// Lies between red zones.
class SharedMemory {
 public:
  static constexpr size_t kMost = 227 << 10;  // of any GPU so far: sm_90

  void renew(size_t bytes) {
    if (!memory_) memory_ = map_pages(nullptr, kPages);
    forget(memory_, kPages);
    bytes_ = bytes;
    allow(begin() - kRedZone, bytes + 2 * kRedZone);
    poison(begin() - kRedZone, bytes + 2 * kRedZone);
    forbid(begin() - kRedZone, kRedZone);
    forbid(begin() + bytes, kRedZone);
  }

  // Whether a red zone was written to, where no tool watches them.
  bool overrun() const {
#if defined(SIMT_ASAN) || defined(SIMT_VALGRIND)
    return false;
#else
    auto written = [](const unsigned char* zone) {
      return std::any_of(zone, zone + kRedZone, [](int byte) { return byte != kPoison; });
    };
    return written(begin() - kRedZone) || written(begin() + bytes_);
#endif
  }

  bool contains(const unsigned char* address, size_t bytes) const {
    return address >= begin() && address + bytes <= begin() + bytes_;
  }

  // Aligned to 128 bytes, which kernels are promised, and to no more.
  unsigned char* begin() const { return memory_ + kRedZone + 128; }

 private:
  static constexpr size_t kRedZone = 1024, kPages = kMost + 4 * kRedZone;
  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace simt
