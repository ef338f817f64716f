// SPDX-License-Identifier: Apache-2.0
//
// What the tools that check kernels are told about fibers' memory: nothing, in a plain build. Part
// of simt.cpp, which says how to build for each tool.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#endif
#if defined(__SANITIZE_THREAD__)
#error "compile simt.cpp without -fsanitize=thread, and with -DSIMT_TSAN"
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {  // of TSan's, in no public header
void __tsan_write_range_pc(void* address, unsigned long bytes, void* place);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#ifdef SIMT_VALGRIND
#include <valgrind/memcheck.h>
#endif

namespace simt {

constexpr int kPoison = 0xFF;

// To TSan, what comes before a release of an address comes before what follows its acquisition.
#ifdef SIMT_TSAN
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void* current_tsan_fiber() { return __tsan_get_current_fiber(); }
// The current fiber writes here, at this place in the code.
inline void note_write(void* address, size_t bytes, void* place) {
  __tsan_write_range_pc(address, bytes, place);
}
#else
inline void release(void*) {}
inline void acquire(void*) {}
inline void* current_tsan_fiber() { return nullptr; }
inline void note_write(void*, size_t, void*) {}
#endif

// While one lives, TSan takes nothing for an access: for what the runtime does for itself.
struct Unseen {
#ifdef SIMT_TSAN
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
};

// [address, address + bytes) holds something that may be read and written again; nothing may.
inline void allow(void* address, size_t bytes) {
#ifdef SIMT_ASAN
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
#ifdef SIMT_VALGRIND
  (void)VALGRIND_MAKE_MEM_UNDEFINED(address, bytes);
#endif
  (void)address, (void)bytes;
}

inline void forbid(void* address, size_t bytes) {
#ifdef SIMT_ASAN
  ASAN_POISON_MEMORY_REGION(address, bytes);
#endif
#ifdef SIMT_VALGRIND
  (void)VALGRIND_MAKE_MEM_NOACCESS(address, bytes);
#endif
  (void)address, (void)bytes;
}

// Nothing has been written yet: NaN in every floating-point type.
inline void poison(void* address, size_t bytes) {
  std::memset(address, kPoison, bytes);
#ifdef SIMT_VALGRIND
  (void)VALGRIND_MAKE_MEM_UNDEFINED(address, bytes);
#endif
}

}  // namespace simt
