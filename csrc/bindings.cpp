// The library's only contact with Torch (its stable ABI): argument checks, dispatch over instances.def, registration.
// Schemas are defined in Python; what is registered here are their CUDA implementations.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backward/backward.h"
#include "backward/delta.h"
#include "build_info.h"
#include "forward/forward.h"
#include "forward/schedule.h"
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

// An uninitialised contiguous CUDA tensor beside `like`.
// NOTE: torch::stable::new_empty goes through the dispatcher, which takes longer than the allocation.
Tensor empty_like(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t dim = shape.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(shape[dim], 1);
  const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_int32();
  AtenTensorHandle handle = nullptr;
  FA3_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code,
                                     aoti_torch_device_type_cuda(), like.get_device_index(), &handle) == 0,
            "fa3_dist: PyTorch could not allocate a tensor of ", shape.size(), " dims on CUDA device ",
            like.get_device_index());
  return Tensor(handle);
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
  Tensor delta = empty_like(dout, result_shape, ScalarType::Float);
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

using BackwardLauncher = cudaError_t (*)(const fa3::BackwardParams&, cudaStream_t);

// A row of the backward: its kernel, and the head_dim of the rows that it sums dq up in.
struct BackwardKernel {
  BackwardLauncher launch = nullptr;
  int64_t head_dim = 0;
};

// The kernel of the smallest head dims in the list that hold these, if there is one.
BackwardKernel find_backward([[maybe_unused]] fa3::DType wanted, [[maybe_unused]] int64_t wanted_dim,
                             [[maybe_unused]] int64_t wanted_dim_v) {
  BackwardKernel found;
  [[maybe_unused]] int64_t found_size = std::numeric_limits<int64_t>::max();
#define FA3_BACKWARD(kind, dtype, dim, dim_v)                                                          \
  if (wanted == fa3::DType::dtype && wanted_dim <= dim && wanted_dim_v <= dim_v && dim + dim_v < found_size) { \
    found = {fa3::launch_backward<fa3::DType::dtype, dim, dim_v>, dim};                                \
    found_size = dim + dim_v;                                                                          \
  }
#include <instances.def>
  return found;
}

// Strides of a dense or packed tensor, checked for what the copy engine can address.
fa3::Strides mapped_strides(const char* op, const char* name, const Tensor& tensor) {
  const fa3::Strides strides = row_strides(tensor);
  bool fits = strides.head_dim == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  const int64_t outer[3] = {strides.batch, strides.seqlen, strides.heads};
  for (int64_t dim = 3, at = tensor.dim() - 2; at >= 0; --at) {
    --dim;
    fits = fits && outer[dim] * 2 % 16 == 0 && outer[dim] >= 0 && (outer[dim] > 0 || tensor.size(at) == 1);
  }
  FA3_CHECK(fits, op, ": ", name, " must have a contiguous head_dim, 16-byte aligned rows and strides above 0; pass ",
            name, ".contiguous()");
  return strides;
}

// Everything that the forward's two forms and the backward share.
struct Call {
  fa3::ForwardParams params{};
  fa3::DType dtype;
  cudaStream_t stream;
  bool packed;
  bool empty;  // nothing is to be computed: no query, or no key
  std::optional<Tensor> scratch;
};

constexpr int64_t kMaxExtent = fa3::kMaxSequence;

int32_t window_bound(const char* op, const std::optional<int64_t>& window) {
  if (!window) return fa3::kNoBound;
  FA3_CHECK(*window >= 0, op, ": a window reaches over 0 or more keys, got ", *window);
  return static_cast<int32_t>(std::min(*window, kMaxExtent));
}

// An int32 tensor of `count` elements that the kernel may index, or nullptr where there is none.
const int32_t* column(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t count,
                      const Tensor& q) {
  if (!tensor) return nullptr;
  FA3_CHECK(tensor->dim() == 1 && tensor->size(0) == count && tensor->scalar_type() == ScalarType::Int &&
            tensor->is_cuda() && tensor->get_device_index() == q.get_device_index() &&
            (count <= 1 || tensor->stride(0) == 1),
            op, ": ", name, " must be a contiguous int32 tensor of shape (", count, ",) on q's device, got shape ",
            shape_of(*tensor));
  return static_cast<const int32_t*>(tensor->const_data_ptr());
}

