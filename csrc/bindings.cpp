// SPDX-License-Identifier: Apache-2.0
//
// Operators of the CPU library, for torch.ops.load_library: the LibTorch stable ABI alone and no
// Python.h, so that one build serves every torch and Python from the oldest supported one on.
#include "bindings.h"

#include <torch/headeronly/version.h>

#include <sstream>

#include "cpu/attention.h"
#include "cpu/dropout.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;  // "Clang 17.0.6 ..."
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

// The machine that runs, not the one that compiled: kernels choose their instructions by it.
std::string cpu_features() {
  std::string features;
#if defined(__x86_64__) && defined(__GNUC__)
  const auto add = [&](const char* name, bool supported) {
    if (supported) features += (features.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  };
#define ADD(name) add(name, __builtin_cpu_supports(name))  // the builtin takes literals only
  ADD("avx2");
  ADD("fma");
  ADD("avx512f");
  ADD("avx512bw");
  ADD("avx512vl");
  ADD("avx512vnni");
  ADD("avx512bf16");
#undef ADD
#endif
  return "[" + features + "]";
}

// Attention kernels that run here, the fastest first: operators take an index of these.
std::string cpu_kernels() {
  std::string names;
  for (int n = 0; n < fastdeberta::cpu::kernel_count(); ++n) {
    names += (n ? ", \"" : "\"") + std::string(fastdeberta::cpu::kernel_name(n)) + "\"";
  }
  return "[" + names + "]";
}

// JSON, for `fastdeberta info`.
std::string build_info() {
  std::ostringstream json;
  json << "{\"compiler\": \"" << compiler() << "\", \"cxx_standard\": " << __cplusplus
       << ", \"torch_built_with\": \"" << TORCH_VERSION << "\", \"torch_target\": \""
       << (TORCH_TARGET_VERSION >> 56) << "." << (TORCH_TARGET_VERSION >> 48 & 0xff)
#ifdef _OPENMP
       << "\", \"openmp\": true"
#else
       << "\", \"openmp\": false"
#endif
       << ", \"cpu_features\": " << cpu_features() << ", \"cpu_kernels\": " << cpu_kernels() << "}";
  return json.str();
}

Tensor dropout_keep(const Tensor& rng_state, int64_t sequences, int64_t heads, int64_t query_len,
                    int64_t key_len, double dropout_p) {
  STD_TORCH_CHECK(rng_state.scalar_type() == ScalarType::Long && rng_state.dim() == 1 &&
                      rng_state.size(0) == 2 && rng_state.is_contiguous(),
                  "rng_state must be a contiguous int64 tensor [2]: (seed, offset)");
  STD_TORCH_CHECK(sequences >= 0 && heads >= 0 && query_len >= 0 && key_len >= 0,
                  "sequences, heads, query_len and key_len must not be negative");
  STD_TORCH_CHECK(0.0 <= dropout_p && dropout_p < 1.0, "dropout_p must lie in [0, 1), got ",
                  dropout_p);
  Tensor keep =
      torch::stable::new_empty(rng_state, {sequences, heads, query_len, key_len}, ScalarType::Bool);
  const fastdeberta::DropoutRule rule(rng_state.const_data_ptr<int64_t>(),
                                      fastdeberta::DropoutRule::threshold_of(dropout_p));
  fastdeberta::cpu::dropout_keep(rule, sequences * heads, query_len, key_len,
                                 keep.mutable_data_ptr<bool>());
  return keep;
}

void forward(const fastdeberta::AttentionParams& params, const Tensor&, int64_t kernels) {
  fastdeberta::cpu::forward(params, static_cast<int>(kernels));
}

void backward(const fastdeberta::AttentionParams& params, const Tensor&, int64_t kernels) {
  fastdeberta::cpu::backward(params, static_cast<int>(kernels));
}

double gemm_peak(bool bf16, int64_t kernels) {
  return fastdeberta::cpu::gemm_peak(bf16, static_cast<int>(kernels));
}

}  // namespace

// A namespace of its own: `fastdeberta` holds the operators that are defined in Python.
STABLE_TORCH_LIBRARY(fastdeberta_C, m) {
  m.def("build_info() -> str");
  m.def(
      "dropout_keep(Tensor rng_state, int sequences, int heads, int query_len, int key_len, "
      "float dropout_p) -> Tensor");
  m.def(fastdeberta::forward_schema(", int kernels").c_str());
  m.def(fastdeberta::backward_schema(", int kernels").c_str());
  m.def("gemm_peak(bool bf16, int kernels=0) -> float");
}

// These take no tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastdeberta_C, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("gemm_peak", TORCH_BOX(&gemm_peak));
}

STABLE_TORCH_LIBRARY_IMPL(fastdeberta_C, CPU, m) {
  m.impl("dropout_keep", TORCH_BOX(&dropout_keep));
  m.impl("attention_forward", TORCH_BOX((&fastdeberta::attention_forward<forward, int64_t>)));
  m.impl("attention_backward", TORCH_BOX((&fastdeberta::attention_backward<backward, int64_t>)));
}
