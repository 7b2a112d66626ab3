// The part of ONNX Runtime's C interface that the custom operator uses, declared in our own words: no package on PyPI
// or in Debian brings the headers. The interface is versioned and only ever grows at its end, so that a table of functions
// asked for by number keeps its places in every later release (onnxruntime_c_api.cc, "Rules on how to add a new Ort API
// version"). tests/exporters/test_onnx_library.py calls all that is declared here, on the release that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace swiftprune::ort {

// The first version with all of the functions below: onnxruntime 1.17.
constexpr uint32_t kApiVersion = 17;

// Objects of the runtime, only ever pointed to.
struct Status;
struct Value;
struct TensorInfo;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;

enum class ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kBFloat16 = 16 };
enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// A function of the table: where it stands, and how it is called. Those that return a Status return null for success.
template <size_t kPlace, class Signature>
struct Function;

struct Api {
  const void* const* table;

  template <size_t kPlace, class Result, class... Parameters, class... Arguments>
  Result operator()(Function<kPlace, Result(Parameters...)>, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Parameters...)>(const_cast<void*>(table[kPlace]))(arguments...);
  }
};

template <size_t kPlace, class Signature>
struct Function {};

constexpr Function<0, Status*(ErrorCode, const char* message)> CreateStatus;
constexpr Function<2, const char*(const Status*)> GetErrorMessage;
constexpr Function<26, Status*(const char* name, CustomOpDomain**)> CreateCustomOpDomain;
constexpr Function<27, Status*(CustomOpDomain*, const struct CustomOp*)> CustomOpDomainAdd;
constexpr Function<28, Status*(SessionOptions*, CustomOpDomain*)> AddCustomOpDomain;
constexpr Function<51, Status*(Value*, void** data)> GetTensorMutableData;
constexpr Function<61, Status*(const TensorInfo*, size_t*)> GetDimensionsCount;
constexpr Function<62, Status*(const TensorInfo*, int64_t* dimensions, size_t count)> GetDimensions;
constexpr Function<65, Status*(const Value*, TensorInfo**)> GetTensorTypeAndShape;
constexpr Function<90, Status*(const KernelContext*, size_t index, const Value**)> KernelContextGetInput;
constexpr Function<91, Status*(KernelContext*, size_t index, const int64_t* dimensions, size_t count, Value**)>
    KernelContextGetOutput;
constexpr Function<93, void(Status*)> ReleaseStatus;
constexpr Function<99, void(TensorInfo*)> ReleaseTensorTypeAndShapeInfo;
// With a null buffer it gives the length, the closing zero counted.
constexpr Function<244, Status*(const KernelInfo*, char* name, size_t* length)> KernelInfoGetNodeName;
constexpr Function<249, Status*(const KernelInfo*, size_t index, int* is_constant, const Value**)>
    KernelInfoGetConstantInputTensor;
// Calls run(data, i) for 0 <= i < total on the session's threads; batches 0: no limit.
constexpr Function<274, Status*(const KernelContext*, void (*run)(void*, size_t), size_t total, size_t batches, void* data)>
    KernelContextParallelFor;

// What RegisterCustomOps is handed.
struct ApiBase {
  const void* const* (*get_api)(uint32_t version);  // null when the runtime is older
  const char* (*version)();
};

// An operator: the runtime reads as many members as `version` has.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*) = nullptr;  // create_kernel_v2 is used
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*execution_provider)(const CustomOp*) = nullptr;  // null: the CPU
  ElementType (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  ElementType (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void* kernel, KernelContext*) = nullptr;  // compute_v2 is used
  void (*destroy)(void* kernel) = nullptr;
  int (*input_characteristic)(const CustomOp*, size_t) = nullptr;   // 0: required
  int (*output_characteristic)(const CustomOp*, size_t) = nullptr;  // 0: required
  int (*input_memory_type)(const CustomOp*, size_t) = nullptr;      // 0: the provider's own
  int (*variadic_input_min_arity)(const CustomOp*) = nullptr;
  int (*variadic_input_homogeneity)(const CustomOp*) = nullptr;
  int (*variadic_output_min_arity)(const CustomOp*) = nullptr;
  int (*variadic_output_homogeneity)(const CustomOp*) = nullptr;
  Status* (*create_kernel_v2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel) = nullptr;
  Status* (*compute_v2)(void* kernel, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, void* context) = nullptr;
  int (*start_version)(const CustomOp*) = nullptr;
  int (*end_version)(const CustomOp*) = nullptr;
};

}  // namespace swiftprune::ort
