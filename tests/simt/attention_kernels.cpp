// SPDX-License-Identifier: Apache-2.0
//
// The kernels that attention.cpp calls, in place of csrc/cuda/{forward,backward}_*.cu: each head
// dim once, which takes the compiler half as long. Compile twice, with -DELEMENT= one of their
// element types, and with csrc where headers are looked for.
#include "cuda/backward_launch.cuh"
#include "cuda/forward_launch.cuh"

namespace fastdeberta::cuda {

namespace {

using T = ELEMENT;
constexpr bool kHalf = std::is_same_v<T, __half>;
constexpr int kNarrow = kHalf ? 32 : 96, kWide = kHalf ? 64 : 128;

}  // namespace

template <>
void forward_of<T>(const AttentionParams& p, void* stream) {
  p.head_dim == kNarrow ? choose_forward<T, kNarrow>(p, stream)
                        : choose_forward<T, kWide>(p, stream);
}

template <>
void backward_of<T>(const AttentionParams& p, const Workspace& w, void* stream) {
  p.head_dim == kNarrow ? launch_backward<T, kNarrow>(p, w, stream)
                        : launch_backward<T, kWide>(p, w, stream);
}

}  // namespace fastdeberta::cuda
