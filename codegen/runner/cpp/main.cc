// rankc_runner MODEL.so --input NAME=FILE.npy ... [--output FOLDER] [--repeat N] [--threads N] [--metadata] [--load LIB]
//
// Runs a compiled network on .npy files. Exit codes: 0 done, 1 the library failed, 2 usage, 4 unusable input.
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "npy.h"
#include "rankc_runner.h"

namespace {

const char usage[] =
    "usage: rankc_runner MODEL.so [--input NAME=FILE.npy]... [--output FOLDER] [--repeat N] [--threads N]\n"
    "                    [--metadata] [--load LIBRARY.so]...\n"
    "  --input     an array of the network, by its name; each of them is needed\n"
    "  --output    a folder, which must exist: outputs become NAME.npy there\n"
    "  --repeat    times N single calls after 3 to warm up\n"
    "  --threads   threads of TVM's pool, for code that was compiled for several\n"
    "  --metadata  prints what the library says of itself, as JSON, and runs nothing\n"
    "  --load      a further library of TVM's runtime, such as libtvm_runtime_extra.so\n";

struct Options {
  std::string model, folder;
  std::map<std::string, std::string> inputs;
  std::vector<std::string> libraries;
  int repeat = 0, threads = 0;
  bool metadata = false;
};

int number(const std::string& option, const std::string& text) {
  bool digits = !text.empty() && text.size() < 9 && text.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || std::stoi(text) < 1) throw rankc::InputError(option + " " + text + ": write a number above zero", 2);
  return std::stoi(text);
}

Options parse(int count, char** words) {
  Options options;
  for (int at = 1; at < count; ++at) {
    std::string word = words[at];
    if (word == "--metadata") {
      options.metadata = true;
    } else if (word.rfind("--", 0) != 0) {
      if (!options.model.empty()) throw rankc::InputError("one library at a time: " + word, 2);
      options.model = word;
    } else {
      if (at + 1 == count) throw rankc::InputError(word + ": its value is missing, or there is no such option", 2);
      std::string value = words[++at];
      if (word == "--input") {
        size_t equals = value.rfind('=');
        if (equals == std::string::npos) throw rankc::InputError("--input " + value + ": write NAME=FILE.npy", 2);
        if (!options.inputs.emplace(value.substr(0, equals), value.substr(equals + 1)).second) {
          throw rankc::InputError("--input " + value.substr(0, equals) + " is given twice", 2);
        }
      } else if (word == "--output") {
        options.folder = value;
      } else if (word == "--repeat") {
        options.repeat = number(word, value);
      } else if (word == "--threads") {
        options.threads = number(word, value);
      } else if (word == "--load") {
        options.libraries.push_back(value);
      } else {
        throw rankc::InputError("no such option: " + word, 2);
      }
    }
  }
  if (options.model.empty()) throw rankc::InputError("which library?", 2);
  return options;
}

// The inputs in the library's order.
std::vector<rankc::Library::Tensor> read_inputs(rankc::Library& library, std::map<std::string, std::string> files) {
  std::vector<rankc::Library::Tensor> tensors;
  for (const rankc::TensorInfo& info : library.inputs()) {
    auto found = files.find(info.name);
    if (found == files.end()) throw rankc::InputError("no --input " + info.name + "=FILE.npy; it is " + info.text());
    rankc::Array array = rankc::read_npy(found->second);
    tensors.push_back(library.make_tensor(array.dtype, array.shape, array.data.data(), array.data.size()));
    files.erase(found);
  }
  if (!files.empty()) {
    std::string known;
    for (const rankc::TensorInfo& info : library.inputs()) known += (known.empty() ? "" : "; ") + info.text();
    throw rankc::InputError("unknown input " + files.begin()->first + "; the library takes " + known);
  }
  return tensors;
}

void write_outputs(rankc::Library& library, const std::vector<rankc::Library::Tensor>& made, const std::string& folder) {
  for (size_t index = 0; index < made.size(); ++index) {
    const rankc::Library::Tensor& tensor = made[index];
    rankc::Array array{tvm::ffi::DLDataTypeToString(tensor.dtype()), {}, {}};
    array.shape.assign(tensor.shape().begin(), tensor.shape().end());
    std::string name = library.outputs().at(index).name;
    std::printf("%s: %s%s", name.c_str(), array.dtype.c_str(), rankc::shape_text(tensor.shape()).c_str());
    if (!folder.empty()) {
      array.data = library.bytes(tensor);
      std::replace(name.begin(), name.end(), '/', '_');
      std::string path = folder + "/" + name + ".npy";
      rankc::write_npy(path, array);
      std::printf(" -> %s", path.c_str());
    }
    std::printf("\n");
  }
}

void time_calls(rankc::Library& library, const std::vector<rankc::Library::Tensor>& given, int calls) {
  std::vector<double> milliseconds;
  for (int call = -3; call < calls; ++call) {
    auto begin = std::chrono::steady_clock::now();
    library.run(given);
    std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
    if (call >= 0) milliseconds.push_back(taken.count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  size_t middle = milliseconds.size() / 2;
  double median = milliseconds[middle];
  if (milliseconds.size() % 2 == 0) median = (median + milliseconds[middle - 1]) / 2;
  std::printf("%d calls: min %.4f ms, median %.4f ms\n", calls, milliseconds.front(), median);
}

void carry_out(const Options& options) {
  for (const std::string& further : options.libraries) {
    if (dlopen(further.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw rankc::InputError(dlerror());
  }
  struct stat found;
  if (!options.folder.empty() && (stat(options.folder.c_str(), &found) != 0 || !S_ISDIR(found.st_mode))) {
    throw rankc::InputError("--output " + options.folder + ": is no folder", 2);
  }
  rankc::Library library(options.model, options.threads);
  if (options.metadata) {
    std::printf("%s\n", library.metadata().c_str());
    return;
  }
  std::vector<rankc::Library::Tensor> given = read_inputs(library, options.inputs);
  write_outputs(library, library.run(given), options.folder);
  if (options.repeat > 0) time_calls(library, given, options.repeat);
}

}  // namespace

int main(int count, char** words) {
  try {
    carry_out(parse(count, words));
    return 0;
  } catch (const rankc::InputError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    if (error.code == 2) std::fprintf(stderr, "%s", usage);
    return error.code;
  } catch (const tvm::ffi::Error& error) {
    std::fprintf(stderr, "error: the library failed: %s\n", rankc::first_line(error.message()).c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
