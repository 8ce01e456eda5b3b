// The library's only contact with Torch (its stable ABI): argument checks, dispatch over instances.def, registration.
// Schemas are defined in Python; what is registered here are their CUDA implementations.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backward/delta.h"
#include "build_info.h"
#include "forward/forward.h"
#include "params.h"

// NOTE: exists only in a Torch with CUDA; weak, so that the library loads everywhere. It resolves only because the
// link names libtorch under --no-as-needed.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define FA3_CHECK(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
  text << ')';
  return text.str();
}

bool same_shape(const Tensor& a, const std::vector<int64_t>& shape) {
  if (a.dim() != static_cast<int64_t>(shape.size())) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != shape[dim]) return false;
  }
  return true;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes[dim] = tensor.size(dim);
  return sizes;
}

// Our dtype of a tensor, or nothing for one that no kernel takes.
std::optional<fa3::DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return fa3::DType::bf16;
    case ScalarType::Half:
      return fa3::DType::fp16;
    case ScalarType::Float:
      return fa3::DType::fp32;
    default:
      return std::nullopt;
  }
}

// Stride of a dim; 0 where the dim has one element, whose stride means nothing.
int64_t stride_of(const Tensor& tensor, int64_t dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; }

// Strides of a (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim) tensor.
fa3::Strides row_strides(const Tensor& tensor) {
  const int64_t packed = tensor.dim() == 3;
  // NOTE: head_dim alone keeps its stride when it has one element: vector loads ask whether it is 1.
  return {packed ? 0 : stride_of(tensor, 0), stride_of(tensor, 1 - packed), stride_of(tensor, 2 - packed),
          tensor.stride(3 - packed)};
}

cudaStream_t current_stream(int32_t device_index) {
  FA3_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
            "fa3_dist: this PyTorch has no CUDA streams (aoti_torch_get_current_cuda_stream is missing); install a "
            "PyTorch build with CUDA, or rebuild the library against it with 'make kernels'");
  void* stream = nullptr;
  FA3_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
            "fa3_dist: PyTorch gave no current CUDA stream for device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* kernel) {
  FA3_CHECK(error == cudaSuccess, "fa3_dist: launching ", kernel, " failed: ", cudaGetErrorString(error),
            " (the kernels are compiled for compute capability 9.0a: Hopper)");
}

using DeltaLauncher = cudaError_t (*)(const fa3::DeltaParams&, cudaStream_t);

DeltaLauncher find_delta([[maybe_unused]] fa3::DType dout) {
#define FA3_DELTA(kind, dtype) \
  if (dout == fa3::DType::dtype) return fa3::launch_delta<fa3::DType::dtype>;
#include <instances.def>  // NOTE: in angle brackets: the build's own copy, which holds the rows that it compiles
  return nullptr;
}

