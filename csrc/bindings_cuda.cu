// SPDX-License-Identifier: Apache-2.0
//
// Operators of the CUDA library. Compiled for the CPU, they run the same kernels under csrc/simt.
#include <torch/headeronly/version.h>

#include <sstream>

#include "bindings.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTDEBERTA_LIBRARY fastdeberta_C_cuda
#define FASTDEBERTA_DEVICE CUDA
#else
#define FASTDEBERTA_LIBRARY fastdeberta_C_simt
#define FASTDEBERTA_DEVICE CPU
#endif

#include "cuda/attention.h"

namespace {

using fastdeberta::AttentionParams;
using torch::stable::Tensor;

#ifdef __CUDACC__

// Makes a tensor's device the current one, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#else

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#endif

void check(const AttentionParams& p) {
  STD_TORCH_CHECK(p.dtype != fastdeberta::Dtype::kFloat32, "query must be bfloat16 or float16");
  STD_TORCH_CHECK(fastdeberta::cuda::shared_memory(p.head_dim, false, false),
                  "head_dim must be 32, 64, 96 or 128, got ", p.head_dim);
  for (const fastdeberta::HeadsView& x :
       {p.query, p.key, p.value, p.pos_key, p.pos_query, p.dout}) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0 &&
                        x.head_stride % 8 == 0,
                    "rows must lie on 16-byte boundaries");
  }
}

void forward(const AttentionParams& params, const Tensor& query) {
  check(params);
  const OnDevice device(query);
  fastdeberta::cuda::forward(params, device.stream());
}

void backward(const AttentionParams& params, const Tensor& query) {
  check(params);
  const OnDevice device(query);
  Tensor workspace = torch::stable::new_empty(
      query, {fastdeberta::cuda::backward_workspace(params)}, torch::headeronly::ScalarType::Float);
  fastdeberta::cuda::backward(params, workspace.mutable_data_ptr<float>(), device.stream());
}

int64_t shared_memory(int64_t head_dim, bool positions, bool backward) {
  return fastdeberta::cuda::shared_memory(static_cast<int>(head_dim), positions, backward);
}

// JSON, for `fastdeberta info`.
std::string build_info() {
  std::ostringstream json;
  json << "{\"torch_built_with\": \"" << TORCH_VERSION << "\"";
#ifdef __CUDACC__
  json << ", \"nvcc\": \"" << __CUDACC_VER_MAJOR__ << "." << __CUDACC_VER_MINOR__
       << "\", \"architectures\": [";
  const char* comma = "";
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    json << comma << "\"sm_" << architecture / 10 << "\"";
    comma = ", ";
  }
  json << "]";
#endif
  json << "}";
  return json.str();
}

}  // namespace

STABLE_TORCH_LIBRARY(FASTDEBERTA_LIBRARY, m) {
  m.def(fastdeberta::forward_schema().c_str());
  m.def(fastdeberta::backward_schema().c_str());
  m.def("build_info() -> str");
  m.def("shared_memory(int head_dim, bool positions, bool backward) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(FASTDEBERTA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("shared_memory", TORCH_BOX(&shared_memory));
}

STABLE_TORCH_LIBRARY_IMPL(FASTDEBERTA_LIBRARY, FASTDEBERTA_DEVICE, m) {
  m.impl("attention_forward", TORCH_BOX((&fastdeberta::attention_forward<forward>)));
  m.impl("attention_backward", TORCH_BOX((&fastdeberta::attention_backward<backward>)));
}
