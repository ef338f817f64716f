// SPDX-License-Identifier: Apache-2.0
//
// Launchers: cut a call into work, start threads, and see to what no kernel touches (padding).
#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "call.h"
#include "convert.h"
#include "target.h"

namespace fastdeberta::cpu {

char* Scratch::reserve(size_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    data_ = nullptr, size_ = 0;
    const size_t size = round_up(static_cast<int64_t>(bytes), 4096);
    void* data = nullptr;
    if (posix_memalign(&data, 4096, size) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(data), size_ = size;
  }
  return data_;
}

void Scratch::trim() {
  if (size_ <= kKept) return;
  std::free(data_);
  data_ = nullptr, size_ = 0;
}

Scratch::~Scratch() { std::free(data_); }

Positions::Positions(const AttentionParams& params, int reach)
    : first_(params.first_distance), last_(params.last_distance) {
  // A group further than any distance occurs or matters: blocks of a group look that far.
  limit_ = std::min(reach, std::max(-first_, last_)) + kGroup;
  const int margin = 2 * kGroup;
  storage_.resize(2 * (limit_ + margin) + 1);
  for (size_t n = 0; n < storage_.size(); ++n) {
    const int distance = static_cast<int>(n) - limit_ - margin;
    storage_[n] = params.rows[std::clamp(distance, first_, last_) - first_];
    has_jumps_ |= n > 0 && storage_[n] - storage_[n - 1] > 1;
  }
  center_ = storage_.data() + limit_ + margin;
}

int Positions::most_rows(int distances) const {
  int most = 0;
  for (int low = -limit_ - distances; low <= limit_; ++low) {
    most = std::max(most, row(low + distances) - (row(low) & ~(kGroup - 1)) + 1);
  }
  return static_cast<int>(round_up(most, kGroup));
}

namespace {

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#ifdef FD_X86
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kAvx512Bf16);
  if (has_avx512) found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> found = supported_kernels();
  return found;
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

template <class F>
void parallel(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

// Kernels let every thread take what is left, so that threads of unequal speed end together.
void run_workers(Call& call, int64_t work, void (*worker)(Call&)) {
  call.next = 0;
  parallel(std::min<int64_t>(threads(), work), [&](int64_t) { worker(call); });
}

void find_sequences(Call& call) {
  const AttentionParams& p = call.p;
  call.sequences.resize(p.sequences);
  for (int64_t n = 0; n < p.sequences; ++n) {
    const int64_t start = p.cu_seqlens ? p.cu_seqlens[n] : n * p.max_seqlen;
    const int64_t end = p.cu_seqlens ? p.cu_seqlens[n + 1] : start + p.max_seqlen;
    Sequence& s = call.sequences[n];
    s = {start, static_cast<int>(end - start), 0, static_cast<int>(end - start)};
    if (p.key_mask) {
      const bool* mask = p.key_mask + start;
      while (s.end > 0 && !mask[s.end - 1]) --s.end;
      while (s.begin < s.end && !mask[s.begin]) ++s.begin;
    }
    call.longest = std::max(call.longest, s.aligned_length());
  }
}

// The sequences, the rows they read, and the packed tables.
Scratch& prepare(Call& call, const Kernels& kernels, bool backward) {
  const AttentionParams& p = call.p;
  find_sequences(call);
  static thread_local Scratch tables;
  if (!p.pos_key.data && !p.pos_query.data) return tables;
  call.positions = Positions(p, call.longest);
  // A group more than a band has, for vectors read whole at its end; and no multiple of a power of
  // two, or its rows would share cache sets.
  const int distances = std::min(kSuperM + kSuperN, 2 * call.longest);
  call.band_stride = call.positions.most_rows(distances) + kGroup;
  if (call.band_stride % 256 == 0) call.band_stride += kGroup;
  call.used_begin = round_down_to_group(call.positions.row(-call.longest));
  call.used_end = static_cast<int>(round_up(call.positions.row(call.longest) + 1, kGroup));

  const size_t bytes = kernels.table_bytes(call);
  char* data = tables.reserve((backward ? 4 : 2) * bytes);
  call.key_panels = data, call.query_panels = data + bytes;
  if (backward) call.key_rows = data + 2 * bytes, call.query_rows = data + 3 * bytes;
  parallel(p.heads, [&](int64_t head) { kernels.pack_tables(call, backward, head); });
  return tables;
}

template <class F>
void for_padding(const Call& call, const F& f) {
  const AttentionParams& p = call.p;
  if (!p.key_mask) return;
  parallel(p.sequences, [&](int64_t n) {
    const Sequence& s = call.sequences[n];
    for (int i = 0; i < s.length; ++i) {
      if (i < s.begin || i >= s.end) f(s.start + i);
    }
  });
}

// Masked queries average all values of their sequence: a row that no kernel needs to see.
template <class S>
void uniform_rows(const Call& call) {
  const AttentionParams& p = call.p;
  if (!p.uniform_padding) return;
  parallel(p.sequences * p.heads, [&](int64_t unit) {
    const int64_t n = unit / p.heads, head = unit % p.heads;
    const Sequence& s = call.sequences[n];
    const bool* mask = p.key_mask + s.start;
    if (std::all_of(mask, mask + s.length, [](bool attend) { return attend; })) return;
    const S* values = static_cast<const S*>(p.value.data) + head * p.value.head_stride;
    std::vector<float> line(p.head_dim), total(p.head_dim);
    const float scale = p.keep_scale / static_cast<float>(s.length);
    const auto average = [&](const auto& counts) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int j = 0; j < s.length; ++j) {
        if (!counts(j)) continue;
        to_float(values + (s.start + j) * p.value.stride, line.data(), p.head_dim);
        for (int d = 0; d < p.head_dim; ++d) total[d] += line[d];
      }
      for (float& x : total) x *= scale;
    };
    const auto rule = dropout_rule(p);
    if (!rule) average([](int) { return true; });
    for (int i = 0; i < s.length; ++i) {
      if (mask[i]) continue;
      if (rule) average([&](int j) { return rule->keeps(static_cast<uint32_t>(unit), i, j); });
      from_float(total.data(),
                 static_cast<S*>(p.out) + ((s.start + i) * p.heads + head) * p.head_dim,
                 p.head_dim);
    }
  });
}