// delta = rowsum(dout * out) - dlse, fp32.
// dout, out: (B, S, H, Dv) -> (B, H, S), or packed (T, H, Dv) -> (H, T); any strides. dlse: the result's shape, fp32.
Tensor delta_sm90(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse) {
  const bool packed = dout.dim() == 3;
  FA3_CHECK(packed || dout.dim() == 4, "delta: dout must have shape (batch, seqlen, heads, head_dim) or ",
            "(tokens, heads, head_dim), got ", shape_of(dout));
  FA3_CHECK(same_shape(out, sizes_of(dout)), "delta: out must have dout's shape ", shape_of(dout), ", got ",
            shape_of(out));
  FA3_CHECK(dout.is_cuda() && out.is_cuda() && dout.get_device_index() == out.get_device_index(),
            "delta: dout and out must be on the same CUDA device");

  const auto dout_dtype = dtype_of(dout);
  const auto out_dtype = dtype_of(out);
  const DeltaLauncher launch = dout_dtype ? find_delta(*dout_dtype) : nullptr;
  FA3_CHECK(launch != nullptr, "delta: this library has no kernel for dout's dtype; 'python -m fa3_dist doctor' lists "
            "its variants");
  FA3_CHECK(out_dtype, "delta: out must be bfloat16, float16 or float32; convert it");

  const int64_t batch = packed ? 1 : dout.size(0);
  const int64_t seqlen = dout.size(1 - packed);
  const int64_t heads = dout.size(2 - packed);
  std::vector<int64_t> result_shape{heads, seqlen};
  if (!packed) result_shape.insert(result_shape.begin(), batch);
  if (dlse) {
    FA3_CHECK(same_shape(*dlse, result_shape), "delta: dlse must have the result's shape ",
              packed ? "(heads, tokens)" : "(batch, heads, seqlen)", " for dout of shape ", shape_of(dout), ", got ",
              shape_of(*dlse));
    FA3_CHECK(dlse->scalar_type() == ScalarType::Float, "delta: dlse must be float32");
    FA3_CHECK(dlse->is_cuda() && dlse->get_device_index() == dout.get_device_index(),
              "delta: dlse must be on dout's device");
  }

  const torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  Tensor delta = torch::stable::new_empty(dout, result_shape, ScalarType::Float);
  if (batch * seqlen * heads == 0) return delta;

  fa3::DeltaParams params{};
  params.dout = dout.const_data_ptr();
  params.out = out.const_data_ptr();
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  params.dout_stride = row_strides(dout);
  params.out_stride = row_strides(out);
  if (dlse) {
    params.dlse = static_cast<const float*>(dlse->const_data_ptr());
    params.dlse_stride = {packed ? 0 : stride_of(*dlse, 0), stride_of(*dlse, 2 - packed), stride_of(*dlse, 1 - packed),
                          0};
  }
  params.batch = batch;
  params.seqlen = seqlen;
  params.heads = heads;
  params.head_dim = dout.size(3 - packed);
  params.out_dtype = *out_dtype;
  check_launch(launch(params, current_stream(dout.get_device_index())), "delta");
  return delta;
}

using ForwardLauncher = cudaError_t (*)(const fa3::ForwardParams&, cudaStream_t);

// The kernel of the smallest head dims in the list that hold these, or nullptr.
ForwardLauncher find_forward([[maybe_unused]] fa3::DType wanted, [[maybe_unused]] int64_t wanted_dim,
                             [[maybe_unused]] int64_t wanted_dim_v) {
  ForwardLauncher found = nullptr;
  [[maybe_unused]] int64_t found_size = std::numeric_limits<int64_t>::max();
#define FA3_FORWARD(kind, dtype, dim, dim_v)                                                           \
  if (wanted == fa3::DType::dtype && wanted_dim <= dim && wanted_dim_v <= dim_v && dim + dim_v < found_size) { \
    found = fa3::launch_forward<fa3::DType::dtype, dim, dim_v>;                                        \
    found_size = dim + dim_v;                                                                          \
  }
#include <instances.def>
  return found;
}

// Strides of a dense tensor, checked for what the copy engine can address.
fa3::Strides mapped_strides(const char* name, const Tensor& tensor) {
  const fa3::Strides strides = row_strides(tensor);
  bool fits = strides.head_dim == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  const int64_t outer[3] = {strides.batch, strides.seqlen, strides.heads};
  for (int dim = 0; dim < 3; ++dim) {
    fits = fits && outer[dim] * 2 % 16 == 0 && outer[dim] >= 0 && (outer[dim] > 0 || tensor.size(dim) == 1);
  }
  FA3_CHECK(fits, "forward: ", name, " must have a contiguous head_dim, 16-byte aligned rows and strides above 0; pass ",
            name, ".contiguous()");
  return strides;
}

