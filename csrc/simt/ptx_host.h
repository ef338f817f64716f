// SPDX-License-Identifier: Apache-2.0
//
// What csrc/cuda/ptx.cuh declares, for the CPU: see there for what each function means.
#pragma once

#include "simt.h"

#define FASTDEBERTA_SHARED(name) unsigned char* name = ::simt::shared_memory()

namespace fastdeberta::ptx {

namespace host {

template <class T>
inline constexpr bool is_half = std::is_same_v<T, __half>;

// The value of 16 bits; the CUDA headers' own conversion of half is some ten times as slow.
template <class T>
SIMT_EXCHANGE inline float widen(uint32_t bits) {
  if constexpr (!is_half<T>) return __builtin_bit_cast(float, bits << 16);
  // The exponent's bias is 112 less than float's, which a product mends for subnormals as well.
  const float magnitude = __builtin_bit_cast(float, (bits & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x1p16f ? 0x7F800000u : 0;  // infinity or NaN
  const uint32_t sign = (bits & 0x8000) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | infinite | sign);
}

struct MmaLane {
  uint32_t a[4], b[2];
  float d[4];
};

// Gathers the three matrices from the lanes, multiplies, and hands d back.
template <class T>
SIMT_EXCHANGE void mma(void* const* lanes, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& self = *static_cast<const MmaLane*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int odd = 0; odd < 2; ++odd) {
      for (int r = 0; r < 4; ++r) {
        const uint32_t bits = self.a[r] >> 16 * odd & 0xFFFF;
        a[group + r % 2 * 8][pair + r / 2 * 8 + odd] = widen<T>(bits);
        d[group + r / 2 * 8][pair + r % 2] = self.d[r];
      }
      for (int r = 0; r < 2; ++r) {
        b[pair + r * 8 + odd][group] = widen<T>(self.b[r] >> 16 * odd & 0xFFFF);
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaLane& self = *static_cast<MmaLane*>(lanes[lane]);
    for (int r = 0; r < 4; ++r) self.d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
}

struct MatrixLane {
  uint32_t row[4];     // the 8 elements that this lane fetched
  uint32_t loaded[4];  // what it gets of each matrix
};

template <int kMatrices, bool kTransposed>
SIMT_EXCHANGE void ldmatrix(void* const* lanes, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, quad = lane % 4;
    for (int m = 0; m < kMatrices; ++m) {
      uint32_t& loaded = static_cast<MatrixLane*>(lanes[lane])->loaded[m];
      void* const* rows = lanes + 8 * m;
      if constexpr (kTransposed) {
        const int word = group / 2, shift = group % 2 * 16;
        const uint32_t low = static_cast<const MatrixLane*>(rows[2 * quad])->row[word];
        const uint32_t high = static_cast<const MatrixLane*>(rows[2 * quad + 1])->row[word];
        loaded = (low >> shift & 0xFFFF) | (high >> shift) << 16;
      } else {
        loaded = static_cast<const MatrixLane*>(rows[group])->row[quad];
      }
    }
  }
}

template <bool kTransposed, int kMatrices>
inline void load(uint32_t (&r)[kMatrices], const void* row, simt::Site site) {
  MatrixLane self;
  // Each lane fetches its row itself, outside the exchange, where the sanitizers see it.
  if (simt::lane() < 8 * kMatrices) {
    simt::check_shared(row, 16, site);
    std::memcpy(self.row, row, 16);
  }
  simt::warp_collective(~0u, &self, ldmatrix<kMatrices, kTransposed>, simt::Fence::kNone, site);
  for (int m = 0; m < kMatrices; ++m) r[m] = self.loaded[m];
}

// The source is read when the copy is issued, by the thread that issues it, so that sanitizers show
// the kernel's line. A kernel that changes the source before the wait reads the old data here.
template <int kBytes>
inline void copy(void* shared, const void* global, bool valid, simt::Site site) {
  if (reinterpret_cast<uintptr_t>(global) % kBytes) {
    simt::fail("misaligned source of cp.async", site);
  }
  unsigned char data[kBytes] = {};
  if (valid) std::memcpy(data, global, kBytes);
  simt::cp_async_issue(shared, data, kBytes, site);
}

}  // namespace host

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                simt::Site site = simt::Site::here()) {
  static_assert(host::is_half<T> || std::is_same_v<T, __nv_bfloat16>);
  host::MmaLane self{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  simt::warp_collective(~0u, &self, host::mma<T>, simt::Fence::kNone, site);
  for (int r = 0; r < 4; ++r) d[r] = self.d[r];
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  host::load<false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              simt::Site site = simt::Site::here()) {
  host::load<true>(r, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, simt::Site site = simt::Site::here()) {
  host::load<false>(r, row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                              simt::Site site = simt::Site::here()) {
  host::load<true>(r, row, site);
}

inline void cp_async16(void* shared, const void* global, bool valid,
                       simt::Site site = simt::Site::here()) {
  host::copy<16>(shared, global, valid, site);
}
inline void cp_async4(void* shared, const void* global, bool valid,
                      simt::Site site = simt::Site::here()) {
  host::copy<4>(shared, global, valid, site);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  simt::cp_async_wait(N);
}

inline float exp2_approx(float x) {
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline void bar_sync(int id, int threads, simt::Site site = simt::Site::here()) {
  simt::named_barrier(id, threads, site);
}

}  // namespace fastdeberta::ptx
