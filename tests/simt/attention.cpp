// SPDX-License-Identifier: Apache-2.0
//
// Calls of the CUDA kernels, forward and backward, run by csrc/simt and held to plain loops in
// double precision: `attention` lists its cases, `attention CASE...` runs some. It exits with 3
// after a wrong result and with 4 where a launch fails. Every tensor is an allocation of exactly
// its size, so that ASan and valgrind see each access beyond.
#include "cuda/attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "philox.h"

using fastdeberta::AttentionParams;
using fastdeberta::Dtype;
using fastdeberta::HeadsView;

namespace {

constexpr double kInfinity = INFINITY;

enum class Mask { kNone, kRight, kLeft, kHoles, kLast };  // kLast: of the last sequence, all

struct Case {
  Case(
      const char* name, int head_dim, std::vector<int> lengths,
      const std::function<void(Case&)>& set = [](Case&) {})
      : name(name), head_dim(head_dim), lengths(lengths) {
    set(*this);
  }

  // As attention_kernels.cpp has them.
  Dtype dtype() const { return head_dim <= 64 ? Dtype::kFloat16 : Dtype::kBFloat16; }
  int table_rows() const { return 2 * reach / bucket + 1 + 2 * unused; }
  int row(int distance) const {
    return unused + (std::max(-reach, std::min(reach, distance)) + reach) / bucket;
  }

