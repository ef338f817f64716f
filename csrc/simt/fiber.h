// SPDX-License-Identifier: Apache-2.0
//
// Stacks to run on, and the switch from one to another. Part of simt.cpp: the assembly may be there
// but once.
#pragma once

#include <cstddef>

#include "tools.h"

// void simt_switch_stack(void** save, void* load): pushes what a function call preserves, leaves
// the stack pointer in *save, and takes over the stack that was left so at `load`.
extern "C" void simt_switch_stack(void** save, void* load);
#if defined(__x86_64__)
constexpr size_t kFrameWords = 8;  // six registers, the return address, and none beyond it
constexpr size_t kReturnWord = 6;
asm(R"(
.text
.type simt_switch_stack, @function
.hidden simt_switch_stack
.globl simt_switch_stack
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, . - simt_switch_stack
)");
#elif defined(__aarch64__)
constexpr size_t kFrameWords = 20;  // x19 to x30, d8 to d15
constexpr size_t kReturnWord = 11;
asm(R"(
.text
.type simt_switch_stack, %function
.hidden simt_switch_stack
.globl simt_switch_stack
simt_switch_stack:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size simt_switch_stack, . - simt_switch_stack
)");
#else
#error "simt: no stack switch for this processor"
#endif

namespace simt {

// Something to switch to: a fiber, or the OS thread that launches.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
};

// `for_good`: nobody will come back to `from`.
inline void switch_context(Context& from, Context& to, bool for_good = false) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing on a new stack: ASan learns where the host's is when that enters the first fiber.
inline void begin_fiber([[maybe_unused]] Context& host) {
#ifdef SIMT_ASAN
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (host.stack) return;
  host.stack = stack;
  host.stack_bytes = bytes;
#endif
}

}  // namespace simt
