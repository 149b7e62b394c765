// CUDA C++ as C++: a block's threads are fibers of one thread that take turns at barriers. Included before a model.cu.
//
// Blocks run one after another, so __shared__ variables are static ones. Every thread of a block (of a warp) meets the
// same barriers, so a turn of all the others is a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#define __CUDACC_RTC__  // keeps the source from including CUDA's own headers
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda {
namespace std {
using ::std::int16_t;
using ::std::int32_t;
using ::std::int64_t;
using ::std::int8_t;
using ::std::uint16_t;
using ::std::uint32_t;
using ::std::uint64_t;
using ::std::uint8_t;
}  // namespace std
}  // namespace cuda

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define VECTORS(name, type)                                                       \
  struct name##2 { type x, y; };                                                  \
  struct name##4 { type x, y, z, w; };                                            \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(uint, unsigned)
VECTORS(char, signed char)
VECTORS(uchar, unsigned char)
VECTORS(short, short)
VECTORS(ushort, unsigned short)
using std::max;
using std::min;

namespace emulated {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread;
  bool done;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static size_t current;
static void (*body)(void**);
static void** arguments;
static uint64_t slots[1024];

inline void turn() { swapcontext(&fibers[current].context, &scheduler); }

inline void fiber() {
  body(arguments);
  fibers[current].done = true;
  turn();
}

inline void run_block() {
  const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
  if (fibers.size() < count) fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& one = fibers[i];
    one.stack.resize(1 << 17);
    one.done = false;
    one.thread.x = i % blockDim.x;
    one.thread.y = i / blockDim.x % blockDim.y;
    one.thread.z = i / blockDim.x / blockDim.y;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.data();
    one.context.uc_stack.ss_size = one.stack.size();
    one.context.uc_link = nullptr;
    makecontext(&one.context, fiber, 0);
  }
  for (size_t left = count; left > 0;) {
    for (size_t i = 0; i < count; ++i) {
      if (fibers[i].done) continue;
      current = i;
      threadIdx = fibers[i].thread;
      swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].done;
    }
  }
}

// Another lane's value; lanes of a warp follow each other.
template <typename T> T from_lane(T value, size_t lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&slots[current], &value, sizeof(T));
  turn();
  T found;
  std::memcpy(&found, &slots[lane], sizeof(T));
  turn();
  return found;
}

}  // namespace emulated

inline void __syncthreads() { emulated::turn(); }
inline void __syncwarp(unsigned = 0) { emulated::turn(); }
inline unsigned __activemask() { return 0xffffffffu; }
template <typename T> T __shfl_sync(unsigned, T value, int lane, int width) {
  size_t first = emulated::current / width * width;
  return emulated::from_lane(value, first + lane % width);
}
template <typename T> T __shfl_down_sync(unsigned, T value, unsigned offset, int width) {
  bool inside = emulated::current % width + offset < static_cast<size_t>(width);
  return emulated::from_lane(value, emulated::current + (inside ? offset : 0));
}
template <typename T> T __shfl_up_sync(unsigned, T value, unsigned offset, int width) {
  bool inside = emulated::current % width >= offset;
  return emulated::from_lane(value, emulated::current - (inside ? offset : 0));
}