  const char* name;
  int head_dim;
  std::vector<int> lengths;  // all the same, unless packed
  int heads = 1;
  bool packed = false;
  bool c2p = true, p2c = true;
  // The tables have a row for each `bucket` distances from -reach to reach, and on either side
  // `unused` rows.
  int reach = 15, bucket = 1, unused = 0;
  Mask mask = Mask::kNone;
  bool causal = false, uniform = false, strided = false;
  double dropout_p = 0.0;
};

// A block of 64 queries, of 128 where a kernel takes that many, and tiles of 64 keys: of 200 tokens
// and a reach of 15 most tiles are far, on both sides. Dropout and more than 64 dimensions have
// small blocks.
const std::vector<Case> kCases = {
    // All tiles are near.
    {"near_32", 32, {150}, [](Case& c) { c.reach = 300, c.heads = 2; }},
    {"near_64", 64, {200}, [](Case& c) { c.reach = 300; }},
    {"near_96", 96, {130}, [](Case& c) { c.reach = 300; }},
    {"near_128", 128, {130}, [](Case& c) { c.reach = 300; }},
    {"short_32", 32, {50, 50}, [](Case& c) { c.heads = 2; }},
    {"short_64", 64, {64}},
    {"one_token", 64, {1, 1}},
    // Far tiles on both sides.
    {"far_32", 32, {200}, [](Case& c) { c.heads = 2; }},
    {"far_64", 64, {330}},
    {"far_96", 96, {200}},
    {"far_128", 128, {200}},
    {"buckets", 64, {300}, [](Case& c) { c.reach = 96, c.bucket = 4, c.unused = 1; }},
    {"edges", 32, {200}, [](Case& c) { c.reach = 2; }},  // one more, and a near tile were far
    {"one_row", 32, {140}, [](Case& c) { c.reach = 0; }},
    {"strided_64", 64, {70, 70}, [](Case& c) { c.strided = true, c.heads = 2; }},
    {"strided_96", 96, {130}, [](Case& c) { c.strided = true, c.heads = 2; }},
    // Terms.
    {"c2p_32", 32, {200}, [](Case& c) { c.p2c = false; }},
    {"p2c_64", 64, {200}, [](Case& c) { c.c2p = false; }},
    {"c2p_128", 128, {140}, [](Case& c) { c.p2c = false; }},
    {"p2c_96", 96, {140}, [](Case& c) { c.c2p = false; }},
    {"content_32", 32, {150}, [](Case& c) { c.c2p = c.p2c = false; }},
    {"content_64", 64, {60}, [](Case& c) { c.c2p = c.p2c = false, c.heads = 2; }},
    {"content_96", 96, {80}, [](Case& c) { c.c2p = c.p2c = false, c.dropout_p = 0.2; }},
    {"content_128",
     128,
     {100},
     [](Case& c) { c.c2p = c.p2c = false, c.causal = true, c.mask = Mask::kHoles; }},
    // Several sequences.
    {"packed_64", 64, {127, 0, 1, 63, 65, 0}, [](Case& c) { c.packed = true; }},
    {"packed_96", 96, {63, 0, 65, 1, 127}, [](Case& c) { c.packed = true, c.dropout_p = 0.1; }},
    {"packed_causal",
     32,
     {0, 65, 63, 127, 1},
     [](Case& c) { c.packed = c.causal = true, c.mask = Mask::kHoles, c.heads = 2; }},
    {"packed_empty", 64, {0, 0}, [](Case& c) { c.packed = true; }},
    // Masks.
    {"right_32", 32, {150, 150}, [](Case& c) { c.mask = Mask::kRight; }},
    {"left_64", 64, {150, 150}, [](Case& c) { c.mask = Mask::kLeft; }},
    {"holes_96", 96, {130, 130}, [](Case& c) { c.mask = Mask::kHoles; }},
    {"nothing_32", 32, {100, 100}, [](Case& c) { c.mask = Mask::kLast; }},
    {"nothing_64", 64, {70}, [](Case& c) { c.mask = Mask::kLast; }},
    {"nothing_128", 128, {70, 70}, [](Case& c) { c.mask = Mask::kLast; }},
    {"causal_64", 64, {200}, [](Case& c) { c.causal = true; }},
    {"causal_96", 96, {200}, [](Case& c) { c.causal = true; }},
    {"causal_dropout",
     32,
     {140},
     [](Case& c) { c.causal = true, c.dropout_p = 0.2, c.mask = Mask::kLeft; }},
    {"uniform_right", 64, {150, 150}, [](Case& c) { c.uniform = true, c.mask = Mask::kRight; }},
    {"uniform_holes", 96, {150}, [](Case& c) { c.uniform = true, c.mask = Mask::kHoles; }},
    {"uniform_causal",
     32,
     {150},
     [](Case& c) { c.uniform = c.causal = true, c.mask = Mask::kHoles; }},
    // The first masked token is the last of a tile or block.
    {"right_edge", 32, {94}, [](Case& c) { c.mask = Mask::kRight; }},
    {"uniform_edge_64", 64, {190}, [](Case& c) { c.uniform = true, c.mask = Mask::kRight; }},
    {"uniform_edge_96", 96, {94}, [](Case& c) { c.uniform = true, c.mask = Mask::kRight; }},
    {"uniform_nothing", 32, {90, 90}, [](Case& c) { c.uniform = true, c.mask = Mask::kLast; }},
    {"uniform_dropout",
     64,
     {150},
     [](Case& c) { c.uniform = true, c.dropout_p = 0.2, c.mask = Mask::kLeft; }},
    {"dropout_32", 32, {70, 70}, [](Case& c) { c.dropout_p = 0.3, c.heads = 2; }},
    {"dropout_64", 64, {200}, [](Case& c) { c.dropout_p = 0.1; }},
    {"dropout_128", 128, {140}, [](Case& c) { c.dropout_p = 0.2; }},
    // For tools that take their time: two tiles with far ones, or with near ones alone.
    {"small_far",
     32,
     {70, 0, 66},
     [](Case& c) { c.packed = true, c.reach = 1, c.dropout_p = 0.2, c.mask = Mask::kHoles; }},
    {"small_near",
     32,
     {70},
     [](Case& c) { c.dropout_p = 0.2, c.uniform = true, c.mask = Mask::kRight; }},
    {"small_large_blocks", 32, {130}, [](Case& c) { c.reach = 1; }},
    {"small_wide_far", 96, {66}, [](Case& c) { c.reach = 1, c.dropout_p = 0.2; }},
    {"small_wide_near", 96, {66}, [](Case& c) { c.causal = true; }},
};

struct Random {
  uint64_t state;