// dvalue += what uniform rows pass back.
template <class S>
void uniform_rows_backward(const Call& call) {
  const AttentionParams& p = call.p;
  if (!p.uniform_padding) return;
  parallel(p.sequences * p.heads, [&](int64_t unit) {
    const int64_t n = unit / p.heads, head = unit % p.heads;
    const Sequence& s = call.sequences[n];
    const bool* mask = p.key_mask + s.start;
    if (std::all_of(mask, mask + s.length, [](bool attend) { return attend; })) return;
    const S* douts = static_cast<const S*>(p.dout.data) + head * p.dout.head_stride;
    S* dvalues = static_cast<S*>(p.dvalue) + head * p.head_dim;
    const float scale = p.keep_scale / static_cast<float>(s.length);
    std::vector<float> line(p.head_dim), total(p.head_dim);
    const auto add = [&](const auto& counts) {
      for (int i = 0; i < s.length; ++i) {
        if (mask[i] || !counts(i)) continue;
        to_float(douts + (s.start + i) * p.dout.stride, line.data(), p.head_dim);
        for (int d = 0; d < p.head_dim; ++d) total[d] += line[d];
      }
    };
    const auto rule = dropout_rule(p);
    if (!rule) add([](int) { return true; });
    for (int j = 0; j < s.length; ++j) {
      if (rule) {
        std::fill(total.begin(), total.end(), 0.0f);
        add([&](int i) { return rule->keeps(static_cast<uint32_t>(unit), i, j); });
      }
      S* to = dvalues + (s.start + j) * p.heads * p.head_dim;
      to_float(to, line.data(), p.head_dim);
      for (int d = 0; d < p.head_dim; ++d) line[d] += total[d] * scale;
      from_float(line.data(), to, p.head_dim);
    }
  });
}

// Sums what several parts hold of elements begin to end - 1 of a result, in the parts' order.
template <class S>
void sum_shares(const float* shares, int64_t count, int64_t stride, int64_t begin, int64_t end,
                void* out) {
  constexpr int64_t kChunk = 4096;
  parallel((end - begin + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t first = begin + chunk * kChunk;
    for (int64_t n = first; n < std::min(end, first + kChunk); ++n) {
      float total = 0.0f;
      for (int64_t share = 0; share < count; ++share) total += shares[share * stride + n];
      from_float(total, static_cast<S*>(out) + n);
    }
  });
}

void cut_forward(Call& call) {
  // Smaller blocks where there is too little work for all threads.
  for (call.query_block = kSuperM;; call.query_block /= 2) {
    call.items.clear();
    for (size_t n = 0; n < call.sequences.size(); ++n) {
      const Sequence& s = call.sequences[n];
      for (int i = s.aligned_begin(); i < s.end; i += call.query_block) {
        call.items.push_back({static_cast<int>(n), i});
      }
    }
    const int64_t work = static_cast<int64_t>(call.items.size()) * call.p.heads;
    if (threads() == 1 || work >= 2 * threads() || call.query_block == kBlockM) return;
  }
}