// The tile counter of a stream: launches on one stream follow each other, so they share it. A launch that is captured into
// a graph gets one of its own, since replays of it may run beside anything.
int32_t* tile_counter(const Tensor& like, cudaStream_t stream, std::optional<Tensor>& owner) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const bool asked = cudaStreamIsCapturing(stream, &capture) == cudaSuccess;
  // NOTE: the handle of the per-thread default stream stands for a stream of each thread.
  if (!asked || capture != cudaStreamCaptureStatusNone || stream == cudaStreamPerThread) {
    owner = torch::stable::new_zeros(like, {2}, ScalarType::Int);
    return static_cast<int32_t*>(owner->mutable_data_ptr());
  }
  static std::mutex mutex;
  // NOTE: never destroyed: at exit the allocator that its tensors belong to may be gone first.
  static auto& counters = *new std::map<std::pair<int32_t, cudaStream_t>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int32_t, cudaStream_t> key(like.get_device_index(), stream);
  auto found = counters.find(key);
  if (found == counters.end()) {
    found = counters.emplace(key, torch::stable::new_zeros(like, {2}, ScalarType::Int)).first;
  }
  return static_cast<int32_t*>(found->second.mutable_data_ptr());
}

// `tiles_of_keys`: the launch draws tiles of keys, not of queries.
Call prepare(const char* op, bool tiles_of_keys, const Tensor& q, const Tensor& k, const Tensor& v,
             const std::optional<Tensor>& q_start, const std::optional<Tensor>& q_len,
             const std::optional<Tensor>& k_start, const std::optional<Tensor>& k_len,
             const std::optional<Tensor>& offsets, std::optional<int64_t> offset, double softmax_scale,
             std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
             int64_t sm_margin) {
  Call call{};
  call.packed = q.dim() == 3;
  const int64_t packed = call.packed;
  FA3_CHECK((packed || q.dim() == 4) && k.dim() == q.dim() && v.dim() == q.dim(), op, ": q, k and v must have shape "
            "(batch, seqlen, heads, head_dim) or (tokens, heads, head_dim), got ", shape_of(q), ", ", shape_of(k),
            " and ", shape_of(v));
  const int64_t batch = packed ? 1 : q.size(0), seqlen_q = q.size(1 - packed), heads = q.size(2 - packed);
  const int64_t head_dim = q.size(3 - packed), seqlen_k = k.size(1 - packed), kv_heads = k.size(2 - packed);
  const int64_t head_dim_v = v.size(3 - packed);
  std::vector<int64_t> k_shape{seqlen_k, kv_heads, head_dim}, v_shape{seqlen_k, kv_heads, head_dim_v};
  if (!packed) {
    k_shape.insert(k_shape.begin(), batch);
    v_shape.insert(v_shape.begin(), batch);
  }
  FA3_CHECK(same_shape(k, k_shape), op, ": k must have q's batch and head_dim; got ", shape_of(k), " beside q ",
            shape_of(q));
  FA3_CHECK(same_shape(v, v_shape), op, ": v must have k's shape but for head_dim; got ", shape_of(v), " beside k ",
            shape_of(k));
  FA3_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": the heads of q, ", heads,
            ", must be a multiple of those of k, ", kv_heads);
  FA3_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim_v > 0 && head_dim_v % 8 == 0,
            op, ": head dims must be multiples of 8, got ", head_dim, " and ", head_dim_v);
  FA3_CHECK(std::max({seqlen_q, seqlen_k, heads * batch}) <= kMaxExtent, op, ": sequences and batch * heads may reach ",
            kMaxExtent);
  for (const Tensor* tensor : {&q, &k, &v}) {
    FA3_CHECK(tensor->is_cuda() && tensor->get_device_index() == q.get_device_index() &&
              tensor->scalar_type() == q.scalar_type(), op, ": q, k and v must share a CUDA device and a dtype");
  }
  FA3_CHECK(std::isfinite(softmax_scale) && softmax_scale > 0 && std::isfinite(softcap) && softcap >= 0,
            op, ": softmax_scale must be above 0 and softcap at least 0, got ", softmax_scale, " and ", softcap);
  FA3_CHECK(sm_margin >= 0, op, ": sm_margin must be 0 or more, got ", sm_margin);
  const auto dtype = dtype_of(q);
  FA3_CHECK(dtype, op, ": q must be bfloat16, float16 or float32");
  call.dtype = *dtype;

  fa3::ForwardParams& params = call.params;
  if (packed) {
    FA3_CHECK(q_start && q_len && k_start && k_len, op, ": packed tensors need q_start, q_len, k_start and k_len");
    const int64_t ranges = q_start->dim() == 1 ? q_start->size(0) : -1;
    FA3_CHECK(ranges <= kMaxExtent, op, ": there may be ", kMaxExtent, " ranges, got ", ranges);
    params.q_start = column(op, "q_start", q_start, ranges, q);
    params.q_len = column(op, "q_len", q_len, ranges, q);
    params.k_start = column(op, "k_start", k_start, ranges, q);
    params.k_len = column(op, "k_len", k_len, ranges, q);
    params.ranges = static_cast<int32_t>(ranges);
  } else {
    FA3_CHECK(!q_start && !q_len && !k_start && !k_len, op, ": dense tensors go without q_start, q_len, k_start and "
              "k_len");
  }
  FA3_CHECK(!offset || !offsets, op, ": give offset or offsets, not both");
  params.offsets = column(op, "offsets", offsets, packed ? params.ranges : batch, q);
  params.default_offset = !offset && !offsets;
  // NOTE: past these an offset hides all or nothing, whatever the window.
  params.offset = static_cast<int32_t>(std::clamp(offset.value_or(0), int64_t{std::numeric_limits<int32_t>::min()},
                                                  int64_t{std::numeric_limits<int32_t>::max()}));
  params.window_left = window_bound(op, window_left);
  params.window_right = window_bound(op, window_right);
  params.batch = static_cast<int32_t>(batch);
  params.seqlen_q = static_cast<int32_t>(seqlen_q);
  params.seqlen_k = static_cast<int32_t>(seqlen_k);
  params.heads = static_cast<int32_t>(heads);
  params.kv_heads = static_cast<int32_t>(kv_heads);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.head_dim_v = static_cast<int32_t>(head_dim_v);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.softcap = static_cast<float>(softcap);
  params.sm_margin = static_cast<int32_t>(std::min<int64_t>(sm_margin, 1 << 20));
  params.out_dtype = *dtype;
  call.empty = batch * seqlen_q == 0 || (packed ? params.ranges == 0 : seqlen_k == 0);
  call.stream = current_stream(q.get_device_index());
  if (call.empty) return call;

  params.q = q.const_data_ptr();
  params.q_stride = mapped_strides(op, "q", q);
  if (seqlen_k > 0) {
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    params.k_stride = mapped_strides(op, "k", k);
    params.v_stride = mapped_strides(op, "v", v);
  } else {
    params.k = params.v = params.q;  // an address that a tensor map may hold; no key will be loaded from it
  }
  if (packed) {
    const int64_t elements = tiles_of_keys
                                 ? fa3::workspace_elements(seqlen_k, kv_heads, kv_heads, params.ranges)
                                 : fa3::workspace_elements(seqlen_q, heads, kv_heads, params.ranges);
    call.scratch = empty_like(q, {elements}, ScalarType::Int);
    params.workspace = static_cast<int32_t*>(call.scratch->mutable_data_ptr());
  } else {
    params.tile_counter = tile_counter(q, call.stream, call.scratch);
  }
  return call;
}

