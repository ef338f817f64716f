// SPDX-License-Identifier: Apache-2.0
//
// What the launchers of csrc/cuda start for a call, on a GPU that need not be there: no kernel
// runs.
//
//   cuda_launches TERMS DROPOUT DTYPE HEAD_DIM BATCH HEADS LENGTH MULTIPROCESSORS SHARED_BYTES
//
// TERMS: position terms, 0 or 2; DTYPE: bfloat16 or float16; SHARED_BYTES: of a multiprocessor.
// stdin: the table of rows by distance, as first distance, last distance and the rows between.
// Prints, one a line:
//
//   launch FORWARD_OR_BACKWARD KERNEL BLOCKS THREADS SHARED_BYTES
//   tiles SIDE ROWS NEAR FAR RUNS BANDS     of all blocks of one sequence and head with so many
//   rows workspace DELTA_AND_SHIFT FAR NEAR      float32 elements
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/cuda/launch.cuh"
#include "../csrc/cuda/table.cuh"
#include "../csrc/cuda/workspace.h"

namespace fastdeberta::cuda {

Device modelled_device;
const char* pass;
Workspace workspace_seen;

void see(const AttentionParams&) {}
void see(const AttentionParams&, const Workspace& w) { workspace_seen = w; }

template <class... Parameters, class... Arguments>
void record(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int shared_bytes, void*, const Arguments&... arguments) {
  see(arguments...);
  Dl_info symbol;
  if (!dladdr(reinterpret_cast<void*>(kernel), &symbol) || !symbol.dli_sname) {
    throw std::runtime_error(std::string(name) + " has no symbol: link with -rdynamic");
  }
  std::printf("launch %s %s %lld %d %d\n", pass, symbol.dli_sname, static_cast<long long>(blocks),
              threads, shared_bytes);
}

}  // namespace fastdeberta::cuda

// The launchers below ask this device, and tell instead of launching.
#define device() modelled_device
#define launch(...) record(__VA_ARGS__)
#include "../csrc/cuda/attention.cu"
#include "../csrc/cuda/backward_bfloat16.cu"
#include "../csrc/cuda/backward_half.cu"
#include "../csrc/cuda/forward_bfloat16.cu"
#include "../csrc/cuda/forward_half.cu"

namespace {

using namespace fastdeberta;

void print_tiles(const AttentionParams& p, cuda::Side side, int block) {
  const int length = static_cast<int>(p.max_seqlen);
  const int end = (length + cuda::kBlockN - 1) / cuda::kBlockN;
  long near = 0, far = 0, runs = 0, bands = 0;
  for (int x0 = 0; x0 < length; x0 += block) {
    cuda::TileRanges r = {0, 0, end};
    if (p.rows) r = cuda::tile_ranges(cuda::Rows(p, side), x0, block, end);
    near += r.far - r.near;
    far += r.near + r.end - r.far;
    runs += (r.near > 0) + (r.far > r.near) + (r.end > r.far);
    bands += r.far > r.near;
  }
  std::printf("tiles %s %d %ld %ld %ld %ld\n", side == cuda::Side::kKey ? "keys" : "queries", block,
              near, far, runs, bands);
}

}  // namespace

int main(int count, char** words) {
  if (count != 10) return std::fputs("see the head of cuda_launches.cpp\n", stderr), 2;
  AttentionParams p{};
  std::vector<int32_t> rows;
  if (std::scanf("%d %d", &p.first_distance, &p.last_distance) != 2) return 2;
  for (int row; std::scanf("%d", &row) == 1;) rows.push_back(row);
  const bool terms = std::atoi(words[1]), dropout = std::atoi(words[2]);
  p.dtype = std::strcmp(words[3], "float16") ? Dtype::kBFloat16 : Dtype::kFloat16;
  p.head_dim = std::atoi(words[4]);
  p.sequences = std::atoi(words[5]);
  p.heads = std::atoi(words[6]);
  p.max_seqlen = std::atoi(words[7]);
  p.tokens = p.sequences * p.max_seqlen;
  p.table_rows = rows.back() + 1;
  cuda::modelled_device = {std::atoi(words[8]), std::atoi(words[9])};
  const int64_t seed[2] = {};
  p.rng_state = dropout ? seed : nullptr;
  if (terms) {
    p.rows = rows.data();
    p.pos_key.data = p.pos_query.data = &p;  // only whether there is one is looked at
  }
  cuda::pass = "forward";
  cuda::forward(p, nullptr);
  cuda::pass = "backward";
  std::vector<float> buffer(1);
  cuda::backward(p, buffer.data(), nullptr);
  for (int block : {64, 128}) print_tiles(p, cuda::Side::kQuery, block);
  print_tiles(p, cuda::Side::kKey, 64);
  const cuda::Workspace& w = cuda::workspace_seen;
  const int64_t delta = 2 * p.heads * p.tokens;
  const int64_t far = w.far ? 4 * p.heads * w.tiles * p.head_dim : 0;
  std::printf("workspace %lld %lld %lld\n", static_cast<long long>(delta),
              static_cast<long long>(far), static_cast<long long>(w.size - delta - far));
}