  double operator()() {  // splitmix64, from -1 to 1
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return static_cast<double>((x ^ x >> 31) >> 11) * 0x1p-52 - 1.0;
  }
};

// Exactly `size` elements, nothing of which has been written.
template <class T>
class Array {
 public:
  explicit Array(size_t size) : data_(static_cast<T*>(std::malloc(size * sizeof(T)))), size_(size) {
#ifndef SIMT_VALGRIND
    if (size) std::memset(static_cast<void*>(data_), 0xFF, size * sizeof(T));  // NaN
#endif
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;

  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t n) { return data_[n]; }
  const T& operator[](size_t n) const { return data_[n]; }

 private:
  T* data_;
  size_t size_;
};

using Doubles = std::vector<double>;

double widen(__half x) { return __half2float(x); }
double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
double widen(float x) { return x; }

// A tensor of random numbers [tokens, heads, D], and the same numbers without gaps.
template <class T>
struct Input {
  Input(const Case& c, int tokens, uint64_t seed)
      : head_stride(c.head_dim + (c.strided ? 8 : 0)),
        stride(c.heads * head_stride + (c.strided ? 40 : 0)),
        data(tokens ? (tokens - 1) * stride + (c.heads - 1) * head_stride + c.head_dim : 0) {
    Random random{seed};
    for (int token = 0; token < tokens; ++token) {
      for (int head = 0; head < c.heads; ++head) {
        for (int d = 0; d < c.head_dim; ++d) {
          T& place = data[token * stride + head * head_stride + d];
          place = T(static_cast<float>(random()));
          values.push_back(widen(place));
        }
      }
    }
  }

  HeadsView view() { return {data.data(), stride, head_stride}; }

  int64_t head_stride, stride;
  Array<T> data;
  Doubles values;
};

struct Results {
  Doubles out, lse, dquery, dkey, dvalue, dpos_key, dpos_query;
};

struct Call {
  explicit Call(const Case& c) : starts{0} {
    for (int length : c.lengths) starts.push_back(starts.back() + length);
    attended.assign(starts.back(), true);
    for (size_t n = 0; n < c.lengths.size(); ++n) {
      const int length = c.lengths[n], padding = (length + static_cast<int>(n)) / 3;
      for (int i = 0; i < length; ++i) {
        attended[starts[n] + i] = c.mask == Mask::kRight   ? i < length - padding
                                  : c.mask == Mask::kLeft  ? i >= padding
                                  : c.mask == Mask::kHoles ? i % 5 != 1 && i != length - 1
                                  : c.mask == Mask::kLast  ? n + 1 < c.lengths.size()
                                                           : true;
      }
    }
  }

  std::vector<int> starts;
  std::vector<bool> attended;
  const int64_t rng_state[2] = {0x123456789ABCDEF, 77};
};

// By the definition, one score after another.
struct Truth {
  const Case& c;
  const Call& call;
  const Doubles &query, &key, &value, &pos_key, &pos_query, &dout;
  double scale;

  double dot(const Doubles& x, int64_t i, const Doubles& y, int64_t j, int head) const {
    const double* a = &x[(i * c.heads + head) * c.head_dim];
    const double* b = &y[(j * c.heads + head) * c.head_dim];
    double sum = 0.0;
    for (int d = 0; d < c.head_dim; ++d) sum += a[d] * b[d];
    return sum;
  }
  void add(Doubles& sums, int64_t i, double factor, const Doubles& x, int64_t j, int head) const {
    double* a = &sums[(i * c.heads + head) * c.head_dim];
    const double* b = &x[(j * c.heads + head) * c.head_dim];
    for (int d = 0; d < c.head_dim; ++d) a[d] += factor * b[d];
  }

