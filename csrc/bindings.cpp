// The library's only contact with Torch (its stable ABI) and Python: argument checks, dispatch over instances.def,
// registration. Schemas are defined in Python; what is registered here are their CUDA implementations. Python can also call
// the forward without Torch's dispatcher, which takes longer than all that is done here: fa3_dist_direct_calls.

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
#include <utility>
#include <vector>

#include "backward/backward.h"
#include "backward/delta.h"
#include "build_info.h"
#include "forward/forward.h"
#include "forward/schedule.h"
#include "params.h"
#include "python.h"

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

std::string shape_of(const int64_t* sizes, int64_t dims) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 0; dim < dims; ++dim) text << (dim ? ", " : "") << sizes[dim];
  text << ')';
  return text.str();
}

std::string shape_of(const Tensor& tensor) { return shape_of(tensor.sizes().data(), tensor.dim()); }

bool same_shape(const Tensor& a, const std::vector<int64_t>& shape) {
  const auto sizes = a.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes[dim] = tensor.size(dim);
  return sizes;
}

// What the forward reads of a tensor, whether it came through the dispatcher or from Python. Lives as long as the tensor.
struct View {
  const void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  std::optional<ScalarType> dtype;  // nothing: one that no argument may have
  int32_t device;                   // CUDA device, or -1
};

View view_of(const Tensor& tensor) {
  const bool is_cuda = tensor.is_cuda();
  return {is_cuda ? tensor.const_data_ptr() : nullptr, tensor.sizes().data(), tensor.strides().data(), tensor.dim(),
          tensor.scalar_type(), is_cuda ? tensor.get_device_index() : -1};
}

std::optional<View> view_of(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<View>(view_of(*tensor)) : std::nullopt;
}

std::string shape_of(const View& view) { return shape_of(view.sizes, view.dims); }

// Our dtype of a tensor's, or nothing for one that no kernel takes.
std::optional<fa3::DType> dtype_of(ScalarType dtype) {
  switch (dtype) {
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
int64_t stride_of(const View& tensor, int64_t dim) { return tensor.sizes[dim] > 1 ? tensor.strides[dim] : 0; }

// Strides of a (batch, seqlen, heads, head_dim) or (tokens, heads, head_dim) tensor.
fa3::Strides row_strides(const View& tensor) {
  const int64_t packed = tensor.dims == 3;
  // NOTE: head_dim alone keeps its stride when it has one element: vector loads ask whether it is 1.
  return {packed ? 0 : stride_of(tensor, 0), stride_of(tensor, 1 - packed), stride_of(tensor, 2 - packed),
          tensor.strides[3 - packed]};
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t dim = shape.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(shape[dim], 1);
  return strides;
}

// An uninitialised contiguous CUDA tensor.
// NOTE: torch::stable::new_empty goes through the dispatcher, which takes longer than the allocation.
Tensor empty(int32_t device, const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(shape);
  const int32_t code = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_int32();
  AtenTensorHandle handle = nullptr;
  FA3_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), code,
                                     aoti_torch_device_type_cuda(), device, &handle) == 0,
            "fa3_dist: PyTorch could not allocate a tensor of ", shape.size(), " dims on CUDA device ",
            device);
  return Tensor(handle);
}

// The 2 zeros of a tile counter.
Tensor zero_counter(int32_t device) {
  Tensor counter = empty(device, {fa3::kCounterElements}, ScalarType::Int);
  torch::stable::zero_(counter);
  return counter;
}

