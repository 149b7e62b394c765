/* The driver of an accelerator, as model.so calls it. The simulator implements it; a real device can replace it.
 *
 * model.so carries its programs (see docs/program.md) and finds a driver when it first runs one, in this order:
 *   1. the one given to rankc_set_driver(), which model.so exports;
 *   2. the shared library that the environment variable RANKC_DRIVER names: its function rankc_driver_get();
 *   3. the one that this process has registered with TVM under the global name "rankc.driver" (a function of no
 *      arguments that returns the table's address as an integer), which is what the simulator does.
 *
 * All functions return 0, or another number after which message() says what went wrong. They are called by one thread
 * at a time per model.so.
 */
#ifndef RANKC_DRIVER_H_
#define RANKC_DRIVER_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RANKC_DRIVER_VERSION 1

/* A tensor of bytes, dense, in the network's order (N, C, height, width, ...). */
typedef struct {
  void* data;
  int64_t bytes;
} rankc_tensor;

typedef struct {
  int32_t version; /* RANKC_DRIVER_VERSION */
  int32_t reserved;
  /* A program (the bytes of a program.bin), to be run many times; *handle names it from here on. */
  int32_t (*load)(const void* program, int64_t bytes, void** handle);
  /* One inference. Tensors come in the order of the program's inputs and outputs. *cycles: what it took. */
  int32_t (*run)(void* handle, const rankc_tensor* inputs, int32_t input_count, const rankc_tensor* outputs,
                 int32_t output_count, int64_t* cycles);
  void (*unload)(void* handle);
  /* What the last failure was; valid until the next call. */
  const char* (*message)(void);
} rankc_driver;

/* What a driver's shared library exports. */
const rankc_driver* rankc_driver_get(void);

/* What model.so exports. The table must outlive it; NULL takes it back. */
void rankc_set_driver(const rankc_driver* driver);
/* Cycles of all programs that ran since the last rankc_reset_cycles(). */
int64_t rankc_cycles(void);
void rankc_reset_cycles(void);

#ifdef __cplusplus
}
#endif

#endif  // RANKC_DRIVER_H_
