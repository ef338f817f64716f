// SPDX-License-Identifier: Apache-2.0
//
// Operators of the CPU library, for torch.ops.load_library: the LibTorch stable ABI alone and no
// Python.h, so that one build serves every torch and Python from the oldest supported one on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>

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
  const fastdeberta::DropoutRule rule(rng_state.const_data_ptr<int64_t>(), dropout_p);
  fastdeberta::cpu::dropout_keep(rule, sequences * heads, query_len, key_len,
                                 keep.mutable_data_ptr<bool>());
  return keep;
}

using OptionalTensor = std::optional<Tensor>;

fastdeberta::HeadsView view(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1),
                  "tensors must be [T, H, D] or [rows, H, D] with a contiguous last dimension");
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

fastdeberta::AttentionParams attention_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pos_key,
    const OptionalTensor& pos_query, const OptionalTensor& cu_seqlens,
    const OptionalTensor& key_mask, const OptionalTensor& rows, int64_t first_distance,
    int64_t last_distance, const OptionalTensor& rng_state, int64_t max_seqlen, bool causal,
    double dropout_p, double softmax_scale, bool uniform_padding) {
  fastdeberta::AttentionParams p{};
  switch (query.scalar_type()) {
    case ScalarType::Float:
      p.dtype = fastdeberta::Dtype::kFloat32;
      break;
    case ScalarType::BFloat16:
      p.dtype = fastdeberta::Dtype::kBFloat16;
      break;
    case ScalarType::Half:
      p.dtype = fastdeberta::Dtype::kFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, "query must be float32, bfloat16 or float16");
  }
  p.query = view(query), p.key = view(key), p.value = view(value);
  p.tokens = query.size(0), p.heads = query.size(1);
  p.head_dim = static_cast<int>(query.size(2));
  if (pos_key) p.pos_key = view(*pos_key), p.table_rows = static_cast<int>(pos_key->size(0));
  if (pos_query)
    p.pos_query = view(*pos_query), p.table_rows = static_cast<int>(pos_query->size(0));
  p.max_seqlen = max_seqlen;
  p.sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : (max_seqlen ? p.tokens / max_seqlen : 0);
  if (cu_seqlens) p.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
  if (key_mask) p.key_mask = key_mask->const_data_ptr<bool>();
  STD_TORCH_CHECK(rows || (!pos_key && !pos_query), "rows must come with pos_key and pos_query");
  if (rows) p.rows = rows->const_data_ptr<int32_t>();
  p.first_distance = static_cast<int>(first_distance);
  p.last_distance = static_cast<int>(last_distance);
  if (rng_state) p.rng_state = rng_state->const_data_ptr<int64_t>();
  p.dropout_p = rng_state ? dropout_p : 0.0;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = causal, p.uniform_padding = uniform_padding;
  return p;
}

Tensor like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pos_key,
    const OptionalTensor& pos_query, const OptionalTensor& cu_seqlens,
    const OptionalTensor& key_mask, const OptionalTensor& rows, int64_t first_distance,
    int64_t last_distance, const OptionalTensor& rng_state, int64_t max_seqlen, bool causal,
    double dropout_p, double softmax_scale, bool uniform_padding, int64_t kernels) {
  fastdeberta::AttentionParams p = attention_params(
      query, key, value, pos_key, pos_query, cu_seqlens, key_mask, rows, first_distance,
      last_distance, rng_state, max_seqlen, causal, dropout_p, softmax_scale, uniform_padding);
  Tensor out = like(query);
  Tensor lse = torch::stable::new_empty(query, {p.heads, p.tokens}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  fastdeberta::cpu::forward(p, static_cast<int>(kernels));
  return {out, lse};
}

// Gradients of query, key, value, pos_key and pos_query, the last two empty where these are absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& pos_key, const OptionalTensor& pos_query, const Tensor& out,
    const Tensor& lse, const OptionalTensor& cu_seqlens, const OptionalTensor& key_mask,
    const OptionalTensor& rows, int64_t first_distance, int64_t last_distance,
    const OptionalTensor& rng_state, int64_t max_seqlen, bool causal, double dropout_p,
    double softmax_scale, bool uniform_padding, int64_t kernels) {
  fastdeberta::AttentionParams p = attention_params(
      query, key, value, pos_key, pos_query, cu_seqlens, key_mask, rows, first_distance,
      last_distance, rng_state, max_seqlen, causal, dropout_p, softmax_scale, uniform_padding);
  const auto table_like = [&](const OptionalTensor& table) {
    return table ? like(*table) : torch::stable::new_empty(query, {0});
  };
  Tensor dquery = like(query), dkey = like(key), dvalue = like(value);
  Tensor dpos_key = table_like(pos_key), dpos_query = table_like(pos_query);
  p.out = const_cast<void*>(out.const_data_ptr());
  p.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.dout = view(dout);
  p.dquery = dquery.mutable_data_ptr();
  p.dkey = dkey.mutable_data_ptr();
  p.dvalue = dvalue.mutable_data_ptr();
  if (pos_key) p.dpos_key = dpos_key.mutable_data_ptr();
  if (pos_query) p.dpos_query = dpos_query.mutable_data_ptr();
  fastdeberta::cpu::backward(p, static_cast<int>(kernels));
  return {dquery, dkey, dvalue, dpos_key, dpos_query};
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
  const std::string options =
      "Tensor? cu_seqlens, Tensor? key_mask, Tensor? rows, int first_distance, int last_distance, "
      "Tensor? rng_state, int max_seqlen, bool causal, float dropout_p, float softmax_scale, "
      "bool uniform_padding, int kernels";
  const std::string inputs =
      "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, ";
  m.def(("attention_forward(" + inputs + options + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, " + inputs + "Tensor out, Tensor lse, " + options +
         ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("gemm_peak(bool bf16, int kernels=0) -> float");
}

// These take no tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastdeberta_C, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("gemm_peak", TORCH_BOX(&gemm_peak));
}

STABLE_TORCH_LIBRARY_IMPL(fastdeberta_C, CPU, m) {
  m.impl("dropout_keep", TORCH_BOX(&dropout_keep));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
