// swiftprune::MatMul24(x, values, metadata) for ONNX Runtime: y (..., N) = x (..., K) W^T, W the packed 2:4 weight of
// the specification (swiftprune/formats/spec.py). A library of its own, registered with a session by
// `register_custom_ops_library`; it takes the place of the model-local function of the same name.
//
// values and metadata are initializers. They are checked and tiled when the session is made; after that
// their memory is not read again. x is of the type of the values, or fp32 beside 16-bit values; sums are in fp32.
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "group.h"
#include "linear24.h"
#include "onnxruntime_abi.h"
#include "sparse24.h"
#include "tiled.h"
#include "threads.h"

namespace swiftprune {
namespace {

constexpr size_t kInputCount = 3;

std::atomic<int64_t> created[std::size(kLinearIsas)];

void check(const ort::Api& api, ort::Status* status) {
  if (!status) return;
  const std::string message = api(ort::GetErrorMessage, status);
  api(ort::ReleaseStatus, status);
  throw std::runtime_error(message);
}

// Runs work; what it throws becomes the runtime's own kind of error.
template <class F>
ort::Status* guarded(const ort::Api& api, const std::string& name, F work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    const std::string message = "swiftprune::MatMul24" + (name.empty() ? "" : " " + name) + ": " + error.what();
    return api(ort::CreateStatus, ort::ErrorCode::kInvalidArgument, message.c_str());
  }
}

const char* dtype_name(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "float32" : dtype == Dtype::kFloat16 ? "float16" : "bfloat16";
}

ort::ElementType element_type(Dtype dtype) {
  return dtype == Dtype::kFloat32   ? ort::ElementType::kFloat
         : dtype == Dtype::kFloat16 ? ort::ElementType::kFloat16
                                    : ort::ElementType::kBFloat16;
}

struct Tensor {
  std::vector<int64_t> shape;
  void* data = nullptr;

  Tensor(const ort::Api& api, const ort::Value* value) {
    ort::TensorInfo* info = nullptr;
    check(api, api(ort::GetTensorTypeAndShape, value, &info));
    const auto release = [&api](ort::TensorInfo* i) { api(ort::ReleaseTensorTypeAndShapeInfo, i); };
    const std::unique_ptr<ort::TensorInfo, decltype(release)> owner(info, release);
    size_t count = 0;
    check(api, api(ort::GetDimensionsCount, info, &count));
    shape.resize(count);
    check(api, api(ort::GetDimensions, info, shape.data(), count));
    check(api, api(ort::GetTensorMutableData, const_cast<ort::Value*>(value), &data));
  }