// Fails for a variant without a kernel.
template <class Launcher>
Launcher existing(const char* op, Launcher launch, const Call& call) {
  FA3_CHECK(launch != nullptr, op, ": this library has no kernel for q's dtype and head dims ", call.params.head_dim,
            " and ", call.params.head_dim_v, "; 'python -m fa3_dist doctor' lists its variants");
  return launch;
}

ForwardLauncher forward_launcher(const char* op, const Call& call) {
  return existing(op, find_forward(call.dtype, call.params.head_dim, call.params.head_dim_v), call);
}

// out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), or packed (Tq, Hq, Dv) and (Hq, Tq).
std::tuple<Tensor, Tensor> forward_sm90(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_start,
    const std::optional<Tensor>& q_len, const std::optional<Tensor>& k_start, const std::optional<Tensor>& k_len,
    const std::optional<Tensor>& offsets, std::optional<int64_t> offset, double softmax_scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
    std::optional<ScalarType> out_dtype, bool /* deterministic: it always is */, int64_t sm_margin) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Call call = prepare("forward", false, q, k, v, q_start, q_len, k_start, k_len, offsets, offset, softmax_scale,
                      window_left, window_right, softcap, sm_margin);
  const ForwardLauncher launch = forward_launcher("forward", call);
  const ScalarType wanted = out_dtype.value_or(q.scalar_type());
  FA3_CHECK(wanted == q.scalar_type() || wanted == ScalarType::Float, "forward: out_dtype must be q's dtype or float32");
  const int64_t packed = call.packed;
  std::vector<int64_t> out_shape = sizes_of(q), lse_shape{q.size(2 - packed), q.size(1 - packed)};
  out_shape.back() = v.size(3 - packed);
  if (!packed) lse_shape.insert(lse_shape.begin(), q.size(0));
  Tensor out = empty_like(q, out_shape, wanted);
  Tensor lse = empty_like(q, lse_shape, ScalarType::Float);
  if (call.empty) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  call.params.out = out.mutable_data_ptr();
  call.params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (wanted == ScalarType::Float) call.params.out_dtype = fa3::DType::fp32;
  check_launch(launch(call.params, call.stream), "forward");
  return {out, lse};
}

