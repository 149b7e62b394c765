// NVIDIA's driver and runtime without a GPU: device memory is the host's, and kernels are those of a library that was
// compiled from model.cu. A module of PTX is known by its hash: $EMULATED_KERNELS/<hash>.so has its kernels.
//
// One library for both sonames, libcuda.so.1 and libcudart.so.13; functions that no test reaches fail.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
struct Function {
  int (*launch)(const char*, const unsigned*, const unsigned*, void**);
  std::string name;
};

static std::string device_name() {
  const char* given = std::getenv("EMULATED_GPU");
  return given == nullptr ? "Emulated GPU" : given;
}

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = std::getenv("EMULATED_NONE") == nullptr, 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, length, "%s", device_name().c_str()), 0; }
int cuGetErrorName(int, const char** text) { return *text = "emulated error", 0; }
int cuGetErrorString(int, const char** text) { return *text = "emulated error", 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuTensorMapEncodeTiled() { return 801; }

int cuModuleLoadData(void** module, const void* image) {
  uint64_t hash = 14695981039346656037ull;  // FNV-1a
  for (const char* at = static_cast<const char*>(image); *at != 0; ++at) {
    hash = (hash ^ static_cast<unsigned char>(*at)) * 1099511628211ull;
  }
  char path[4096];
  std::snprintf(path, sizeof(path), "%s/%016llx.so", std::getenv("EMULATED_KERNELS"), (unsigned long long)hash);
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (*module == nullptr) std::fprintf(stderr, "emulated driver: %s\n", dlerror());
  return *module == nullptr ? 200 : 0;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto launch = reinterpret_cast<decltype(Function::launch)>(dlsym(module, "emulated_launch"));
  if (launch == nullptr || launch(name, nullptr, nullptr, nullptr) != 0) return 500;
  *function = new Function{launch, name};
  return 0;
}
int cuLaunchKernelEx(const LaunchConfig* config, void* handle, void** arguments, void**) {
  auto function = static_cast<Function*>(handle);
  return function->launch(function->name.c_str(), config->grid, config->block, arguments);
}

static int attribute(int* value, int name) {
  switch (name) {
    case 1: *value = 1024; break;        // threads of a block
    case 8: *value = 48 * 1024; break;   // shared memory of a block
    case 10: *value = 32; break;         // a warp
    case 16: *value = 8; break;          // multiprocessors
    case 75: *value = 8; break;          // compute capability 8.0
    case 76: *value = 0; break;
    default: *value = 0;
  }
  return 0;
}
int cuDeviceGetAttribute(int* value, int name, int) { return attribute(value, name); }
int cudaDeviceGetAttribute(int* value, int name, int) { return attribute(value, name); }
int cudaGetDeviceProperties(void*, int) { return 0; }
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaSetDevice(int) { return 0; }
int cudaMemGetInfo(size_t* free_bytes, size_t* total) { return *free_bytes = *total = size_t(1) << 30, 0; }
int cudaMalloc(void** pointer, size_t bytes) { return (*pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256)) ? 0 : 2; }
int cudaFree(void* pointer) { return std::free(pointer), 0; }
int cudaMallocHost(void** pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
int cudaFreeHost(void* pointer) { return cudaFree(pointer); }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) { return std::memcpy(to, from, bytes), 0; }
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void*) { return std::memcpy(to, from, bytes), 0; }
int cudaStreamCreate(void** stream) { return *stream = nullptr, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void*, int) { return 801; }
int cudaStreamEndCapture(void*, void**) { return 801; }
int cudaGraphDestroy(void*) { return 801; }
int cudaGraphExecDestroy(void*) { return 801; }
int cudaGraphInstantiate(void**, void*, unsigned long long) { return 801; }
int cudaGraphLaunch(void*, void*) { return 801; }
int cudaEventCreate(void** event) { return *event = nullptr, 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 0, 0; }
const char* cudaGetErrorName(int) { return "emulated error"; }
const char* cudaGetErrorString(int) { return "emulated error"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
}