  std::string shape_text() const {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
  }
};

// Large initializers are pages of the mapped file. What has been read is handed back, so that the packed weight is not
// in memory twice; the pages stay valid, and a later read would fetch them again.
void page_out([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#endif
}

void check_metadata(const uint8_t* metadata, int64_t rows, int64_t cols) {
  const int64_t groups = cols / kGroup, stride = metadata_stride(cols);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t g = 0; g < 2 * stride; ++g) {
      const auto nibble = static_cast<uint8_t>(metadata[row * stride + g / 2] >> (g % 2 * 4) & 15u);
      if (g < groups ? valid_nibble(nibble) : nibble == 0) continue;
      char text[160];
      std::snprintf(text, sizeof text,
                    "metadata of row %lld, group %lld is %#x, not a pair of ascending positions; the file is damaged",
                    static_cast<long long>(row), static_cast<long long>(g), nibble);
      throw std::runtime_error(text);
    }
}

// The kernel that SWIFTPRUNE_BACKEND names, or the fastest.
size_t choose_isa(Dtype dtype, Dtype x_dtype) {
  const char* asked = std::getenv("SWIFTPRUNE_BACKEND");
  std::string available;
  for (size_t i = 0; i < std::size(kLinearIsas); ++i) {
    if (!linear24_for(kLinearIsas[i], dtype, x_dtype)) continue;
    if (!asked || std::strcmp(asked, kLinearIsas[i]) == 0) return i;
    available += std::string(available.empty() ? "" : ", ") + kLinearIsas[i];
  }
  throw std::runtime_error(std::string("backend '") + (asked ? asked : "") + "' (SWIFTPRUNE_BACKEND) cannot run " +
                           dtype_name(x_dtype) + " inputs and " + dtype_name(dtype) +
                           " values on this machine; available: " + available);
}

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

class Kernel {
 public:
  Kernel(ort::Api api, const ort::KernelInfo* info, Dtype dtype, Dtype x_dtype, std::string name)
      : api_(api), dtype_(dtype), x_dtype_(x_dtype), name_(std::move(name)) {
    const Tensor values = initializer(info, 1, "values"), metadata = initializer(info, 2, "metadata");
    if (values.shape.size() != 2 || values.shape[0] <= 0 || values.shape[1] <= 0 || values.shape[1] % kKept)
      throw std::runtime_error("values must be (N, K/2) with K a multiple of 4, not " + values.shape_text());
    rows_ = values.shape[0];
    cols_ = values.shape[1] / kKept * kGroup;
    const int64_t stride = metadata_stride(cols_);
    if (metadata.shape != std::vector<int64_t>{rows_, stride})
      throw std::runtime_error("metadata must be (" + std::to_string(rows_) + ", " + std::to_string(stride) +
                               ") beside values " + values.shape_text() + ", not " + metadata.shape_text());
    check_metadata(static_cast<const uint8_t*>(metadata.data), rows_, cols_);

    const size_t isa = choose_isa(dtype, x_dtype);
    run_ = linear24_for(kLinearIsas[isa], dtype, x_dtype);
    bytes_ = tiled_bytes(dtype, rows_, cols_);
    tiled_.reset(std::aligned_alloc(kCacheLine, ceil_div(bytes_, kCacheLine) * kCacheLine));
    if (!tiled_) throw std::bad_alloc();
    advise_huge_pages(tiled_.get(), bytes_);
    const int64_t blocks = blocks_of(rows_), parts = parts_of(bytes_);
    std::atomic<bool> valid{true};
    in_parallel(static_cast<int>(parts), [&](int i) {
      if (!to_tiled(dtype, values.data, static_cast<const uint8_t*>(metadata.data), rows_, cols_, tiled_.get(),
                     blocks * i / parts, blocks * (i + 1) / parts))
        valid = false;
    });
    if (!valid) throw std::runtime_error("a stored value is infinite or not a number");  // metadata was checked
    page_out(values, rows_ * cols_ / 2 * (dtype == Dtype::kFloat32 ? 4 : 2));
    page_out(metadata, rows_ * stride);
    ++created[isa];
  }

  const ort::Api& api() const { return api_; }
  const std::string& name() const { return name_; }

  void compute(ort::KernelContext* context) const {
    const ort::Value* input = nullptr;
    check(api_, api_(ort::KernelContextGetInput, context, size_t{0}, &input));
    const Tensor x(api_, input);
    if (x.shape.empty() || x.shape.back() != cols_)
      throw std::runtime_error("x must be (..., " + std::to_string(cols_) + "), not " + x.shape_text());
    std::vector<int64_t> shape = x.shape;
    shape.back() = rows_;
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
    ort::Value* output = nullptr;
    check(api_, api_(ort::KernelContextGetOutput, context, size_t{0}, static_cast<const int64_t*>(shape.data()),
                     shape.size(), &output));
    void* y = nullptr;
    check(api_, api_(ort::GetTensorMutableData, output, &y));
    if (tokens == 0) return;

    const int x_dtype = static_cast<int>(x_dtype_);
    const swiftprune_linear24_args args{static_cast<int>(dtype_), x_dtype, x_dtype, tiled_.get(), nullptr, x.data, cols_,
                                        y, rows_, tokens, rows_, cols_};
    Call call{args, run_, blocks_of(rows_), parts_of(tokens * bytes_)};
    if (call.parts == 1) return run_(&args, 0, call.blocks);
    check(api_, api_(ort::KernelContextParallelFor, context, Call::part, static_cast<size_t>(call.parts), size_t{0},
                     static_cast<void*>(&call)));
  }

 private:
  struct Call {
    const swiftprune_linear24_args& args;
    swiftprune_linear24_fn run;
    int64_t blocks, parts;
    static void part(void* data, size_t index) {
      const auto& call = *static_cast<const Call*>(data);
      const auto i = static_cast<int64_t>(index);
      call.run(&call.args, call.blocks * i / call.parts, call.blocks * (i + 1) / call.parts);
    }
  };

  // The runtime does not say how many threads it has, so the parts are as many as the machine can run at once.
  int64_t parts_of(int64_t bytes) const {
    static const int64_t cpus = std::max(1u, std::thread::hardware_concurrency());
    return std::min({cpus, blocks_of(rows_), 1 + bytes / kBytesPerThread});
  }