// Makes a CUDA device the current one for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device) {
    // NOTE: a guard takes longer than the question whether one is needed. And a thread that has done nothing on the device
    // yet has no context there, without which the driver describes no tensor.
    static thread_local bool has_context = false;
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device) {
      guard_.emplace(device);
    } else if (!has_context) {
      has_context = cudaSetDevice(device) == cudaSuccess;
    }
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

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

  const auto dout_dtype = dtype_of(dout.scalar_type());
  const auto out_dtype = dtype_of(out.scalar_type());
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

  const CurrentDevice device(dout.get_device_index());
  Tensor delta = empty(dout.get_device_index(), result_shape, ScalarType::Float);
  if (batch * seqlen * heads == 0) return delta;

  fa3::DeltaParams params{};
  params.dout = dout.const_data_ptr();
  params.out = out.const_data_ptr();
  params.delta = static_cast<float*>(delta.mutable_data_ptr());
  params.dout_stride = row_strides(view_of(dout));
  params.out_stride = row_strides(view_of(out));
  if (dlse) {
    params.dlse = static_cast<const float*>(dlse->const_data_ptr());
    const View view = view_of(*dlse);
    params.dlse_stride = {packed ? 0 : stride_of(view, 0), stride_of(view, 2 - packed), stride_of(view, 1 - packed), 0};
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

// A row of the backward: its kernels, and the head_dim of the rows that it sums dq up in.
struct BackwardKernel {
  BackwardLauncher launch = nullptr;
  BackwardLauncher round = nullptr;
  int64_t head_dim = 0;
};

// The kernel of the smallest head dims in the list that hold these, if there is one.
BackwardKernel find_backward([[maybe_unused]] fa3::DType wanted, [[maybe_unused]] int64_t wanted_dim,
                             [[maybe_unused]] int64_t wanted_dim_v) {
  BackwardKernel found;
  [[maybe_unused]] int64_t found_size = std::numeric_limits<int64_t>::max();
#define FA3_BACKWARD(kind, dtype, dim, dim_v)                                                          \
  if (wanted == fa3::DType::dtype && wanted_dim <= dim && wanted_dim_v <= dim_v && dim + dim_v < found_size) { \
    found = {fa3::launch_backward<fa3::DType::dtype, dim, dim_v>, fa3::launch_rounding<fa3::DType::dtype, dim, dim_v>, \
             dim};                                                                                     \
    found_size = dim + dim_v;                                                                          \
  }
#include <instances.def>
  return found;
}

// Strides of a dense or packed tensor, checked for what the copy engine can address.
fa3::Strides mapped_strides(const char* op, const char* name, const View& tensor) {
  const fa3::Strides strides = row_strides(tensor);
  bool fits = strides.head_dim == 1 && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  const int64_t outer[3] = {strides.batch, strides.seqlen, strides.heads};
  for (int64_t dim = 3, at = tensor.dims - 2; at >= 0; --at) {
    --dim;
    fits = fits && outer[dim] * 2 % 16 == 0 && outer[dim] >= 0 && (outer[dim] > 0 || tensor.sizes[at] == 1);
  }
  FA3_CHECK(fits, op, ": ", name, " must have a contiguous head_dim, 16-byte aligned rows and strides above 0; pass ",
            name, ".contiguous()");
  return strides;
}

// Arguments that the forward's two forms and the backward share, in the order of the schemas.
struct Inputs {
  View q, k, v;
  std::optional<View> q_start, q_len, k_start, k_len, offsets;
  std::optional<int64_t> offset;
  double softmax_scale;
  std::optional<int64_t> window_left, window_right;
  double softcap;
  int64_t sm_margin;
};

// What they come to.
struct Call {
  fa3::ForwardParams params{};
  ScalarType dtype;
  int32_t device;
  bool packed;
  bool empty;  // nothing is to be computed: no query, or no key
};

constexpr int64_t kMaxExtent = fa3::kMaxSequence;

int32_t window_bound(const char* op, const std::optional<int64_t>& window) {
  if (!window) return fa3::kNoBound;
  FA3_CHECK(*window >= 0, op, ": a window reaches over 0 or more keys, got ", *window);
  return static_cast<int32_t>(std::min(*window, kMaxExtent));
}

// An int32 tensor of `count` elements that the kernel may index, or nullptr where there is none.
const int32_t* column(const char* op, const char* name, const std::optional<View>& tensor, int64_t count,
                      const View& q) {
  if (!tensor) return nullptr;
  FA3_CHECK(tensor->dims == 1 && tensor->sizes[0] == count && tensor->dtype == ScalarType::Int &&
            tensor->device == q.device && (count <= 1 || tensor->strides[0] == 1),
            op, ": ", name, " must be a contiguous int32 tensor of shape (", count, ",) on q's device, got shape ",
            shape_of(*tensor));
  return static_cast<const int32_t*>(tensor->data);
}

// The tile counter of a stream: launches on one stream follow each other, so they share it. A launch that is captured into
// a graph gets one of its own, since replays of it may run beside anything.
int32_t* tile_counter(int32_t device, cudaStream_t stream, std::optional<Tensor>& owner) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const bool captured = cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone;
  // NOTE: the handle of the per-thread default stream stands for a stream of each thread. A capture does not survive a
  // question for its stream's id.
  if (captured || stream == cudaStreamPerThread || cudaStreamGetId(stream, &id) != cudaSuccess) {
    owner = zero_counter(device);
    return static_cast<int32_t*>(owner->mutable_data_ptr());
  }
  static std::mutex mutex;
  // NOTE: never destroyed: at exit the allocator that its tensors belong to may be gone first. Streams go by their ids: the
  // handle of one that was destroyed may come back while its last launch is still running.
  static auto& counters = *new std::map<std::pair<int32_t, unsigned long long>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int32_t, unsigned long long> key(device, id);
  auto found = counters.find(key);
  if (found == counters.end()) found = counters.emplace(key, zero_counter(device)).first;
  return static_cast<int32_t*>(found->second.mutable_data_ptr());
}

