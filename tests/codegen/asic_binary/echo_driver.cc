// A driver that is no simulator: the "program" is one byte, which is added to every byte of the input.
#include "rankc_driver.h"

#include <cstring>

namespace {
const char* text = "";

int32_t load(const void* program, int64_t bytes, void** handle) {
  if (bytes != 1) {
    text = "the program must be one byte";
    return 1;
  }
  *handle = new char(*static_cast<const char*>(program));
  return 0;
}

int32_t run(void* handle, const rankc_tensor* inputs, int32_t input_count, const rankc_tensor* outputs,
            int32_t output_count, int64_t* cycles) {
  if (input_count != 1 || output_count != 1 || inputs[0].bytes != outputs[0].bytes) {
    text = "one tensor in, one of the same size out";
    return 1;
  }
  const auto* in = static_cast<const unsigned char*>(inputs[0].data);
  auto* out = static_cast<unsigned char*>(outputs[0].data);
  for (int64_t i = 0; i < inputs[0].bytes; ++i) out[i] = in[i] + *static_cast<char*>(handle);
  *cycles = inputs[0].bytes;
  return 0;
}

void unload(void* handle) { delete static_cast<char*>(handle); }
const char* message() { return text; }
const rankc_driver table = {RANKC_DRIVER_VERSION, 0, load, run, unload, message};
}  // namespace

extern "C" const rankc_driver* rankc_driver_get(void) { return &table; }