void cut_backward(Call& call) {
  const AttentionParams& p = call.p;
  // A part holds gradients of whole tables: no more parts than keep the threads busy.
  const int64_t wanted =
      threads() == 1 ? 1 : (2 * threads() + p.heads - 1) / std::max<int64_t>(p.heads, 1);
  int64_t work = 0;
  for (const Sequence& s : call.sequences) {
    work += static_cast<int64_t>(s.end - s.begin) * (s.end - s.begin);
  }
  const int count = static_cast<int>(call.sequences.size());
  if (wanted > count && call.longest > kSuperN) {
    const int shares = static_cast<int>(
        std::min<int64_t>((wanted + count - 1) / count, round_up(call.longest, kSuperN) / kSuperN));
    for (int share = 0; share < shares; ++share) call.parts.push_back({0, count, share, shares});
    return;
  }
  // Whole sequences, of about equal work a part.
  int first = 0;
  int64_t done = 0;
  for (int n = 0; n < count; ++n) {
    const int64_t length = call.sequences[n].end - call.sequences[n].begin;
    done += length * length;
    const int64_t parts = static_cast<int64_t>(call.parts.size()) + 1;
    if (n + 1 == count || (done * wanted >= work * parts && parts < wanted)) {
      call.parts.push_back({first, n + 1, 0, 1});
      first = n + 1;
    }
  }
}

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kBFloat16:
      return f(Bf16());
    case Dtype::kFloat16:
      return f(Half());
  }
}

}  // namespace

int kernel_count() { return static_cast<int>(all_kernels().size()); }
const char* kernel_name(int index) { return all_kernels().at(index)->name; }

double gemm_peak(bool bf16, int kernels) {
  return all_kernels().at(kernels)->gemm_peak(bf16, 2000);
}

void forward(const AttentionParams& params, int kernels) {
  const Kernels& chosen = *all_kernels().at(kernels);
  Call call(params);
  Scratch& tables = prepare(call, chosen, false);
  cut_forward(call);
  run_workers(call, static_cast<int64_t>(call.items.size()) * params.heads, chosen.forward);
  with_dtype(params.dtype, [&](auto s) {
    using S = decltype(s);
    const int64_t width = params.heads * params.head_dim;
    for_padding(call, [&](int64_t token) {
      std::memset(static_cast<S*>(params.out) + token * width, 0, width * sizeof(S));
      for (int64_t head = 0; head < params.heads; ++head) {
        params.lse[head * params.tokens + token] = -INFINITY;
      }
    });
    uniform_rows<S>(call);
  });
  tables.trim();
}

void backward(const AttentionParams& params, int kernels) {
  const Kernels& chosen = *all_kernels().at(kernels);
  Call call(params);
  Scratch& tables = prepare(call, chosen, true);
  cut_backward(call);

  static thread_local Scratch shared;
  const int64_t width = params.heads * params.head_dim, table = params.table_rows * width;
  const int64_t parts = static_cast<int64_t>(call.parts.size());
  const int64_t shares = parts ? call.parts[0].shares : 1;
  const int64_t floats =
      (parts > 1 ? parts * 2 * table : 0) + (shares > 1 ? shares * params.tokens * width : 0);
  float* data = reinterpret_cast<float*>(shared.reserve(floats * sizeof(float)));
  if (parts > 1) call.dtables = data;
  if (shares > 1) call.dquery = data + parts * 2 * table;

  run_workers(call, parts * params.heads, chosen.backward);
  const int64_t used_begin = parts ? call.used_begin : 0;
  const int64_t used_end = parts ? std::min(call.used_end, params.table_rows) : 0;
  with_dtype(params.dtype, [&](auto s) {
    using S = decltype(s);
    for (void* gradient : {params.dpos_key, params.dpos_query}) {
      if (!gradient) continue;
      // Rows that no distance reads; all, if there is no sequence.
      S* rows = static_cast<S*>(gradient);
      std::memset(rows, 0, used_begin * width * sizeof(S));
      std::memset(rows + used_end * width, 0, (params.table_rows - used_end) * width * sizeof(S));
    }
    if (shares > 1) {
      sum_shares<S>(call.dquery, shares, params.tokens * width, 0, params.tokens * width,
                    params.dquery);
    }
    if (parts > 1 && params.pos_key.data) {
      sum_shares<S>(call.dtables, parts, 2 * table, used_begin * width, used_end * width,
                    params.dpos_key);
    }
    if (parts > 1 && params.pos_query.data) {
      sum_shares<S>(call.dtables + table, parts, 2 * table, used_begin * width, used_end * width,
                    params.dpos_query);
    }
    for_padding(call, [&](int64_t token) {
      for (void* gradient : {params.dquery, params.dkey, params.dvalue}) {
        std::memset(static_cast<S*>(gradient) + token * width, 0, width * sizeof(S));
      }
    });
    uniform_rows_backward<S>(call);
  });
  shared.trim();
  tables.trim();
}

}  // namespace fastdeberta::cpu
