// The part of model.so that hands subgraphs to the accelerator's driver. PROGRAMS is defined before this text.
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string>

namespace {

std::mutex guard;
const rankc_driver* driver = nullptr;
int64_t total_cycles = 0;

int fail(const std::string& message) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message.c_str());
  return -1;
}

// The table that "rankc.driver" gives, or nullptr.
const rankc_driver* registered() {
  static const char name[] = "rankc.driver";
  TVMFFIByteArray key{name, sizeof(name) - 1};
  TVMFFIObjectHandle function = nullptr;
  if (TVMFFIFunctionGetGlobal(&key, &function) != 0 || function == nullptr) return nullptr;
  TVMFFIAny result;
  result.type_index = kTVMFFINone;
  result.zero_padding = 0;
  result.v_int64 = 0;
  int failed = TVMFFIFunctionCall(function, nullptr, 0, &result);
  TVMFFIObjectDecRef(function);
  if (failed != 0 || result.type_index != kTVMFFIInt) return nullptr;
  return reinterpret_cast<const rankc_driver*>(result.v_int64);
}

int find_driver() {
  if (driver != nullptr) return 0;
  const rankc_driver* found = nullptr;
  if (const char* path = std::getenv("RANKC_DRIVER")) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return fail(std::string("RANKC_DRIVER cannot be loaded: ") + dlerror());
    auto get = reinterpret_cast<const rankc_driver* (*)()>(dlsym(library, "rankc_driver_get"));
    if (get == nullptr) return fail(std::string("RANKC_DRIVER=") + path + " has no function rankc_driver_get");
    found = get();
  } else {
    found = registered();
  }
  if (found == nullptr) {
    return fail("no driver for the accelerator: set RANKC_DRIVER to a driver's shared library, or register the "
                "simulator (in Python: import codegen.asic_binary.simulator as s; s.install())");
  }
  if (found->version != RANKC_DRIVER_VERSION) {
    return fail("the accelerator's driver has version " + std::to_string(found->version) + ", expected " +
                std::to_string(RANKC_DRIVER_VERSION));
  }
  driver = found;
  return 0;
}

struct Segment {
  const char* name;
  const char* begin;
  const char* end;
  int32_t inputs;
  int32_t outputs;
  void* handle;
  const rankc_driver* owner;
};

const DLTensor* tensor_of(const TVMFFIAny& value) {
  if (value.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(value.v_ptr);
  if (value.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(value.v_obj);
  return nullptr;
}

int run(Segment& segment, const TVMFFIAny* arguments, int32_t count) {
  std::lock_guard<std::mutex> lock(guard);
  if (find_driver() != 0) return -1;
  if (count != segment.inputs + segment.outputs) {
    return fail(std::string(segment.name) + " takes " + std::to_string(segment.inputs + segment.outputs) +
                " tensors, not " + std::to_string(count));
  }
  if (segment.owner != driver) {
    if (segment.owner != nullptr) segment.owner->unload(segment.handle);
    segment.owner = nullptr;
    if (driver->load(segment.begin, segment.end - segment.begin, &segment.handle) != 0) {
      return fail(std::string(segment.name) + " is refused by the driver: " + driver->message());
    }
    segment.owner = driver;
  }
  rankc_tensor tensors[MOST_TENSORS];
  for (int32_t i = 0; i < count; ++i) {
    const DLTensor* given = tensor_of(arguments[i]);
    if (given == nullptr) return fail(std::string(segment.name) + ": an argument is no tensor");
    int64_t bytes = 1;
    for (int32_t axis = 0; axis < given->ndim; ++axis) bytes *= given->shape[axis];
    tensors[i].data = static_cast<char*>(given->data) + given->byte_offset;
    tensors[i].bytes = bytes;
  }
  int64_t cycles = 0;
  if (driver->run(segment.handle, tensors, segment.inputs, tensors + segment.inputs, segment.outputs, &cycles) != 0) {
    return fail(std::string(segment.name) + ": " + driver->message());
  }
  total_cycles += cycles;
  return 0;
}

}  // namespace

extern "C" void rankc_set_driver(const rankc_driver* given) {
  std::lock_guard<std::mutex> lock(guard);
  driver = given;
}

extern "C" int64_t rankc_cycles(void) {
  std::lock_guard<std::mutex> lock(guard);
  return total_cycles;
}

extern "C" void rankc_reset_cycles(void) {
  std::lock_guard<std::mutex> lock(guard);
  total_cycles = 0;
}