// A contiguous output of this shape and dtype, on q's device.
void* state_pointer(const char* op, const char* name, Tensor& tensor, const std::vector<int64_t>& shape, ScalarType dtype,
                    const Tensor& q) {
  FA3_CHECK(same_shape(tensor, shape) && tensor.scalar_type() == dtype && tensor.is_cuda() &&
            tensor.get_device_index() == q.get_device_index() && tensor.is_contiguous() &&
            reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0,
            op, ": ", name, " has a shape, dtype, device or strides that this kernel does not write: it must be "
            "contiguous, 16-byte aligned and go with q ", shape_of(q), ", got ", shape_of(tensor));
  return tensor.mutable_data_ptr();
}

// Continues the running state out_acc (Tq, Hq, Dv), lse (Hq, Tq) over the visits; those flagged last end in out.
void forward_into_sm90(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out_acc, Tensor& lse,
                       std::optional<Tensor> out, const Tensor& q_start, const Tensor& q_len, const Tensor& k_start,
                       const Tensor& k_len, const Tensor& offsets, const Tensor& flags, double softmax_scale,
                       std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
                       int64_t sm_margin) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  FA3_CHECK(q.dim() == 3, "forward_into: q must have shape (tokens, heads, head_dim), got ", shape_of(q));
  Call call = prepare("forward_into", false, q, k, v, q_start, q_len, k_start, k_len, offsets, std::nullopt,
                      softmax_scale, window_left, window_right, softcap, sm_margin);
  const ForwardLauncher launch = forward_launcher("forward_into", call);
  std::vector<int64_t> out_shape{q.size(0), q.size(1), v.size(2)};
  const auto state = [&](const char* name, Tensor& tensor, const std::vector<int64_t>& shape, ScalarType dtype) {
    return state_pointer("forward_into", name, tensor, shape, dtype, q);
  };
  call.params.out_acc = static_cast<float*>(state("out_acc", out_acc, out_shape, ScalarType::Float));
  call.params.lse = static_cast<float*>(state("lse", lse, {q.size(1), q.size(0)}, ScalarType::Float));
  if (out) {
    const bool is_float = out->scalar_type() == ScalarType::Float;
    call.params.out = state("out", *out, out_shape, is_float ? ScalarType::Float : q.scalar_type());
    if (is_float) call.params.out_dtype = fa3::DType::fp32;
  }
  call.params.flags = column("forward_into", "flags", flags, call.params.ranges, q);
  if (call.empty) return;
  check_launch(launch(call.params, call.stream), "forward_into");
}

