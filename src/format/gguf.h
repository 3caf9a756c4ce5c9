// GgufFile: a parsed GGUF container (versions 2 and 3, little-endian). Everything that the header
// claims (counts, lengths, offsets, sizes) was checked against the file's size before use; tensor
// data lies inside the file and does not overlap. Values and tensors are views into the mapped
// file, valid for the object's life. Const methods are thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "base/status.h"
#include "format/dequant.h"

namespace dsla {

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first (the file stores innermost first)
  StorageType type;
  std::span<const std::byte> data;
};

class GgufFile {
 public:
  static Expected<GgufFile> Open(const std::string& path);
  // The same over bytes that the caller keeps alive; `path` is for messages.
  static Expected<GgufFile> Parse(std::span<const std::byte> bytes, const std::string& path);

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  // Metadata by key: nullopt when the file has no such key, kDataLoss when it has another type.
  // Integers of any width and sign are one kind here, and a number may be an integer. Arrays are
  // empty when the file has no such key.
  Expected<std::optional<int64_t>> Integer(const std::string& key) const;
  Expected<std::optional<double>> Number(const std::string& key) const;
  Expected<std::optional<bool>> Bool(const std::string& key) const;
  Expected<std::optional<std::string_view>> String(const std::string& key) const;
  Expected<std::vector<int64_t>> Integers(const std::string& key) const;
  Expected<std::vector<float>> Numbers(const std::string& key) const;
  Expected<std::vector<std::string_view>> Strings(const std::string& key) const;
  bool Has(const std::string& key) const { return values_.contains(key); }
  bool IsArray(const std::string& key) const;

 private:
  friend class GgufParser;

  // A metadata value, left in the file: arrays of a whole vocabulary are decoded only when asked
  // for.
  struct Value {
    uint32_t type = 0;  // of the value, or of the elements of an array
    bool array = false;
    uint64_t count = 1;  // elements
    std::span<const std::byte> bytes;
  };
  Status WrongType(const std::string& key, const char* wanted) const;

  MappedFile file_;
  std::string path_;
  uint32_t version_ = 0;
  std::map<std::string, Value> values_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace dsla
