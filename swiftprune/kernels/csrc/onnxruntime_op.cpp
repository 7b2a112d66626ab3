// swiftprune::MatMul24(x, values, metadata) for ONNX Runtime: y (..., N) = x (..., K) W^T, W the packed 2:4 weight of
// the specification (swiftprune/formats/spec.py); and MatMul24Int8 and MatMul24Int4, which have scales as a fourth input. A
// library of its own, registered with a session by `register_custom_ops_library`; its operators take the place of the
// model-local functions of the same names.
//
// All inputs but x are initializers. They are checked and tiled when the session is made; after that their memory is not
// read again. x is of the type of the values, or fp32 beside 16-bit values; beside quantized ones of any float type.
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
#include "quantized.h"
#include "sparse24.h"
#include "tiled.h"
#include "threads.h"

namespace swiftprune {
namespace {

std::atomic<int64_t> created[std::size(kLinearIsas)], created_quantized[2][std::size(kQuantIsas)];
const char* const kQuantNames[] = {"int8", "int4"};

std::string quantized_name(size_t isa, int bits) {
  return std::string(kQuantIsas[isa]) + "-" + kQuantNames[bits == 4];
}

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
    const std::string message = "swiftprune::" + name + ": " + error.what();
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

// The first of `isas` that runs here, or that SWIFTPRUNE_BACKEND names, by itself or by its backend's whole name.
template <size_t kCount, class Runs, class Name>
size_t choose_isa(const char* const (&isas)[kCount], Runs runs, Name name, const std::string& what) {
  const char* asked = std::getenv("SWIFTPRUNE_BACKEND");
  std::string available;
  for (size_t i = 0; i < kCount; ++i) {
    if (!runs(isas[i])) continue;
    if (!asked || asked == name(i) || std::strcmp(asked, isas[i]) == 0) return i;
    available += (available.empty() ? "" : ", ") + name(i);
  }
  throw std::runtime_error(std::string("backend '") + (asked ? asked : "") + "' (SWIFTPRUNE_BACKEND) cannot run " + what +
                           " values on this machine; available: " + available);
}

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

// What of kernels there is for every kind of values: shapes, the tiled weight, and the call.
class Kernel {
 public:
  Kernel(ort::Api api, std::string name) : api_(api), name_(std::move(name)) {}
  virtual ~Kernel() = default;

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
    multiply(x.data, y, tokens, [&](int count, const std::function<void(int)>& work) {
      if (count == 1) return work(0);
      const auto part = [](void* data, size_t i) { (*static_cast<const std::function<void(int)>*>(data))(static_cast<int>(i)); };
      check(api_, api_(ort::KernelContextParallelFor, context, static_cast<void (*)(void*, size_t)>(part),
                       static_cast<size_t>(count), size_t{0},
                       const_cast<void*>(static_cast<const void*>(&work))));
    });
  }

 protected:
  virtual void multiply(const void* x, void* y, int64_t tokens, const Parallel& parallel) const = 0;

  // Reads the shape off metadata (N, ceil(K/8)) beside values of which each holds `per_value` weights.
  void set_shape(const Tensor& values, const Tensor& metadata, int64_t per_value) {
    if (values.shape.size() != 2 || values.shape[0] <= 0 || values.shape[1] <= 0 || values.shape[1] * per_value % kGroup)
      throw std::runtime_error("values must be (N, K/" + std::to_string(per_value) + ") with K a multiple of 4, not " +
                               values.shape_text());
    rows_ = values.shape[0];
    cols_ = values.shape[1] * per_value;
    require(metadata, "metadata", values, {rows_, metadata_stride(cols_)});
    check_metadata(static_cast<const uint8_t*>(metadata.data), rows_, cols_);
  }

  static void require(const Tensor& tensor, const char* what, const Tensor& values, const std::vector<int64_t>& shape) {
    if (tensor.shape == shape) return;
    throw std::runtime_error(std::string(what) + " must be (" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                             ") beside values " + values.shape_text() + ", not " + tensor.shape_text());
  }