// Gradients of q, k and v: written, or, where accumulate is set, added to what is there.
void backward_sm90(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                   const Tensor& delta, Tensor& dq, Tensor& dk, Tensor& dv, const std::optional<Tensor>& q_start,
                   const std::optional<Tensor>& q_len, const std::optional<Tensor>& k_start,
                   const std::optional<Tensor>& k_len, const std::optional<Tensor>& offsets,
                   std::optional<int64_t> offset, double softmax_scale, std::optional<int64_t> window_left,
                   std::optional<int64_t> window_right, double softcap, bool accumulate, bool deterministic,
                   int64_t sm_margin) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Call call = prepare("backward", true, q, k, v, q_start, q_len, k_start, k_len, offsets, offset, softmax_scale,
                      window_left, window_right, softcap, sm_margin);
  const BackwardKernel kernel = find_backward(call.dtype, call.params.head_dim, call.params.head_dim_v);
  const BackwardLauncher launch = existing("backward", kernel.launch, call);
  FA3_CHECK(!deterministic, "backward: this library has no deterministic kernel");
  const int64_t packed = call.packed;
  std::vector<int64_t> dout_shape = sizes_of(q), rows_shape{q.size(2 - packed), q.size(1 - packed)};
  dout_shape.back() = v.size(3 - packed);
  if (!packed) rows_shape.insert(rows_shape.begin(), q.size(0));
  FA3_CHECK(same_shape(dout, dout_shape) && dout.scalar_type() == q.scalar_type() && dout.is_cuda() &&
            dout.get_device_index() == q.get_device_index(),
            "backward: dout must have the output's shape, q's dtype and be on q's device, got shape ", shape_of(dout));

  fa3::BackwardParams params{};
  const auto gradient = [&](const char* name, Tensor& tensor, const Tensor& like, fa3::DType& dtype) {
    const bool is_float = accumulate || tensor.scalar_type() == ScalarType::Float;
    dtype = is_float ? fa3::DType::fp32 : call.dtype;
    return state_pointer("backward", name, tensor, sizes_of(like), is_float ? ScalarType::Float : q.scalar_type(), q);
  };
  params.dq = gradient("dq", dq, q, params.dq_dtype);
  params.dk = gradient("dk", dk, k, params.dk_dtype);
  params.dv = gradient("dv", dv, v, params.dv_dtype);
  params.accumulate = accumulate;
  const auto row_values = [&](const char* name, const Tensor& tensor) {
    FA3_CHECK(same_shape(tensor, rows_shape) && tensor.scalar_type() == ScalarType::Float && tensor.is_cuda() &&
              tensor.get_device_index() == q.get_device_index() && tensor.is_contiguous(),
              "backward: ", name, " must be contiguous, float32, of shape ", packed ? "(heads, tokens)" : "(batch, heads, "
              "seqlen)", " and on q's device, got shape ", shape_of(tensor));
    return static_cast<const float*>(tensor.const_data_ptr());
  };
  // NOTE: the forward's field, where lse is a result; it is not written here.
  call.params.lse = const_cast<float*>(row_values("lse", lse));
  params.delta = row_values("delta", delta);
  if (call.empty || k.size(1 - packed) == 0) {
    if (accumulate) return;
    for (Tensor* tensor : {&dq, &dk, &dv}) torch::stable::zero_(*tensor);
    return;
  }
  params.forward = call.params;
  params.dout = dout.const_data_ptr();
  params.dout_stride = mapped_strides("backward", "dout", dout);
  std::optional<Tensor> dq_sum;
  if (!accumulate) {
    std::vector<int64_t> shape = sizes_of(q);
    shape.back() = kernel.head_dim;
    dq_sum = empty_like(q, shape, ScalarType::Float);
    params.dq_sum = static_cast<float*>(dq_sum->mutable_data_ptr());
  }
  check_launch(launch(params, call.stream), "backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fa3_dist, CUDA, m) {
  m.impl("forward_sm90", TORCH_BOX(&forward_sm90));
  m.impl("forward_into_sm90", TORCH_BOX(&forward_into_sm90));
  m.impl("backward_sm90", TORCH_BOX(&backward_sm90));
  m.impl("delta_sm90", TORCH_BOX(&delta_sm90));
}

// JSON: version, variants, csrc_hash, nvcc, cutlass. The string lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* fa3_dist_build_info() { return FA3_DIST_BUILD_INFO; }