  void query_row(Results& r, int sequence, int head, int i) const {
    const int start = call.starts[sequence], length = c.lengths[sequence], x = start + i;
    const fastdeberta::DropoutRule rule(call.rng_state,
                                        fastdeberta::DropoutRule::threshold_of(c.dropout_p));
    const bool real = call.attended[x];
    if (!real && !c.uniform) return;
    Doubles probs(length, 1.0 / length), keep(length, 1.0);
    if (real) {
      Doubles scores(length, -kInfinity);
      double highest = -kInfinity, sum = 0.0;
      for (int j = 0; j < length; ++j) {
        if (!call.attended[start + j] || (c.causal && j > i)) continue;
        const int row = c.row(i - j);
        scores[j] = dot(query, x, key, start + j, head);
        if (c.c2p) scores[j] += dot(query, x, pos_key, row, head);
        if (c.p2c) scores[j] += dot(key, start + j, pos_query, row, head);
        scores[j] *= scale;
        highest = std::max(highest, scores[j]);
      }
      for (double score : scores) sum += std::exp(score - highest);
      for (int j = 0; j < length; ++j) probs[j] = std::exp(scores[j] - highest) / sum;
      r.lse[head * call.starts.back() + x] = highest + std::log(sum);
    }
    for (int j = 0; j < length && c.dropout_p > 0.0; ++j) {
      keep[j] = rule.keeps(sequence * c.heads + head, i, j) ? 1.0 / (1.0 - c.dropout_p) : 0.0;
    }
    for (int j = 0; j < length; ++j) add(r.out, x, probs[j] * keep[j], value, start + j, head);
    const double delta = dot(dout, x, r.out, x, head);
    for (int j = 0; j < length; ++j) {
      if (probs[j] == 0.0) continue;
      const int y = start + j, row = c.row(i - j);
      add(r.dvalue, y, probs[j] * keep[j], dout, x, head);
      if (!real) continue;
      const double gradient = probs[j] * (keep[j] * dot(dout, x, value, y, head) - delta) * scale;
      add(r.dquery, x, gradient, key, y, head);
      add(r.dkey, y, gradient, query, x, head);
      if (c.c2p) {
        add(r.dquery, x, gradient, pos_key, row, head);
        add(r.dpos_key, row, gradient, query, x, head);
      }
      if (c.p2c) {
        add(r.dkey, y, gradient, pos_query, row, head);
        add(r.dpos_query, row, gradient, key, y, head);
      }
    }
  }