// out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) of q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv).
std::tuple<Tensor, Tensor> forward_sm90(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_start,
    const std::optional<Tensor>& q_len, const std::optional<Tensor>& k_start, const std::optional<Tensor>& k_len,
    const std::optional<Tensor>& offsets, std::optional<int64_t> offset, double softmax_scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
    std::optional<ScalarType> out_dtype, bool /* deterministic: it always is */, int64_t sm_margin) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;
  FA3_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "forward: q, k and v must have shape (batch, seqlen, heads, "
            "head_dim), got ", shape_of(q), ", ", shape_of(k), " and ", shape_of(v));
  FA3_CHECK(!q_start && !q_len && !k_start && !k_len && !offsets, "forward: this kernel takes dense batches with one "
            "offset; q_start, q_len, k_start, k_len and offsets must be None");
  FA3_CHECK(softcap == 0.0, "forward: this kernel has no softcap, got ", softcap);
  FA3_CHECK(!out_dtype || *out_dtype == q.scalar_type(), "forward: this kernel gives out in the dtype of q");
  const int64_t batch = q.size(0), seqlen_q = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t seqlen_k = k.size(1), kv_heads = k.size(2), head_dim_v = v.size(3);
  FA3_CHECK(same_shape(k, {batch, seqlen_k, kv_heads, head_dim}), "forward: k must have shape (batch, seqlen_k, kv_heads, "
            "head_dim) to go with q ", shape_of(q), ", got ", shape_of(k));
  FA3_CHECK(same_shape(v, {batch, seqlen_k, kv_heads, head_dim_v}), "forward: v must have shape (batch, seqlen_k, "
            "kv_heads, head_dim_v) to go with k ", shape_of(k), ", got ", shape_of(v));
  FA3_CHECK(kv_heads > 0 && heads % kv_heads == 0, "forward: the heads of q, ", heads, ", must be a multiple of those of "
            "k, ", kv_heads);
  FA3_CHECK(head_dim % 8 == 0 && head_dim_v % 8 == 0, "forward: head dims must be multiples of 8, got ", head_dim, " and ",
            head_dim_v);
  FA3_CHECK(std::max(seqlen_q, seqlen_k) <= kMaxExtent && heads * batch <= kMaxExtent, "forward: sequences and batch * "
            "heads may reach ", kMaxExtent);
  for (const Tensor& tensor : {q, k, v}) {
    FA3_CHECK(tensor.is_cuda() && tensor.get_device_index() == q.get_device_index() &&
              tensor.scalar_type() == q.scalar_type(), "forward: q, k and v must share a CUDA device and a dtype");
  }
  const auto dtype = dtype_of(q);
  const ForwardLauncher launch = dtype ? find_forward(*dtype, head_dim, head_dim_v) : nullptr;
  FA3_CHECK(launch != nullptr, "forward: this library has no kernel for q's dtype and head dims ", head_dim, " and ",
            head_dim_v, "; 'python -m fa3_dist doctor' lists its variants");

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = torch::stable::new_empty(q, {batch, seqlen_q, heads, head_dim_v});
  Tensor lse = torch::stable::new_empty(q, {batch, heads, seqlen_q}, ScalarType::Float);
  if (batch * seqlen_q * heads == 0) return {out, lse};
  if (seqlen_k == 0) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  Tensor tile_counter = torch::stable::new_empty(q, {1}, ScalarType::Int);

  fa3::ForwardParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.tile_counter = static_cast<int32_t*>(tile_counter.mutable_data_ptr());
  params.q_stride = mapped_strides("q", q);
  params.k_stride = mapped_strides("k", k);
  params.v_stride = mapped_strides("v", v);
  params.batch = static_cast<int32_t>(batch);
  params.seqlen_q = static_cast<int32_t>(seqlen_q);
  params.seqlen_k = static_cast<int32_t>(seqlen_k);
  params.heads = static_cast<int32_t>(heads);
  params.kv_heads = static_cast<int32_t>(kv_heads);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.head_dim_v = static_cast<int32_t>(head_dim_v);
  // Query i sees [i + shift - window_left, i + shift + window_right]; past these limits a diagonal hides all or nothing.
  const int64_t shift = offset.value_or(seqlen_k - seqlen_q);
  const auto diagonal = [&](int64_t at) {
    return static_cast<int32_t>(std::clamp(at, -seqlen_q - seqlen_k, seqlen_q + seqlen_k));
  };
  const auto bounded = [](int64_t value) { return std::clamp<int64_t>(value, -(kMaxExtent << 4), kMaxExtent << 4); };
  params.first_diagonal = window_left ? diagonal(bounded(shift) - bounded(*window_left)) : diagonal(-seqlen_q);
  params.last_diagonal = window_right ? diagonal(bounded(shift) + bounded(*window_right)) : diagonal(seqlen_k);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.sm_margin = static_cast<int32_t>(std::clamp<int64_t>(sm_margin, 0, 1 << 20));
  check_launch(launch(params, current_stream(q.get_device_index())), "forward");
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3_dist, CUDA, m) {
  m.impl("forward_sm90", TORCH_BOX(&forward_sm90));
  m.impl("delta_sm90", TORCH_BOX(&delta_sm90));
}

// JSON: version, variants, csrc_hash, nvcc, cutlass. The string lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* fa3_dist_build_info() { return FA3_DIST_BUILD_INFO; }
