// Loads a library that rankc compiled and runs it: tensors in, tensors out.
//
// Needs the headers of apache-tvm-ffi (C++17) and, to link, libtvm_ffi.so and libtvm_runtime.so; see docs/deploy.md.
//
//   rankc::Library library("model.so");
//   tvm::ffi::Tensor x = library.make_tensor(library.inputs()[0].dtype, {1, 3, 32, 32}, pixels, bytes);
//   std::vector<tvm::ffi::Tensor> outputs = library.run({x});
#ifndef RANKC_RUNNER_H_
#define RANKC_RUNNER_H_

#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace rankc {

// What a caller can mend: a file, a name, a shape, an option. `code` is an exit code: 2 usage, 4 input.
class InputError : public std::runtime_error {
 public:
  explicit InputError(const std::string& message, int code = 4) : std::runtime_error(message), code(code) {}
  const int code;
};

// An input or output; a dimension that is symbolic has the size -1, and its name in `names`.
struct TensorInfo {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<std::string> names;

  // "x: float32[batch, 3, 32, 32]"
  std::string text() const {
    std::string sizes;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      sizes += (axis ? ", " : "") + (shape[axis] < 0 ? names[axis] : std::to_string(shape[axis]));
    }
    return name + ": " + dtype + "[" + sizes + "]";
  }
};

inline std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

inline std::string shape_text(tvm::ffi::ShapeView shape) {
  std::string sizes;
  for (size_t axis = 0; axis < shape.size(); ++axis) sizes += (axis ? ", " : "") + std::to_string(shape[axis]);
  return "[" + sizes + "]";
}

// One loaded library. Not to be used by two threads at once.
class Library {
 public:
  using Tensor = tvm::ffi::Tensor;

  // `threads`: of TVM's pool, for code that was compiled for several; 0 leaves them as they are.
  // InputError where the file is no library of rankc or is for another processor.
  explicit Library(const std::string& path, int threads = 0)
      : module_(load(path)), metadata_(read_metadata(module_, path)) {
    namespace json = tvm::ffi::json;
    tvm::ffi::String problem;
    json::Value parsed = json::Parse(metadata_, &problem);
    if (!problem.empty()) throw InputError(path + ": its metadata is no JSON: " + std::string(problem));
    json::Object values = parsed.cast<json::Object>();
    if (values.at("schema").cast<int64_t>() != 1) throw InputError(path + ": its metadata has another schema than 1");
    inputs_ = tensors(values.at("inputs").cast<json::Array>());
    outputs_ = tensors(values.at("outputs").cast<json::Array>());
    std::string kind = values.at("target").cast<json::Object>().at("kind").cast<tvm::ffi::String>();
    device_ = DLDevice{kind == "cuda" ? kDLCUDA : kDLCPU, 0};
    if (threads > 0) tvm::ffi::Function::GetGlobalRequired("runtime.config_threadpool")(-1, threads);
    using tvm::ffi::Function;
    allocate_ = Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
    copy_in_ = Function::GetGlobalRequired("runtime.TVMTensorCopyFromBytes");
    copy_out_ = Function::GetGlobalRequired("runtime.TVMTensorCopyToBytes");
    synchronize_ = Function::GetGlobalRequired("runtime.Device_StreamSync");
    const int pooled = 2;  // the allocator that keeps what it has freed
    auto machine = function(module_, "vm_load_executable")().cast<tvm::ffi::Module>();
    Function initialize = function(machine, "vm_initialization");
    if (device_.device_type == kDLCPU) {
      initialize(static_cast<int>(kDLCPU), 0, pooled);
    } else {
      initialize(static_cast<int>(device_.device_type), 0, pooled, static_cast<int>(kDLCPU), 0, pooled);
    }
    main_ = function(machine, "main");  // keeps the machine
  }

  // The library's description of itself, one line of JSON.
  const std::string& metadata() const { return metadata_; }
  const std::vector<TensorInfo>& inputs() const { return inputs_; }
  const std::vector<TensorInfo>& outputs() const { return outputs_; }

  // A tensor on the library's device with a copy of `bytes` bytes at `data`, dense, in C order.
  Tensor make_tensor(const std::string& dtype, const std::vector<int64_t>& shape, const void* data, size_t bytes) {
    tvm::ffi::Shape sizes(shape.begin(), shape.end());
    Tensor made = allocate_(sizes, tvm::ffi::StringToDLDataType(dtype), device_, nullptr).cast<Tensor>();
    size_t wanted = tvm::ffi::GetDataSize(made);
    if (bytes != wanted) {
      throw InputError(std::to_string(bytes) + " bytes for a tensor of " + std::to_string(wanted));
    }
    if (bytes > 0) copy_in_(made, const_cast<void*>(data), static_cast<int64_t>(bytes));
    return made;
  }