  Results results() const {
    const size_t table = c.table_rows() * c.heads * c.head_dim;
    const Doubles zeros(query.size(), 0.0);
    Results r{zeros, {}, zeros, zeros, zeros, Doubles(table), Doubles(table)};
    r.lse.assign(call.starts.back() * c.heads, -kInfinity);
    for (size_t n = 0; n < c.lengths.size(); ++n) {
      for (int head = 0; head < c.heads; ++head) {
        for (int i = 0; i < c.lengths[n]; ++i) query_row(r, static_cast<int>(n), head, i);
      }
    }
    return r;
  }
};

// The largest error, relative to the largest value (some that should be zero are rounding errors);
// infinite where there is a NaN, or an infinity in the wrong place.
template <class T>
double error(const Array<T>& ours, const Doubles& truth) {
  double worst = 0.0, largest = 0.05;
  for (size_t n = 0; n < ours.size(); ++n) {
    const double x = widen(ours[n]);
    if (x == truth[n]) continue;
    const double difference = std::abs(x - truth[n]);
    worst = difference <= worst ? worst : std::isnan(difference) ? kInfinity : difference;
    if (std::isfinite(truth[n])) largest = std::max(largest, std::abs(truth[n]));
  }
  return worst / largest;
}

template <class T>
bool run(const Case& c) {
  const Call call(c);
  const int tokens = call.starts.back();
  Input<T> query(c, tokens, 1), key(c, tokens, 2), value(c, tokens, 3), dout(c, tokens, 4);
  Input<T> pos_key(c, c.table_rows(), 5), pos_query(c, c.table_rows(), 6);

  Array<int32_t> cu_seqlens(c.lengths.size() + 1), rows(2 * c.reach + 1);
  for (size_t n = 0; n < cu_seqlens.size(); ++n) cu_seqlens[n] = call.starts[n];
  for (int n = 0; n <= 2 * c.reach; ++n) rows[n] = c.row(n - c.reach);
  Array<bool> key_mask(tokens);
  for (int n = 0; n < tokens; ++n) key_mask[n] = call.attended[n];
  Array<int64_t> rng_state(2);
  for (int n = 0; n < 2; ++n) rng_state[n] = call.rng_state[n];

  const size_t size = static_cast<size_t>(tokens) * c.heads * c.head_dim;
  const size_t table = static_cast<size_t>(c.table_rows()) * c.heads * c.head_dim;
  Array<T> out(size), dquery(size), dkey(size), dvalue(size);
  Array<T> dpos_key(c.c2p ? table : 0), dpos_query(c.p2c ? table : 0);
  Array<float> lse(static_cast<size_t>(c.heads) * tokens);

  AttentionParams p{};
  p.dtype = c.dtype();
  p.tokens = tokens, p.heads = c.heads, p.head_dim = c.head_dim;
  p.query = query.view(), p.key = key.view(), p.value = value.view();
  if (c.c2p) p.pos_key = pos_key.view();
  if (c.p2c) p.pos_query = pos_query.view();
  if (c.c2p || c.p2c) {
    p.table_rows = c.table_rows();
    p.rows = rows.data(), p.first_distance = -c.reach, p.last_distance = c.reach;
  }
  if (c.packed) p.cu_seqlens = cu_seqlens.data();
  p.sequences = static_cast<int64_t>(c.lengths.size());
  for (int length : c.lengths) p.max_seqlen = std::max<int64_t>(p.max_seqlen, length);
  if (c.mask != Mask::kNone) p.key_mask = key_mask.data();
  if (c.dropout_p > 0.0) p.rng_state = rng_state.data();
  p.dropout_threshold = fastdeberta::DropoutRule::threshold_of(c.dropout_p);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - c.dropout_p));
  p.softmax_scale = 1.f / std::sqrt(static_cast<float>(c.head_dim * (1 + c.c2p + c.p2c)));
  p.causal = c.causal, p.uniform_padding = c.uniform;
  p.out = out.data(), p.lse = lse.data();
  p.dout = dout.view();
  p.dquery = dquery.data(), p.dkey = dkey.data(), p.dvalue = dvalue.data();
  if (c.c2p) p.dpos_key = dpos_key.data();
  if (c.p2c) p.dpos_query = dpos_query.data();

  fastdeberta::cuda::forward(p, nullptr);
  Array<float> workspace(fastdeberta::cuda::backward_workspace(p));
  fastdeberta::cuda::backward(p, workspace.data(), nullptr);

  const Results truth = Truth{c,
                              call,
                              query.values,
                              key.values,
                              value.values,
                              pos_key.values,
                              pos_query.values,
                              dout.values,
                              p.softmax_scale}
                            .results();
  const struct {
    const char* name;
    double error;
  } errors[] = {{"out", error(out, truth.out)},
                {"lse", error(lse, truth.lse)},
                {"dquery", error(dquery, truth.dquery)},
                {"dkey", error(dkey, truth.dkey)},
                {"dvalue", error(dvalue, truth.dvalue)},
                {"dpos_key", error(dpos_key, truth.dpos_key)},
                {"dpos_query", error(dpos_query, truth.dpos_query)}};
  const double tolerance = std::is_same_v<T, __half> ? 4e-3 : 3e-2;
  std::string wrong;
  for (const auto& [name, error] : errors) {
    if (error > tolerance) wrong += std::string(" ") + name + " by " + std::to_string(error);
  }
  std::printf("%s: %s%s\n", c.name, wrong.empty() ? "right" : "wrong:", wrong.c_str());
  return wrong.empty();
}

}  // namespace

int main(int count, char** names) {
  int status = 0;
  for (const Case& c : kCases) {
    if (count == 1) std::puts(c.name);
  }
  for (int n = 1; n < count; ++n) {
    const Case* found = nullptr;
    for (const Case& c : kCases) {
      if (!std::strcmp(c.name, names[n])) found = &c;
    }
    if (!found) {
      std::printf("there is no case %s\n", names[n]);
      return 2;
    }
    try {
      const bool half = found->dtype() == Dtype::kFloat16;
      if (!(half ? run<__half>(*found) : run<__nv_bfloat16>(*found))) status = 3;
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", found->name, error.what());
      return 4;
    }
  }
  return status;
}