  // Memory for the tiled weight of so many bytes, filled by `fill(first, last)`, which says whether those blocks are valid.
  template <class Fill>
  bool tile(int64_t bytes, Fill fill) {
    bytes_ = bytes;
    tiled_.reset(std::aligned_alloc(kCacheLine, ceil_div(bytes_, kCacheLine) * kCacheLine));
    if (!tiled_) throw std::bad_alloc();
    advise_huge_pages(tiled_.get(), bytes_);
    const int64_t blocks = blocks_of(rows_), parts = parts_of(bytes_);
    std::atomic<bool> valid{true};
    in_parallel(static_cast<int>(parts), [&](int i) {
      if (!fill(blocks * i / parts, blocks * (i + 1) / parts)) valid = false;
    });
    return valid;
  }

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
  std::string name_;
  int64_t rows_ = 0, cols_ = 0, bytes_ = 0;
  std::unique_ptr<void, FreeMemory> tiled_;
};

class FloatKernel : public Kernel {
 public:
  FloatKernel(ort::Api api, const ort::KernelInfo* info, Dtype dtype, Dtype x_dtype, std::string name)
      : Kernel(api, std::move(name)), dtype_(dtype), x_dtype_(x_dtype) {
    const Tensor values = initializer(info, 1, "values"), metadata = initializer(info, 2, "metadata");
    set_shape(values, metadata, kGroup / kKept);
    const size_t isa = choose_isa(
        kLinearIsas, [&](const char* name) { return linear24_for(name, dtype, x_dtype) != nullptr; },
        [](size_t i) { return std::string(kLinearIsas[i]); },
        std::string(dtype_name(x_dtype)) + " inputs and " + dtype_name(dtype));
    run_ = linear24_for(kLinearIsas[isa], dtype, x_dtype);
    const bool valid = tile(tiled_bytes(dtype, rows_, cols_), [&](int64_t first, int64_t last) {
      return to_tiled(dtype, values.data, static_cast<const uint8_t*>(metadata.data), rows_, cols_, tiled_.get(), first, last);
    });
    if (!valid) throw std::runtime_error("a stored value is infinite or not a number");  // metadata was checked
    page_out(values, rows_ * cols_ / 2 * (dtype == Dtype::kFloat32 ? 4 : 2));
    page_out(metadata, rows_ * metadata_stride(cols_));
    ++created[isa];
  }

 private:
  void multiply(const void* x, void* y, int64_t tokens, const Parallel& parallel) const override {
    const int x_dtype = static_cast<int>(x_dtype_);
    const swiftprune_linear24_args args{static_cast<int>(dtype_), x_dtype, x_dtype, tiled_.get(), nullptr, x, cols_,
                                        y, rows_, tokens, rows_, cols_};
    const int64_t blocks = blocks_of(rows_), parts = parts_of(tokens * bytes_);
    parallel(static_cast<int>(parts), [&](int i) { run_(&args, blocks * i / parts, blocks * (i + 1) / parts); });
  }

  Dtype dtype_, x_dtype_;
  swiftprune_linear24_fn run_ = nullptr;
};

class QuantizedKernel : public Kernel {
 public:
  QuantizedKernel(ort::Api api, const ort::KernelInfo* info, int bits, Dtype x_dtype, std::string name)
      : Kernel(api, std::move(name)), bits_(bits), x_dtype_(x_dtype) {
    const Tensor values = initializer(info, 1, "values"), metadata = initializer(info, 2, "metadata"),
                 scales = initializer(info, 3, "scales");
    set_shape(values, metadata, bits == 8 ? 2 : 4);
    require(scales, "scales", values, {rows_, bits == 8 ? 1 : quant_chunks(cols_)});
    const size_t isa = choose_isa(
        kQuantIsas, [](const char* name) { return quant_kernel_for(name) != nullptr; },
        [&](size_t i) { return quantized_name(i, bits); }, kQuantNames[bits == 4]);
    kernel_ = quant_kernel_for(kQuantIsas[isa]);
    const bool valid = tile(quant_bytes(bits, rows_, cols_), [&](int64_t first, int64_t last) {
      return to_quant_tiled(bits, static_cast<const uint8_t*>(values.data), static_cast<const uint8_t*>(metadata.data),
                            static_cast<const uint16_t*>(scales.data), rows_, cols_, tiled_.get(), first, last);
    });
    if (!valid) throw std::runtime_error("a scale is infinite or not a number, or a value is -128");
    page_out(values, rows_ * values.shape[1]);
    page_out(metadata, rows_ * metadata_stride(cols_));
    ++created_quantized[bits == 4][isa];
  }

 private:
  void multiply(const void* x, void* y, int64_t tokens, const Parallel& parallel) const override {
    run_quant24(*kernel_, {bits_, static_cast<int>(x_dtype_), tiled_.get(), nullptr, x, cols_, y, rows_, tokens, rows_, cols_, {}},
                static_cast<int>(parts_of(tokens * bytes_)), parallel);
  }

