// SPDX-License-Identifier: Apache-2.0
//
// What the bindings of all libraries share: tensors -> AttentionParams, and the operators' schemas.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

#include "attention.h"
#include "philox.h"

namespace fastdeberta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline HeadsView view(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1),
                  "tensors must be [T, H, D] or [rows, H, D] with a contiguous last dimension");
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

inline AttentionParams attention_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pos_key,
    const OptionalTensor& pos_query, const OptionalTensor& cu_seqlens,
    const OptionalTensor& key_mask, const OptionalTensor& rows, int64_t first_distance,
    int64_t last_distance, const OptionalTensor& rng_state, int64_t max_seqlen, bool causal,
    double dropout_p, double softmax_scale, bool uniform_padding) {
  AttentionParams p{};
  switch (query.scalar_type()) {
    case ScalarType::Float:
      p.dtype = Dtype::kFloat32;
      break;
    case ScalarType::BFloat16:
      p.dtype = Dtype::kBFloat16;
      break;
    case ScalarType::Half:
      p.dtype = Dtype::kFloat16;
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
  if (!rng_state) dropout_p = 0.0;
  p.dropout_threshold = DropoutRule::threshold_of(dropout_p);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = causal, p.uniform_padding = uniform_padding;
  return p;
}

inline Tensor like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

// kLaunch(params, query, extra...): the library's own launcher and its own arguments, if any.
template <auto kLaunch, class... Extra>
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pos_key,
    const OptionalTensor& pos_query, const OptionalTensor& cu_seqlens,
    const OptionalTensor& key_mask, const OptionalTensor& rows, int64_t first_distance,
    int64_t last_distance, const OptionalTensor& rng_state, int64_t max_seqlen, bool causal,
    double dropout_p, double softmax_scale, bool uniform_padding, Extra... extra) {
  AttentionParams p = attention_params(query, key, value, pos_key, pos_query, cu_seqlens, key_mask,
                                       rows, first_distance, last_distance, rng_state, max_seqlen,
                                       causal, dropout_p, softmax_scale, uniform_padding);
  Tensor out = like(query);
  Tensor lse = torch::stable::new_empty(query, {p.heads, p.tokens}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  kLaunch(p, query, extra...);
  return {out, lse};
}

// Gradients of query, key, value, pos_key and pos_query, the last two empty where these are absent.
template <auto kLaunch, class... Extra>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& pos_key, const OptionalTensor& pos_query, const Tensor& out,
    const Tensor& lse, const OptionalTensor& cu_seqlens, const OptionalTensor& key_mask,
    const OptionalTensor& rows, int64_t first_distance, int64_t last_distance,
    const OptionalTensor& rng_state, int64_t max_seqlen, bool causal, double dropout_p,
    double softmax_scale, bool uniform_padding, Extra... extra) {
  AttentionParams p = attention_params(query, key, value, pos_key, pos_query, cu_seqlens, key_mask,
                                       rows, first_distance, last_distance, rng_state, max_seqlen,
                                       causal, dropout_p, softmax_scale, uniform_padding);
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
  kLaunch(p, query, extra...);
  return {dquery, dkey, dvalue, dpos_key, dpos_query};
}

// extra: the schema of the library's own arguments, each after a comma.
inline std::string attention_schema(const std::string& start, const std::string& saved,
                                    const std::string& extra) {
  return start + "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query, " +
         saved +
         "Tensor? cu_seqlens, Tensor? key_mask, Tensor? rows, int first_distance, "
         "int last_distance, Tensor? rng_state, int max_seqlen, bool causal, float dropout_p, "
         "float softmax_scale, bool uniform_padding" +
         extra + ")";
}

inline std::string forward_schema(const std::string& extra = "") {
  return attention_schema("attention_forward(", "", extra) + " -> (Tensor, Tensor)";
}

inline std::string backward_schema(const std::string& extra = "") {
  return attention_schema("attention_backward(Tensor dout, ", "Tensor out, Tensor lse, ", extra) +
         " -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
}

}  // namespace fastdeberta