Call check_call(const char* op, const Inputs& in) {
  const View &q = in.q, &k = in.k, &v = in.v;
  Call call{};
  call.packed = q.dims == 3;
  const int64_t packed = call.packed;
  FA3_CHECK((packed || q.dims == 4) && k.dims == q.dims && v.dims == q.dims, op, ": q, k and v must have shape "
            "(batch, seqlen, heads, head_dim) or (tokens, heads, head_dim), got ", shape_of(q), ", ", shape_of(k),
            " and ", shape_of(v));
  const int64_t batch = packed ? 1 : q.sizes[0], seqlen_q = q.sizes[1 - packed], heads = q.sizes[2 - packed];
  const int64_t head_dim = q.sizes[3 - packed], seqlen_k = k.sizes[1 - packed], kv_heads = k.sizes[2 - packed];
  const int64_t head_dim_v = v.sizes[3 - packed];
  FA3_CHECK((packed || k.sizes[0] == batch) && k.sizes[3 - packed] == head_dim, op, ": k must have q's batch and "
            "head_dim; got ", shape_of(k), " beside q ", shape_of(q));
  FA3_CHECK(std::equal(k.sizes, k.sizes + k.dims - 1, v.sizes), op, ": v must have k's shape but for head_dim; got ",
            shape_of(v), " beside k ", shape_of(k));
  FA3_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": the heads of q, ", heads,
            ", must be a multiple of those of k, ", kv_heads);
  FA3_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim_v > 0 && head_dim_v % 8 == 0,
            op, ": head dims must be multiples of 8, got ", head_dim, " and ", head_dim_v);
  FA3_CHECK(std::max({seqlen_q, seqlen_k, heads * batch}) <= kMaxExtent, op, ": sequences and batch * heads may reach ",
            kMaxExtent);
  for (const View* tensor : {&q, &k, &v}) {
    FA3_CHECK(tensor->device >= 0 && tensor->device == q.device && tensor->dtype && tensor->dtype == q.dtype,
              op, ": q, k and v must share a CUDA device and a dtype");
  }
  FA3_CHECK(std::isfinite(in.softmax_scale) && in.softmax_scale > 0 && std::isfinite(in.softcap) && in.softcap >= 0,
            op, ": softmax_scale must be above 0 and softcap at least 0, got ", in.softmax_scale, " and ", in.softcap);
  FA3_CHECK(in.sm_margin >= 0, op, ": sm_margin must be 0 or more, got ", in.sm_margin);
  const auto dtype = dtype_of(*q.dtype);
  FA3_CHECK(dtype, op, ": q must be bfloat16, float16 or float32");
  call.dtype = *q.dtype;
  call.device = q.device;

  fa3::ForwardParams& params = call.params;
  if (packed) {
    FA3_CHECK(in.q_start && in.q_len && in.k_start && in.k_len, op, ": packed tensors need q_start, q_len, k_start and "
              "k_len");
    const int64_t ranges = in.q_start->dims == 1 ? in.q_start->sizes[0] : -1;
    FA3_CHECK(ranges <= kMaxExtent, op, ": there may be ", kMaxExtent, " ranges, got ", ranges);
    params.q_start = column(op, "q_start", in.q_start, ranges, q);
    params.q_len = column(op, "q_len", in.q_len, ranges, q);
    params.k_start = column(op, "k_start", in.k_start, ranges, q);
    params.k_len = column(op, "k_len", in.k_len, ranges, q);
    params.ranges = static_cast<int32_t>(ranges);
  } else {
    FA3_CHECK(!in.q_start && !in.q_len && !in.k_start && !in.k_len, op, ": dense tensors go without q_start, q_len, "
              "k_start and k_len");
  }
  FA3_CHECK(!in.offset || !in.offsets, op, ": give offset or offsets, not both");
  params.offsets = column(op, "offsets", in.offsets, packed ? params.ranges : batch, q);
  params.default_offset = !in.offset && !in.offsets;
  // NOTE: past these an offset hides all or nothing, whatever the window.
  params.offset = static_cast<int32_t>(std::clamp(in.offset.value_or(0), int64_t{std::numeric_limits<int32_t>::min()},
                                                  int64_t{std::numeric_limits<int32_t>::max()}));
  params.window_left = window_bound(op, in.window_left);
  params.window_right = window_bound(op, in.window_right);
  params.batch = static_cast<int32_t>(batch);
  params.seqlen_q = static_cast<int32_t>(seqlen_q);
  params.seqlen_k = static_cast<int32_t>(seqlen_k);
  params.heads = static_cast<int32_t>(heads);
  params.kv_heads = static_cast<int32_t>(kv_heads);
  params.head_dim = static_cast<int32_t>(head_dim);
  params.head_dim_v = static_cast<int32_t>(head_dim_v);
  params.softmax_scale = static_cast<float>(in.softmax_scale);
  params.softcap = static_cast<float>(in.softcap);
  params.sm_margin = static_cast<int32_t>(std::min<int64_t>(in.sm_margin, 1 << 20));
  params.out_dtype = *dtype;
  call.empty = batch * seqlen_q == 0 || (packed ? params.ranges == 0 : seqlen_k == 0);
  if (call.empty) return call;

  params.q = q.data;
  params.q_stride = mapped_strides(op, "q", q);
  if (seqlen_k > 0) {
    params.k = k.data;
    params.v = v.data;
    params.k_stride = mapped_strides(op, "k", k);
    params.v_stride = mapped_strides(op, "v", v);
  } else {
    params.k = params.v = params.q;  // an address that a tensor map may hold; no key will be loaded from it
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

// Where so many tiles are listed; `owner` keeps it.
int32_t* list_of_tiles(const Call& call, int64_t records, std::optional<Tensor>& owner) {
  owner = empty(call.device, {fa3::workspace_elements(records)}, ScalarType::Int);
  return static_cast<int32_t*>(owner->mutable_data_ptr());
}

// Where a call's tiles, of keys or of queries, are listed, if they are.
int32_t* workspace(const Call& call, bool tiles_of_keys, std::optional<Tensor>& owner) {
  const fa3::ForwardParams& params = call.params;
  if (!fa3::lists_tiles(params)) return nullptr;
  const int64_t records = tiles_of_keys
                              ? fa3::most_records(params.seqlen_k, params.kv_heads, params.kv_heads, params.ranges)
                              : fa3::most_records(params);
  return list_of_tiles(call, records, owner);
}

// Keeps the scratch memory of a launch.
struct Scratch {
  std::optional<Tensor> workspace, counter;
};

// Gives a call that is not empty its kernel's scratch memory; returns the stream to launch it on. `tiles_of_keys`: the launch
// draws tiles of keys, not of queries. `one_by_one`: several ranges may be launched each for itself.
cudaStream_t prepare_launch(Call& call, bool tiles_of_keys, bool one_by_one, Scratch& scratch) {
  const cudaStream_t stream = current_stream(call.device);
  fa3::ForwardParams& params = call.params;
  params.workspace = workspace(call, tiles_of_keys, scratch.workspace);
  if (params.workspace == nullptr || one_by_one) {
    params.tile_counter = tile_counter(call.device, stream, scratch.counter);
  }
  return stream;
}

ForwardLauncher forward_launcher(const char* op, const Call& call) {
  const auto dtype = dtype_of(call.dtype);
  return existing(op, find_forward(*dtype, call.params.head_dim, call.params.head_dim_v), call);
}

void launch_forward(const char* op, Call& call) {
  Scratch scratch;
  const ForwardLauncher launch = forward_launcher(op, call);
  const cudaStream_t stream = prepare_launch(call, false, false, scratch);
  check_launch(launch(call.params, stream), op);
}

struct Shapes {
  std::vector<int64_t> out;  // (B, Sq, Hq, Dv), or packed (Tq, Hq, Dv)
  std::vector<int64_t> lse;  // (B, Hq, Sq), or packed (Hq, Tq)
};

Shapes result_shapes(const Call& call) {
  const fa3::ForwardParams& params = call.params;
  Shapes shapes{{params.seqlen_q, params.heads, params.head_dim_v}, {params.heads, params.seqlen_q}};
  if (!call.packed) {
    shapes.out.insert(shapes.out.begin(), params.batch);
    shapes.lse.insert(shapes.lse.begin(), params.batch);
  }
  return shapes;
}

std::tuple<Tensor, Tensor> forward_sm90(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_start,
    const std::optional<Tensor>& q_len, const std::optional<Tensor>& k_start, const std::optional<Tensor>& k_len,
    const std::optional<Tensor>& offsets, std::optional<int64_t> offset, double softmax_scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
    std::optional<ScalarType> out_dtype, bool /* deterministic: it always is */, int64_t sm_margin) {
  Call call = check_call("forward", {view_of(q), view_of(k), view_of(v), view_of(q_start), view_of(q_len),
                                    view_of(k_start), view_of(k_len), view_of(offsets), offset, softmax_scale,
                                    window_left, window_right, softcap, sm_margin});
  const ScalarType wanted = out_dtype.value_or(call.dtype);
  FA3_CHECK(wanted == call.dtype || wanted == ScalarType::Float, "forward: out_dtype must be q's dtype or float32");
  const CurrentDevice device(call.device);
  const Shapes shapes = result_shapes(call);
  Tensor out = empty(call.device, shapes.out, wanted);
  Tensor lse = empty(call.device, shapes.lse, ScalarType::Float);
  if (call.empty) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  call.params.out = out.mutable_data_ptr();
  call.params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (wanted == ScalarType::Float) call.params.out_dtype = fa3::DType::fp32;
  launch_forward("forward", call);
  return {out, lse};
}

bool is_contiguous(const View& view) {
  if (std::find(view.sizes, view.sizes + view.dims, 0) != view.sizes + view.dims) return true;  // as torch has it
  int64_t stride = 1;
  for (int64_t dim = view.dims; dim-- > 0; stride *= view.sizes[dim]) {
    if (view.sizes[dim] > 1 && view.strides[dim] != stride) return false;
  }
  return true;
}

// Memory to write `shape` to, contiguous, of this dtype and on q's device.
void* state_pointer(const char* op, const char* name, const View& view, const std::vector<int64_t>& shape,
                    ScalarType dtype, const View& q) {
  FA3_CHECK(std::equal(view.sizes, view.sizes + view.dims, shape.begin(), shape.end()) && view.dtype == dtype &&
            view.device == q.device && is_contiguous(view) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0,
            op, ": ", name, " has a shape, dtype, device or strides that this kernel does not write: it must be "
            "contiguous, 16-byte aligned and go with q ", shape_of(q), ", got ", shape_of(view));
  return const_cast<void*>(view.data);
}

// Continues the running state out_acc (Tq, Hq, Dv), lse (Hq, Tq) over the visits; those flagged last end in out.
void continue_forward(const Inputs& in, const View& out_acc, const View& lse, const std::optional<View>& out,
                      const View& flags) {
  const View& q = in.q;
  FA3_CHECK(q.dims == 3, "forward_into: q must have shape (tokens, heads, head_dim), got ", shape_of(q));
  Call call = check_call("forward_into", in);
  const Shapes shapes = result_shapes(call);
  call.params.out_acc = static_cast<float*>(state_pointer("forward_into", "out_acc", out_acc, shapes.out, ScalarType::Float, q));
  call.params.lse = static_cast<float*>(state_pointer("forward_into", "lse", lse, shapes.lse, ScalarType::Float, q));
  if (out) {
    const bool is_float = out->dtype == ScalarType::Float;
    call.params.out = state_pointer("forward_into", "out", *out, shapes.out, is_float ? ScalarType::Float : call.dtype, q);
    if (is_float) call.params.out_dtype = fa3::DType::fp32;
  }
  call.params.flags = column("forward_into", "flags", flags, call.params.ranges, q);
  if (call.empty) return;
  const CurrentDevice device(call.device);
  launch_forward("forward_into", call);
}

void forward_into_sm90(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out_acc, Tensor& lse,
                       std::optional<Tensor> out, const Tensor& q_start, const Tensor& q_len, const Tensor& k_start,
                       const Tensor& k_len, const Tensor& offsets, const Tensor& flags, double softmax_scale,
                       std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
                       int64_t sm_margin) {
  // NOTE: asked for memory to write to, a tensor that shares its own with a lazy copy parts from it.
  for (Tensor* written : {&out_acc, &lse, out ? &*out : nullptr}) {
    if (written != nullptr && written->is_cuda()) written->mutable_data_ptr();
  }
  continue_forward({view_of(q), view_of(k), view_of(v), view_of(q_start), view_of(q_len), view_of(k_start),
                    view_of(k_len), view_of(offsets), std::nullopt, softmax_scale, window_left, window_right, softcap,
                    sm_margin},
                   view_of(out_acc), view_of(lse), view_of(out), view_of(flags));
}

// Memory that a packed backward sums dq up in, in the kernel's own order.
float* sum_pointer(const char* op, const Tensor& dq_sum, int64_t elements, const View& q) {
  return static_cast<float*>(state_pointer(op, "dq_sum", view_of(dq_sum), {elements}, ScalarType::Float, q));
}

void backward_sm90(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                   const Tensor& delta, Tensor& dq, Tensor& dk, Tensor& dv, const std::optional<Tensor>& q_start,
                   const std::optional<Tensor>& q_len, const std::optional<Tensor>& k_start,
                   const std::optional<Tensor>& k_len, const std::optional<Tensor>& offsets,
                   std::optional<int64_t> offset, double softmax_scale, std::optional<int64_t> window_left,
                   std::optional<int64_t> window_right, double softcap, bool accumulate, bool accumulate_kv,
                   bool deterministic, std::optional<int64_t> most_queries, std::optional<int64_t> mean_queries,
                   int64_t sm_margin) {
  constexpr const char* kOp = "backward";
  const View view = view_of(q);
  Call call = check_call(kOp, {view, view_of(k), view_of(v), view_of(q_start), view_of(q_len), view_of(k_start),
                               view_of(k_len), view_of(offsets), offset, softmax_scale, window_left, window_right, softcap,
                               sm_margin});
  const fa3::DType dtype = *dtype_of(call.dtype);
  const BackwardKernel kernel = find_backward(dtype, call.params.head_dim, call.params.head_dim_v);
  const BackwardLauncher launch = existing(kOp, kernel.launch, call);
  const Shapes shapes = result_shapes(call);
  const auto has = [&](const View& tensor, const std::vector<int64_t>& shape, ScalarType wanted) {
    return std::equal(tensor.sizes, tensor.sizes + tensor.dims, shape.begin(), shape.end()) && tensor.dtype == wanted &&
           tensor.device == call.device;
  };
  const View dout_view = view_of(dout);
  FA3_CHECK(has(dout_view, shapes.out, call.dtype), "backward: dout must have the output's shape, q's dtype and be on q's "
            "device, got shape ", shape_of(dout_view));

  fa3::BackwardParams params{};
  const auto gradient = [&](const char* name, Tensor& tensor, const Tensor& like, bool is_sum, fa3::DType& gradient_dtype) {
    const bool is_float = is_sum || tensor.scalar_type() == ScalarType::Float;
    gradient_dtype = is_float ? fa3::DType::fp32 : dtype;
    // NOTE: asked for memory to write to, a tensor that shares its own with a lazy copy parts from it.
    if (tensor.is_cuda()) tensor.mutable_data_ptr();
    const View shape = view_of(like);
    return state_pointer(kOp, name, view_of(tensor), {shape.sizes, shape.sizes + shape.dims},
                         is_float ? ScalarType::Float : call.dtype, view);
  };
  FA3_CHECK(accumulate || !accumulate_kv, "backward: accumulate_kv is for calls that accumulate dq, too");
  const bool separate = fa3::separates_dq(kernel.head_dim);
  if (dq.dim() == 1) {
    FA3_CHECK(accumulate && call.packed, "backward: a dq_sum is for packed calls that accumulate");
    params.dq_dtype = fa3::DType::fp32;
    if (dq.is_cuda()) dq.mutable_data_ptr();
    float* const sum = sum_pointer(kOp, dq, fa3::elements_of_sum(call.params, kernel.head_dim), view);
    if (separate) {
      params.dq = sum;
    } else {
      params.dq_sum = sum;
    }
  } else {
    params.dq = gradient("dq", dq, q, accumulate, params.dq_dtype);
  }
  params.dk = gradient("dk", dk, k, accumulate_kv, params.dk_dtype);
  params.dv = gradient("dv", dv, v, accumulate_kv, params.dv_dtype);
  params.accumulate = accumulate;
  params.accumulate_kv = accumulate_kv;
  const auto row_values = [&](const char* name, const Tensor& tensor) {
    const View rows = view_of(tensor);
    FA3_CHECK(has(rows, shapes.lse, ScalarType::Float) && is_contiguous(rows), "backward: ", name,
              " must be contiguous, float32, of shape ", call.packed ? "(heads, tokens)" : "(batch, heads, seqlen)",
              " and on q's device, got shape ", shape_of(rows));
    return static_cast<const float*>(rows.data);
  };
  // NOTE: the forward's field, where lse is a result; it is not written here.
  call.params.lse = const_cast<float*>(row_values("lse", lse));
  params.delta = row_values("delta", delta);
  const CurrentDevice device(call.device);
  if (call.empty || call.params.seqlen_k == 0) {
    if (accumulate) return;
    for (Tensor* tensor : {&dq, &dk, &dv}) torch::stable::zero_(*tensor);
    return;
  }
  params.dout = dout_view.data;
  params.dout_stride = mapped_strides(kOp, "dout", dout_view);
  params.deterministic = deterministic;
  fa3::QueriesOfKey queries = fa3::queries_of_key(call.params, kernel.head_dim);
  if (most_queries && mean_queries) queries = {static_cast<double>(*most_queries), static_cast<double>(*mean_queries)};
  // Parts that accumulate add in any order, and to fp32.
  const bool adds = !deterministic && params.dk_dtype == fa3::DType::fp32 && params.dv_dtype == fa3::DType::fp32;
  params.key_parts = accumulate && !adds ? 1 : fa3::key_parts_of(call.params, kernel.head_dim, queries, accumulate);
  std::optional<Tensor> dq_sum, dkv_parts, turns, query_workspace;
  Scratch scratch;
  if (params.key_parts > 1 && !accumulate) {
    dkv_parts = empty(call.device, {fa3::elements_of_parts(call.params, params.key_parts)}, ScalarType::Float);
    params.dkv_parts = static_cast<float*>(dkv_parts->mutable_data_ptr());
  }
  if (!accumulate && !separate) {
    const int64_t elements = fa3::elements_of_sum(call.params, kernel.head_dim);
    const int64_t counts = int64_t{call.params.batch} * call.params.kv_heads * params.key_parts;
    dq_sum = empty(call.device, {elements + counts}, ScalarType::Float);
    params.dq_sum = static_cast<float*>(dq_sum->mutable_data_ptr());
    params.cleared = reinterpret_cast<int32_t*>(params.dq_sum + elements);
  }
  if (deterministic && !separate) {
    turns = empty(call.device, {2 * int64_t{call.params.batch} * call.params.heads * call.params.seqlen_q}, ScalarType::Int);
    params.turns = static_cast<int32_t*>(turns->mutable_data_ptr());
  }
  const int together = fa3::ranges_at_a_time(call.params, accumulate, deterministic, kernel.head_dim);
  if (separate && fa3::lists_tiles(call.params)) {
    params.query_workspace = list_of_tiles(call, fa3::query_records(call.params, accumulate, together), query_workspace);
  }
  const cudaStream_t stream = prepare_launch(call, true, together < call.params.ranges, scratch);
  params.forward = call.params;
  check_launch(launch(params, stream), kOp);
}

// dq (Tq, Hq, D), in q's dtype, of a sum that backwards have added to.
Tensor round_dq_sm90(const Tensor& dq_sum, const Tensor& q, const Tensor& v, double softmax_scale) {
  constexpr const char* kOp = "round_dq";
  FA3_CHECK(q.dim() == 3 && v.dim() == 3, "round_dq: q and v must have shape (tokens, heads, head_dim), got ", shape_of(q),
            " and ", shape_of(v));
  const View view = view_of(q);
  const auto dtype = dtype_of(q.scalar_type());
  FA3_CHECK(dtype && view.sizes[2] % 8 == 0, "round_dq: this library has no kernel for q ", shape_of(view));
  const BackwardKernel kernel = find_backward(*dtype, view.sizes[2], v.size(2));
  FA3_CHECK(kernel.round != nullptr, "round_dq: this library has no kernel for head_dim ", view.sizes[2], " and ", v.size(2));
  fa3::BackwardParams params{};
  fa3::ForwardParams& forward = params.forward;
  forward.batch = 1;
  forward.seqlen_q = static_cast<int32_t>(view.sizes[0]);
  forward.heads = static_cast<int32_t>(view.sizes[1]);
  forward.head_dim = static_cast<int32_t>(view.sizes[2]);
  forward.softmax_scale = static_cast<float>(softmax_scale);
  params.dq_sum = sum_pointer(kOp, dq_sum, fa3::elements_of_sum(forward, kernel.head_dim), view);
  const CurrentDevice device(view.device);
  Tensor dq = empty(view.device, {view.sizes, view.sizes + 3}, q.scalar_type());
  if (view.sizes[0] == 0 || view.sizes[1] == 0) return dq;
  params.dq = dq.mutable_data_ptr();
  params.dq_dtype = *dtype;
  check_launch(kernel.round(params, current_stream(view.device)), kOp);
  return dq;
}

// ---- forward, called from Python -------------------------------------------------------------------------------------

// What the functions below borrow from Python and Torch, for as long as the process lives.
struct Surroundings {
  const dlpack::Exchange* exchange;  // of torch.Tensor
  PyObject* tensor_type;             // torch.Tensor
  PyObject* empty;                   // (shape, strides, dtype) -> Tensor on the current CUDA device
  PyObject* dtypes[3];               // torch's, in the order of fa3::DType
};

Surroundings surroundings;

// Thrown for calls that are left to the operator: it knows what to do with them, or what is wrong.
struct Refused : std::exception {};

bool is_exactly(PyObject* object, PyObject* type) {
  const python::Object own(PyObject_Type(object));
  return own.get() == type;
}

// NOTE: the exchange takes whatever it is given for a tensor.
View as_view(PyObject* object) {
  dlpack::Tensor tensor;
  if (!is_exactly(object, surroundings.tensor_type) || surroundings.exchange->view(object, &tensor) != 0) throw Refused{};
  std::optional<ScalarType> dtype;
  if (tensor.lanes == 1 && tensor.bits == 16 && tensor.code == dlpack::kBfloat) dtype = ScalarType::BFloat16;
  if (tensor.lanes == 1 && tensor.bits == 16 && tensor.code == dlpack::kFloat) dtype = ScalarType::Half;
  if (tensor.lanes == 1 && tensor.bits == 32 && tensor.code == dlpack::kFloat) dtype = ScalarType::Float;
  if (tensor.lanes == 1 && tensor.bits == 32 && tensor.code == dlpack::kInt) dtype = ScalarType::Int;
  // NOTE: tensors without memory that is theirs, such as functorch's, have no address even where they have elements.
  if (tensor.device_type != dlpack::kCUDA || tensor.data == nullptr) throw Refused{};
  return {static_cast<const char*>(tensor.data) + tensor.byte_offset, tensor.sizes, tensor.strides, tensor.dims, dtype,
          tensor.device};
}

std::optional<View> as_optional_view(PyObject* object) {
  return object == python::none() ? std::nullopt : std::optional<View>(as_view(object));
}

bool as_bool(PyObject* object) {
  if (!is_exactly(object, &PyBool_Type)) throw Refused{};
  return object == &_Py_TrueStruct;
}

double as_double(PyObject* object) {
  const python::Object type(PyObject_Type(object));
  if (type.get() != &PyLong_Type && !PyType_IsSubtype(type.get(), &PyFloat_Type)) throw Refused{};
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) throw Refused{};
  return value;
}

