// SPDX-License-Identifier: Apache-2.0
//
// Lets the functions of one file use more instructions than the build's base set: a shipped library
// runs on any machine, and chooses when it runs.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FD_X86 1
#endif

#define FD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FD_TARGET_BEGIN(set) \
  FD_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define FD_TARGET_END _Pragma("clang attribute pop")
#else
#define FD_TARGET_BEGIN(set) _Pragma("GCC push_options") FD_PRAGMA(GCC target(set))
#define FD_TARGET_END _Pragma("GCC pop_options")
#endif
