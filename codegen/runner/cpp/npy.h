// Reads and writes NumPy's .npy files, versions 1 to 3: plain numbers and booleans in little-endian C order.
#ifndef RANKC_NPY_H_
#define RANKC_NPY_H_

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "rankc_runner.h"

namespace rankc {

struct Array {
  std::string dtype;  // "float32", as NumPy names it
  std::vector<int64_t> shape;
  std::vector<char> data;
};

// .npy's own name of a dtype -> NumPy's.
inline const std::map<std::string, std::string>& npy_dtypes() {
  static const std::map<std::string, std::string> names = {
      {"|b1", "bool"},   {"|i1", "int8"},   {"<i2", "int16"},   {"<i4", "int32"},  {"<i8", "int64"},  {"|u1", "uint8"},
      {"<u2", "uint16"}, {"<u4", "uint32"}, {"<u8", "uint64"}, {"<f2", "float16"}, {"<f4", "float32"}, {"<f8", "float64"},
  };
  return names;
}

// The text behind 'key': in the header's dictionary, up to the value's end.
inline std::string npy_field(const std::string& header, const std::string& key, const std::string& path) {
  size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) throw InputError(path + ": a .npy header without " + key);
  at = header.find_first_not_of(' ', at + key.size() + 3);
  size_t end = header.find(header.compare(at, 1, "(") == 0 ? ')' : ',', at);
  if (at == std::string::npos || end == std::string::npos) throw InputError(path + ": a .npy header that is cut off");
  return header.substr(at, end - at);
}

inline Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InputError(path + ": cannot be read");
  unsigned char start[12] = {};
  file.read(reinterpret_cast<char*>(start), 10);
  if (file.gcount() != 10 || std::memcmp(start, "\x93NUMPY", 6) != 0) throw InputError(path + ": no .npy file");
  size_t length = start[8] | start[9] << 8;
  if (start[6] > 1) {  // version 2 and 3 have four bytes for the length
    file.read(reinterpret_cast<char*>(start) + 10, 2);
    length |= static_cast<size_t>(start[10]) << 16 | static_cast<size_t>(start[11]) << 24;
  }
  const size_t most = 1 << 20;
  std::string header(length < most ? length : 0, ' ');
  file.read(header.data(), header.size());
  if (start[6] > 3 || !file || length >= most) throw InputError(path + ": a .npy header that is not understood");

  std::string descr = npy_field(header, "descr", path);
  auto known = npy_dtypes().find(descr.size() > 2 ? descr.substr(1, descr.size() - 2) : "");
  if (known == npy_dtypes().end()) throw InputError(path + ": dtype " + descr + " is not supported");
  if (npy_field(header, "fortran_order", path) != "False") throw InputError(path + ": is in Fortran order, not in C's");
  Array array{known->second, {}, {}};
  std::string shape = npy_field(header, "shape", path);
  size_t bytes = tvm::ffi::StringToDLDataType(array.dtype).bits / 8;
  for (size_t at = shape.find_first_of("0123456789"); at != std::string::npos;
       at = shape.find_first_of("0123456789", at)) {
    size_t end = shape.find_first_not_of("0123456789", at);
    array.shape.push_back(std::stoll(shape.substr(at, end - at)));
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(array.shape.back()), &bytes)) {
      throw InputError(path + ": its shape is too large");
    }
    at = end;
  }
  std::streamoff here = file.tellg();
  file.seekg(0, std::ios::end);
  if (static_cast<size_t>(file.tellg() - here) < bytes) throw InputError(path + ": ends early");
  file.seekg(here);
  array.data.resize(bytes);
  file.read(array.data.data(), bytes);
  if (!file) throw InputError(path + ": cannot be read to its end");
  return array;
}

inline void write_npy(const std::string& path, const Array& array) {
  std::string descr;
  for (const auto& [name, dtype] : npy_dtypes()) {
    if (dtype == array.dtype) descr = name;
  }
  if (descr.empty()) throw InputError(path + ": a .npy file cannot hold " + array.dtype);
  std::string sizes;
  for (int64_t size : array.shape) sizes += std::to_string(size) + ", ";
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + sizes + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');  // data begin at a multiple of 64
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  const char length[2] = {static_cast<char>(header.size() & 255), static_cast<char>(header.size() >> 8)};
  file.write("\x93NUMPY\x01\x00", 8).write(length, 2) << header;
  file.write(array.data.data(), array.data.size());
  if (!file.flush()) throw InputError(path + ": cannot be written");
}

}  // namespace rankc

#endif  // RANKC_NPY_H_