int64_t as_integer(PyObject* object) {
  if (!is_exactly(object, &PyLong_Type)) throw Refused{};
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw Refused{};
  return value;
}

std::optional<int64_t> as_optional_integer(PyObject* object) {
  return object == python::none() ? std::nullopt : std::optional<int64_t>(as_integer(object));
}

python::Object as_tuple(const std::vector<int64_t>& values) {
  return python::make_tuple(values.size(), [&](ssize_t i) { return PyLong_FromLongLong(values[i]); });
}

// An uninitialised contiguous tensor on the current CUDA device.
python::Object new_tensor(const std::vector<int64_t>& shape, fa3::DType dtype) {
  PyObject* const code = surroundings.dtypes[static_cast<int>(dtype)];
  const python::Object arguments = python::make_tuple(3, [&](ssize_t i) {
    if (i == 2) return python::new_reference(code);
    return as_tuple(i == 0 ? shape : contiguous_strides(shape)).release();
  });
  return python::Object(PyObject_Call(surroundings.empty, arguments.get(), nullptr));
}

bool is_hopper(int32_t device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

// The factor of scores: None is head_dim ** -0.5.
double as_scale(PyObject* object, const View& q) {
  if (object != python::none()) return as_double(object);
  return q.dims > 0 ? 1.0 / std::sqrt(static_cast<double>(q.sizes[q.dims - 1])) : 1.0;
}

// `forward_sm90` of Python's arguments, and whether lse is wanted: else there is None.
PyObject* run_forward(PyObject* const* arguments) {
  const auto [q, k, v, q_start, q_len, k_start, k_len, offsets, offset, softmax_scale, window_left, window_right, softcap,
              out_dtype, deterministic, sm_margin, wants_lse] = *reinterpret_cast<PyObject* const(*)[17]>(arguments);
  as_bool(deterministic);  // it always is
  const bool has_lse = as_bool(wants_lse);
  const View query = as_view(q);
  Call call = check_call("forward", {query, as_view(k), as_view(v), as_optional_view(q_start), as_optional_view(q_len),
                                    as_optional_view(k_start), as_optional_view(k_len), as_optional_view(offsets),
                                    as_optional_integer(offset), as_scale(softmax_scale, query),
                                    as_optional_integer(window_left), as_optional_integer(window_right),
                                    as_double(softcap), as_integer(sm_margin)});
  fa3::ForwardParams& params = call.params;
  if (call.empty || !is_hopper(call.device)) throw Refused{};
  if (out_dtype == surroundings.dtypes[static_cast<int>(fa3::DType::fp32)]) {
    params.out_dtype = fa3::DType::fp32;
  } else if (out_dtype != python::none() && out_dtype != surroundings.dtypes[static_cast<int>(params.out_dtype)]) {
    throw Refused{};
  }

  const CurrentDevice device(call.device);
  const Shapes shapes = result_shapes(call);
  const auto memory_of = [&](const python::Object& tensor) {
    const View view = as_view(tensor.get());
    if (view.device != call.device) throw Refused{};
    return const_cast<void*>(view.data);
  };
  python::Object out = new_tensor(shapes.out, params.out_dtype);
  python::Object lse = has_lse ? new_tensor(shapes.lse, fa3::DType::fp32) : python::Object(python::new_reference(python::none()));
  params.out = memory_of(out);
  if (has_lse) params.lse = static_cast<float*>(memory_of(lse));
  {
    const python::Unlocked others_run;  // a launch waits where its stream's queue is full
    launch_forward("forward", call);
  }
  return python::make_tuple(2, [&](ssize_t i) { return (i == 0 ? out : lse).release(); }).release();
}

// `forward_into_sm90` of Python's arguments.
PyObject* run_forward_into(PyObject* const* arguments) {
  const auto [q, k, v, out_acc, lse, out, q_start, q_len, k_start, k_len, offsets, flags, softmax_scale, window_left,
              window_right, softcap, sm_margin] = *reinterpret_cast<PyObject* const(*)[17]>(arguments);
  const Inputs inputs{as_view(q), as_view(k), as_view(v), as_view(q_start), as_view(q_len), as_view(k_start),
                             as_view(k_len), as_view(offsets), std::nullopt, as_double(softmax_scale),
                             as_optional_integer(window_left), as_optional_integer(window_right), as_double(softcap),
                             as_integer(sm_margin)};
  const View out_acc_view = as_view(out_acc), lse_view = as_view(lse), flags_view = as_view(flags);
  const std::optional<View> out_view = as_optional_view(out);
  if (!is_hopper(inputs.q.device)) throw Refused{};
  {
    const python::Unlocked others_run;
    continue_forward(inputs, out_acc_view, lse_view, out_view, flags_view);
  }
  return python::new_reference(&_Py_TrueStruct);
}

// A function of Python's: what `run` makes of `expected` arguments, or None where the operator has to be asked; nothing has
// happened then.
template <auto run, ssize_t expected>
PyObject* call_directly(PyObject*, PyObject* const* arguments, ssize_t count) {
  try {
    if (count == expected) return run(arguments);
  } catch (const std::exception&) {
    PyErr_Clear();
  }
  return python::new_reference(python::none());
}

}  // namespace

