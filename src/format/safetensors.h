// SafetensorsFile: a parsed .safetensors file. The header's claims (its length, dtypes, shapes,
// offsets) were checked against the file: tensors lie in it one after another, without overlaps or
// holes. Tensors are views into the mapped file, valid for the object's life, at any alignment.
// Const methods are thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/mapped_file.h"
#include "base/status.h"

namespace dsla {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;  // as written: F32, BF16, I64, ...
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

class SafetensorsFile {
 public:
  static Expected<SafetensorsFile> Open(const std::string& path);
  // The same over bytes that the caller keeps alive; `path` is for messages.
  static Expected<SafetensorsFile> Parse(std::span<const std::byte> bytes, const std::string& path);

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }  // by offset
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  Status ParseHeader(std::span<const std::byte> bytes);
  Status AddTensors(std::span<const std::byte> data,
                    std::vector<std::pair<uint64_t, SafetensorsTensor>> found);

  MappedFile file_;
  std::string path_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace dsla
