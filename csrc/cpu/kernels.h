// SPDX-License-Identifier: Apache-2.0
//
// The kernels of one instruction set as a table. Included once by each kernels_*.cpp, which first
// lets the compiler use that set and defines the vectors; all else has internal linkage, so that
// no two sets can be mixed up by the linker.
#pragma once

#include "backward.h"
#include "forward.h"

namespace fastdeberta::cpu {
namespace {

// Calls run(T(), S()): how to compute with elements S of the call.
template <class Run>
void with_types(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(F32(), float());
    case Dtype::kFloat16:
      return run(F32(), Half());
    case Dtype::kBFloat16:
#ifdef FD_BF16
      return run(BF16(), Bf16());
#else
      return run(F32(), Bf16());
#endif
  }
}

size_t table_bytes(const Call& call) {
  size_t bytes = 0;
  with_types(call.p.dtype, [&](auto t, auto) {
    using T = decltype(t);
    bytes = round_up(call.p.table_rows, kPanel) * padded_dim<T>(call.p.head_dim) / T::kPerWord *
            sizeof(typename T::Word) * call.p.heads;
  });
  return bytes;
}

void pack_tables(Call& call, bool backward, int64_t head) {
  const AttentionParams& p = call.p;
  with_types(p.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    using Word = typename T::Word;
    const int words = padded_dim<T>(p.head_dim) / T::kPerWord;
    const int64_t head_words = round_up(p.table_rows, kPanel) * words;
    static thread_local Scratch scratch;
    Word* rows = reinterpret_cast<Word*>(scratch.reserve(kGroup * words * sizeof(Word)));
    const auto pack = [&](const HeadsView& table, char* panels, char* pairs) {
      if (!table.data) return;
      for (int r = call.used_begin; r < call.used_end; r += kGroup) {
        const int64_t panel = head * head_words + static_cast<int64_t>(r / kPanel) * kPanel * words;
        pack_rows<T>(at<S>(table, r, head), table.stride, std::min(kGroup, p.table_rows - r),
                     kGroup, p.head_dim, rows);
        transpose_words<T>(rows, kGroup, words,
                           reinterpret_cast<Word*>(panels) + panel + r % kPanel, kPanel);
        if (!backward) continue;
        Word* to =
            reinterpret_cast<Word*>(pairs) + head * head_words + static_cast<int64_t>(r) * words;
        if (pair_rows<T>(rows, kGroup, words, to) != to) {
          std::memcpy(to, rows, kGroup * words * sizeof(Word));
        }
      }
    };
    pack(p.pos_key, call.key_panels, call.key_rows);
    pack(p.pos_query, call.query_panels, call.query_rows);
  });
}

void forward(Call& call) {
  with_types(call.p.dtype, [&](auto t, auto s) { forward_worker<decltype(t), decltype(s)>(call); });
}

void backward(Call& call) {
  with_types(call.p.dtype,
             [&](auto t, auto s) { backward_worker<decltype(t), decltype(s)>(call); });
}

template <class T>
double measure_gemm(int repeats) {
  constexpr int kRows = kRowsFor[kMostVecs] * 16, kWords = 64, kLanesWide = kMostVecs * kLanes;
  alignas(64) static typename T::Word a[kRows * kWords], b[kWords * kLanesWide];
  alignas(64) static float c[kRows * kLanesWide];
  const auto start = std::chrono::steady_clock::now();
  for (int n = 0; n < repeats; ++n) {
    gemm<T, false>(kRows, kLanesWide, kWords, a, kWords, 1, b, kLanesWide, c, kLanesWide);
    asm volatile("" ::"r"(c) : "memory");
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2.0 * kRows * kLanesWide * kWords * T::kPerWord * repeats / seconds.count();
}

double gemm_peak(bool bf16, int repeats) {
#ifdef FD_BF16
  if (bf16) return measure_gemm<BF16>(repeats);
#endif
  return bf16 ? 0.0 : measure_gemm<F32>(repeats);
}

constexpr Kernels kernels(const char* name) {
  return {name, table_bytes, pack_tables, forward, backward, gemm_peak};
}

}  // namespace
}  // namespace fastdeberta::cpu