// Makes a pair of Python functions that take the arguments of the schemas by position: forward, which may also be given no
// scale, is told whether lse is wanted, and gives (out, lse); and forward_into, which gives True. Borrows what Surroundings
// lists, and is called with Python's lock held. None if this Torch's exchange table is of no version that we know.
extern "C" __attribute__((visibility("default"))) PyObject* fa3_dist_direct_calls(
    const void* exchange_table, PyObject* tensor_type, PyObject* empty, PyObject* bf16, PyObject* fp16, PyObject* fp32) {
  static PyMethodDef methods[2] = {{"forward", call_directly<run_forward, 17>, python::kFastCall, nullptr},
                                   {"forward_into", call_directly<run_forward_into, 17>, python::kFastCall, nullptr}};
  auto exchange = static_cast<const dlpack::Exchange*>(exchange_table);
  while (exchange != nullptr && exchange->major_version != 1) exchange = exchange->older;
  if (exchange == nullptr || exchange->view == nullptr) return python::new_reference(python::none());
  surroundings = {exchange, tensor_type, empty, {bf16, fp16, fp32}};
  for (PyObject* kept : {tensor_type, empty, bf16, fp16, fp32}) Py_IncRef(kept);
  return python::make_tuple(2, [](ssize_t i) { return PyCFunction_NewEx(&methods[i], nullptr, nullptr); }).release();
}

STABLE_TORCH_LIBRARY_IMPL(fa3_dist, CUDA, m) {
  m.impl("forward_sm90", TORCH_BOX(&forward_sm90));
  m.impl("forward_into_sm90", TORCH_BOX(&forward_into_sm90));
  m.impl("delta_sm90", TORCH_BOX(&delta_sm90));
  m.impl("backward_sm90", TORCH_BOX(&backward_sm90));
  m.impl("round_dq_sm90", TORCH_BOX(&round_dq_sm90));
}

// JSON: version, variants, csrc_hash, nvcc, cutlass. The string lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* fa3_dist_build_info() { return FA3_DIST_BUILD_INFO; }