  // The bytes of a tensor, dense, in C order.
  std::vector<char> bytes(const Tensor& tensor) {
    std::vector<char> data(tvm::ffi::GetDataSize(tensor));
    if (!data.empty()) copy_out_(tensor, static_cast<void*>(data.data()), static_cast<int64_t>(data.size()));
    return data;
  }

  // One inference: tensors of make_tensor in the order of inputs(), results in that of outputs().
  std::vector<Tensor> run(const std::vector<Tensor>& given) {
    check(given);
    std::vector<tvm::ffi::AnyView> packed(given.begin(), given.end());
    tvm::ffi::Any made;
    main_.CallPacked(packed.data(), static_cast<int32_t>(packed.size()), &made);
    if (device_.device_type != kDLCPU) synchronize_(device_, 0);
    std::vector<Tensor> results;
    if (auto one = made.as<Tensor>()) {
      results.push_back(*one);
    } else {
      for (const tvm::ffi::Any& each : made.cast<tvm::ffi::Array<tvm::ffi::Any>>()) {
        results.push_back(each.cast<Tensor>());
      }
    }
    return results;
  }

 private:
  static tvm::ffi::Module load(const std::string& path) {
    // dlopen looks for a name without a slash elsewhere
    std::string place = path.find('/') == std::string::npos ? "./" + path : path;
    if (!std::ifstream(place)) throw InputError(path + ": cannot be read");
    try {
      return tvm::ffi::Module::LoadFromFile(place);
    } catch (const tvm::ffi::Error& error) {
      throw InputError(path + ": cannot be loaded: " + first_line(error.message()));
    }
  }

  static std::string read_metadata(const tvm::ffi::Module& module, const std::string& path) {
    auto found = module->GetFunction("rankc_metadata", true);
    if (!found.has_value()) throw InputError(path + ": a library without metadata: not written by rankc");
    return found.value()().cast<tvm::ffi::String>();
  }

  static tvm::ffi::Function function(const tvm::ffi::Module& module, const char* name) {
    auto found = module->GetFunction(name, true);
    if (!found.has_value()) throw InputError(std::string("the library has no function ") + name);
    return found.value();
  }

  static std::vector<TensorInfo> tensors(const tvm::ffi::json::Array& entries) {
    namespace json = tvm::ffi::json;
    std::vector<TensorInfo> found;
    for (const tvm::ffi::Any& entry : entries) {
      json::Object values = entry.cast<json::Object>();
      TensorInfo info;
      info.name = values.at("name").cast<tvm::ffi::String>();
      info.dtype = values.at("dtype").cast<tvm::ffi::String>();
      for (const tvm::ffi::Any& size : values.at("shape").cast<json::Array>()) {
        auto symbol = size.as<tvm::ffi::String>();
        info.shape.push_back(symbol ? -1 : size.cast<int64_t>());
        info.names.push_back(symbol ? std::string(*symbol) : "");
      }
      found.push_back(info);
    }
    return found;
  }

  // The compiled code checks this too, in words that say less.
  void check(const std::vector<Tensor>& given) const {
    if (given.size() != inputs_.size()) {
      throw InputError(std::to_string(given.size()) + " inputs, expected " + std::to_string(inputs_.size()));
    }
    std::map<std::string, int64_t> sizes;
    for (size_t index = 0; index < given.size(); ++index) {
      const TensorInfo& info = inputs_[index];
      const Tensor& tensor = given[index];
      std::string dtype = tvm::ffi::DLDataTypeToString(tensor.dtype());
      if (dtype != info.dtype) throw InputError(info.name + " has dtype " + dtype + ", expected " + info.dtype);
      bool fits = static_cast<size_t>(tensor.ndim()) == info.shape.size();
      for (size_t axis = 0; fits && axis < info.shape.size(); ++axis) {
        int64_t wanted = info.shape[axis];
        if (wanted < 0) wanted = sizes.emplace(info.names[axis], tensor.shape()[axis]).first->second;
        fits = tensor.shape()[axis] == wanted;
      }
      if (!fits) {
        std::string text = info.text();
        throw InputError(info.name + " has shape " + shape_text(tensor.shape()) + ", expected " +
                         text.substr(text.rfind('[')));
      }
    }
  }

  tvm::ffi::Module module_;
  std::string metadata_;
  std::vector<TensorInfo> inputs_, outputs_;
  DLDevice device_{kDLCPU, 0};
  tvm::ffi::Function main_, allocate_, copy_in_, copy_out_, synchronize_;
};

}  // namespace rankc

#endif  // RANKC_RUNNER_H_