  int bits_;
  Dtype x_dtype_;
  const QuantKernel* kernel_ = nullptr;
};

std::string node_name(const ort::Api& api, const ort::KernelInfo* info) {
  size_t length = 0;
  check(api, api(ort::KernelInfoGetNodeName, info, static_cast<char*>(nullptr), &length));
  std::string name(length, '\0');
  check(api, api(ort::KernelInfoGetNodeName, info, name.data(), &length));
  name.resize(length ? length - 1 : 0);
  return name;
}

// One operator for each pair of types; `bits` are those of quantized values, else 0.
struct Op : ort::CustomOp {
  Dtype x_dtype, dtype;
  int bits;

  Op(Dtype x_dtype, Dtype dtype, int bits = 0) : x_dtype(x_dtype), dtype(dtype), bits(bits) {
    name = [](const CustomOp* self) {
      const auto& op = *static_cast<const Op*>(self);
      return op.bits == 8 ? "MatMul24Int8" : op.bits == 4 ? "MatMul24Int4" : "MatMul24";
    };
    execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
    input_count = [](const CustomOp* self) { return static_cast<const Op*>(self)->bits ? size_t{4} : size_t{3}; };
    output_count = [](const CustomOp*) { return size_t{1}; };
    input_type = [](const CustomOp* self, size_t index) {
      const auto& op = *static_cast<const Op*>(self);
      if (index == 0) return element_type(op.x_dtype);
      if (index == 2) return ort::ElementType::kUint8;
      if (index == 3) return ort::ElementType::kBFloat16;
      return op.bits == 8 ? ort::ElementType::kInt8 : op.bits == 4 ? ort::ElementType::kUint8 : element_type(op.dtype);
    };
    output_type = [](const CustomOp* self, size_t) { return element_type(static_cast<const Op*>(self)->x_dtype); };
    input_characteristic = output_characteristic = input_memory_type = [](const CustomOp*, size_t) { return 0; };
    start_version = [](const CustomOp*) { return 1; };
    end_version = [](const CustomOp*) { return 1; };
    create_kernel_v2 = [](const CustomOp* self, const void* const* table, const ort::KernelInfo* info, void** kernel) {
      const ort::Api api{table};
      const auto& op = *static_cast<const Op*>(self);
      std::string name = self->name(self);
      if (ort::Status* status = guarded(api, name, [&] { name += " " + node_name(api, info); })) return status;
      return guarded(api, name, [&] {
        Kernel* made = nullptr;
        if (op.bits)
          made = new QuantizedKernel(api, info, op.bits, op.x_dtype, name);
        else
          made = new FloatKernel(api, info, op.dtype, op.x_dtype, name);
        *kernel = made;
      });
    };
    compute_v2 = [](void* kernel, ort::KernelContext* context) {
      const auto& own = *static_cast<const Kernel*>(kernel);
      return guarded(own.api(), own.name(), [&] { own.compute(context); });
    };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

const Op kOps[] = {
    {Dtype::kFloat32, Dtype::kFloat32},    {Dtype::kFloat32, Dtype::kFloat16},      {Dtype::kFloat32, Dtype::kBFloat16},
    {Dtype::kFloat16, Dtype::kFloat16},    {Dtype::kBFloat16, Dtype::kBFloat16},    {Dtype::kFloat32, Dtype::kFloat32, 8},
    {Dtype::kFloat16, Dtype::kFloat16, 8}, {Dtype::kBFloat16, Dtype::kBFloat16, 8}, {Dtype::kFloat32, Dtype::kFloat32, 4},
    {Dtype::kFloat16, Dtype::kFloat16, 4}, {Dtype::kBFloat16, Dtype::kBFloat16, 4},
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
  return guarded(api, "MatMul24", [&] {
    if (!domain) {
      ort::CustomOpDomain* made = nullptr;
      check(api, api(ort::CreateCustomOpDomain, "swiftprune", &made));
      for (const Op& op : kOps) check(api, api(ort::CustomOpDomainAdd, made, static_cast<const ort::CustomOp*>(&op)));
      domain = made;
    }
    check(api, api(ort::AddCustomOpDomain, options, domain));
  });
}

// Kernels made so far in this process that run on the backend of that name, `avx512` or `avx512_vnni-int8` say.
SWIFTPRUNE_EXPORT int64_t swiftprune_kernels_created(const char* backend) {
  using namespace swiftprune;
  for (size_t i = 0; i < std::size(kLinearIsas); ++i)
    if (std::strcmp(backend, kLinearIsas[i]) == 0) return created[i].load();
  for (int bits : {8, 4})
    for (size_t i = 0; i < std::size(kQuantIsas); ++i)
      if (backend == quantized_name(i, bits)) return created_quantized[bits == 4][i].load();
  return 0;
}