  Tensor initializer(const ort::KernelInfo* info, size_t index, const char* what) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    check(api_, api_(ort::KernelInfoGetConstantInputTensor, info, index, &is_constant, &value));
    if (!is_constant || !value) throw std::runtime_error(std::string(what) + " must be an initializer of the model");
    return Tensor(api_, value);
  }

  ort::Api api_;
  Dtype dtype_, x_dtype_;
  std::string name_;
  int64_t rows_ = 0, cols_ = 0, bytes_ = 0;
  swiftprune_linear24_fn run_ = nullptr;
  std::unique_ptr<void, FreeMemory> tiled_;
};

std::string node_name(const ort::Api& api, const ort::KernelInfo* info) {
  size_t length = 0;
  check(api, api(ort::KernelInfoGetNodeName, info, static_cast<char*>(nullptr), &length));
  std::string name(length, '\0');
  check(api, api(ort::KernelInfoGetNodeName, info, name.data(), &length));
  name.resize(length ? length - 1 : 0);
  return name;
}

// One operator for each pair of types.
struct Op : ort::CustomOp {
  Dtype x_dtype, dtype;

  Op(Dtype x_dtype, Dtype dtype) : x_dtype(x_dtype), dtype(dtype) {
    name = [](const CustomOp*) { return "MatMul24"; };
    execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
    input_count = [](const CustomOp*) { return kInputCount; };
    output_count = [](const CustomOp*) { return size_t{1}; };
    input_type = [](const CustomOp* self, size_t index) {
      const auto& op = *static_cast<const Op*>(self);
      return index == 0 ? element_type(op.x_dtype) : index == 1 ? element_type(op.dtype) : ort::ElementType::kUint8;
    };
    output_type = [](const CustomOp* self, size_t) { return element_type(static_cast<const Op*>(self)->x_dtype); };
    input_characteristic = output_characteristic = input_memory_type = [](const CustomOp*, size_t) { return 0; };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 1; };
    create_kernel_v2 = [](const CustomOp* self, const void* const* table, const ort::KernelInfo* info, void** kernel) {
      const ort::Api api{table};
      const auto& op = *static_cast<const Op*>(self);
      std::string name;
      if (ort::Status* status = guarded(api, name, [&] { name = node_name(api, info); })) return status;
      return guarded(api, name, [&] { *kernel = new Kernel(api, info, op.dtype, op.x_dtype, name); });
    };
    compute_v2 = [](void* kernel, ort::KernelContext* context) {
      const auto& own = *static_cast<const Kernel*>(kernel);
      return guarded(own.api(), own.name(), [&] { own.compute(context); });
    };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

const Op kOps[] = {
    {Dtype::kFloat32, Dtype::kFloat32}, {Dtype::kFloat32, Dtype::kFloat16},   {Dtype::kFloat32, Dtype::kBFloat16},
    {Dtype::kFloat16, Dtype::kFloat16}, {Dtype::kBFloat16, Dtype::kBFloat16},
};

}  // namespace
}  // namespace swiftprune

#define SWIFTPRUNE_EXPORT extern "C" __attribute__((visibility("default")))

// What `register_custom_ops_library` calls. The domain serves every session of the process and is never released.
SWIFTPRUNE_EXPORT swiftprune::ort::Status* RegisterCustomOps(swiftprune::ort::SessionOptions* options,
                                                             const swiftprune::ort::ApiBase* base) {
  using namespace swiftprune;
  const ort::Api api{base->get_api(ort::kApiVersion)};
  if (!api.table) return nullptr;  // the runtime has said that the version is unknown to it, and finds no operator
  static ort::CustomOpDomain* domain = nullptr;
  return guarded(api, "", [&] {
    if (!domain) {
      ort::CustomOpDomain* made = nullptr;
      check(api, api(ort::CreateCustomOpDomain, "swiftprune", &made));
      for (const Op& op : kOps) check(api, api(ort::CustomOpDomainAdd, made, static_cast<const ort::CustomOp*>(&op)));
      domain = made;
    }
    check(api, api(ort::AddCustomOpDomain, options, domain));
  });
}

// Kernels made so far in this process that run on an instruction set of `kLinearIsas`; -1 past the last.
SWIFTPRUNE_EXPORT int64_t swiftprune_kernels_created(size_t isa) {
  return isa < std::size(swiftprune::kLinearIsas) ? swiftprune::created[isa].load() : -1;
}
