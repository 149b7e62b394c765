// A module of TVM's kind "cuda" that carries PTX, made from one that carries CUDA C++.
//
// TVM without a GPU compiles to a module that holds the source, and a library with it needs a compiler on the machine
// that runs it. What such a module writes into a library is: its format, the kernels' signatures, its text.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <string>

namespace {

using tvm::ffi::Bytes;
using tvm::ffi::Module;
using tvm::ffi::String;

// As TVM writes a string into a stream of bytes.
std::string written(const std::string& text) {
  uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;
}

class PtxModule : public tvm::ffi::ModuleObj {
 public:
  PtxModule(std::string bytes, std::string ptx) : bytes_(std::move(bytes)), ptx_(std::move(ptx)) {}
  const char* kind() const final { return "cuda"; }
  int GetPropertyMask() const final { return Module::kBinarySerializable; }
  tvm::ffi::Optional<tvm::ffi::Function> GetFunction(const String&) final { return std::nullopt; }
  Bytes SaveToBytes() const final { return Bytes(bytes_); }
  String InspectSource(const String&) const final { return ptx_; }

 private:
  std::string bytes_, ptx_;
};

Module with_ptx(const Module& source, const String& ptx) {
  std::string bytes = source->SaveToBytes();
  std::string begin = written("cuda"), end = written(source->InspectSource(""));
  bool known = bytes.size() >= begin.size() + end.size() && bytes.compare(0, begin.size(), begin) == 0 &&
               bytes.compare(bytes.size() - end.size(), end.size(), end) == 0;
  TVM_FFI_CHECK(known, ValueError) << "TVM writes modules of CUDA C++ in an unknown form";
  std::string signatures = bytes.substr(begin.size(), bytes.size() - begin.size() - end.size());
  std::string made = written("ptx") + signatures + written(ptx);
  return Module(tvm::ffi::make_object<PtxModule>(std::move(made), ptx));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(with_ptx, with_ptx);
