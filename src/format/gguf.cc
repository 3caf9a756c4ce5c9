#include "format/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "format/json.h"

namespace dsla {
namespace {

// Metadata value types, by the numbers of the format.
enum : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

constexpr uint64_t kMaxKeyBytes = 65535;                  // the format's own limit
constexpr uint64_t kMaxStringBytes = uint64_t{64} << 20;  // templates and licences are far smaller
constexpr uint64_t kMaxNameBytes = 64;                    // the format's own limit
constexpr uint32_t kMaxDims = 4;                          // the format's own limit
constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // keeps products far from overflow
constexpr int kMaxArrayDepth = 4;

// Bytes of a fixed-size type; 0 for strings, arrays and unknown numbers.
uint64_t FixedSize(uint32_t type) {
  switch (type) {
    case kU8:
    case kI8:
    case kBool:
      return 1;
    case kU16:
    case kI16:
      return 2;
    case kU32:
    case kI32:
    case kF32:
      return 4;
    case kU64:
    case kI64:
    case kF64:
      return 8;
    default:
      return 0;
  }
}

template <typename T>
T Load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

std::optional<int64_t> LoadInteger(uint32_t type, const std::byte* p) {
  switch (type) {
    case kU8:
      return Load<uint8_t>(p);
    case kI8:
      return Load<int8_t>(p);
    case kU16:
      return Load<uint16_t>(p);
    case kI16:
      return Load<int16_t>(p);
    case kU32:
      return Load<uint32_t>(p);
    case kI32:
      return Load<int32_t>(p);
    case kI64:
      return Load<int64_t>(p);
    case kU64: {
      const uint64_t value = Load<uint64_t>(p);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

std::optional<double> LoadNumber(uint32_t type, const std::byte* p) {
  if (type == kF32) return static_cast<double>(Load<float>(p));
  if (type == kF64) return Load<double>(p);
  if (const auto integer = LoadInteger(type, p)) return static_cast<double>(*integer);
  return std::nullopt;
}

}  // namespace

// Walks the header once. The first failure is kept in error_, with the place, and every later step
// does nothing.
class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, GgufFile* out) : bytes_(bytes), out_(out) {}

  Status Run() {
    if (!Header() || !Metadata() || !TensorInfos() || !TensorData() || !NoOverlaps()) {
      return DataLossOrUnsupported();
    }
    return Status::Ok();
  }

 private:
  struct Pending {
    GgufTensor tensor;
    uint64_t offset = 0;  // from the start of the data section
    uint64_t size = 0;
  };

  template <typename... Args>
  bool Fail(fmt::format_string<Args...> format, Args&&... args) {
    error_ = fmt::format(format, std::forward<Args>(args)...);
    return false;
  }
  template <typename... Args>
  bool FailUnsupported(fmt::format_string<Args...> format, Args&&... args) {
    unsupported_ = true;
    return Fail(format, std::forward<Args>(args)...);
  }
  Status DataLossOrUnsupported() const {
    return Error(unsupported_ ? StatusCode::kUnsupported : StatusCode::kDataLoss, "'{}': {}",
                 out_->path_, error_);
  }

  uint64_t Left() const { return bytes_.size() - at_; }

  template <typename T>
  bool Read(T* value, const char* what) {
    if (Left() < sizeof(T)) return Fail("truncated at byte {}, in {}", at_, what);
    *value = Load<T>(bytes_.data() + at_);
    at_ += sizeof(T);
    return true;
  }
  bool ReadString(uint64_t max, std::string_view* text, const char* what) {
    uint64_t size = 0;
    if (!Read(&size, what)) return false;
    if (size > Left()) {
      return Fail("{} of {} bytes at byte {} runs past the end of the file", what, size, at_);
    }
    if (size > max) return Fail("{} of {} bytes, more than the {} allowed", what, size, max);
    *text = {reinterpret_cast<const char*>(bytes_.data() + at_), size};
    at_ += size;
    return true;
  }

  bool Header() {
    if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) {
      return Fail("not a GGUF file (it does not begin with 'GGUF')");
    }
    at_ = 4;
    uint32_t version = 0;
    if (!Read(&version, "the header")) return false;
    if (version != 0 && (version & 0xffff) == 0) return FailUnsupported("big-endian GGUF file");
    if (version != 2 && version != 3) {
      return FailUnsupported("GGUF version {}, supported are 2 and 3", version);
    }
    out_->version_ = version;
    if (!Read(&tensor_count_, "the header") || !Read(&value_count_, "the header")) return false;
    // The smallest metadata entry has 8 + 1 + 4 + 1 bytes, the smallest tensor entry 8 + 1 + 4 + 8
    // + 4 + 8.
    if (value_count_ > Left() / 14) {
      return Fail("{} metadata entries cannot fit in {} bytes", value_count_, bytes_.size());
    }
    if (tensor_count_ > Left() / 33) {
      return Fail("{} tensors cannot fit in {} bytes", tensor_count_, bytes_.size());
    }
    return true;
  }

  bool Metadata() {
    for (uint64_t i = 0; i < value_count_; ++i) {
      std::string_view key;
      GgufFile::Value value;
      if (!ReadString(kMaxKeyBytes, &key, "a metadata key")) return false;
      if (key.empty()) return Fail("empty metadata key before byte {}", at_);
      if (!Read(&value.type, "a metadata type")) return false;
      if (!ReadValue(&value)) {
        error_ = fmt::format("metadata '{}': {}", Printable(key), error_);
        return false;
      }
      if (!out_->values_.emplace(key, value).second) {
        return Fail("metadata key '{}' stands twice", Printable(key));
      }
    }
    return true;
  }

  bool ReadValue(GgufFile::Value* value) {
    if (value->type == kArray) {
      value->array = true;
      if (!Read(&value->type, "an array")) return false;
      if (!Read(&value->count, "an array")) return false;
    }
    const size_t begin = at_;
    if (!SkipElements(value->type, value->count, 1)) return false;
    value->bytes = bytes_.subspan(begin, at_ - begin);
    return true;
  }

  bool SkipElements(uint32_t type, uint64_t count, int depth) {
    if (const uint64_t size = FixedSize(type); size > 0) {
      if (count > Left() / size) {
        return Fail("{} values at byte {} run past the end of the file", count, at_);
      }
      if (type == kBool) {
        for (uint64_t i = 0; i < count; ++i) {
          if (static_cast<uint8_t>(bytes_[at_ + i]) > 1) return Fail("a bool other than 0 or 1");
        }
      }
      at_ += count * size;
      return true;
    }
    if (type != kString && type != kArray) return Fail("unknown value type {}", type);
    // A string has at least its 8 bytes of length, an array 4 + 8.
    if (count > Left() / (type == kString ? 8 : 12)) {
      return Fail("{} values at byte {} run past the end of the file", count, at_);
    }
    if (type == kString) {
      std::string_view text;
      for (uint64_t i = 0; i < count; ++i) {
        if (!ReadString(kMaxStringBytes, &text, "a string")) return false;
      }
      return true;
    }
    if (depth >= kMaxArrayDepth) return Fail("arrays nested deeper than {} levels", kMaxArrayDepth);
    for (uint64_t i = 0; i < count; ++i) {
      uint32_t element = 0;
      uint64_t elements = 0;
      if (!Read(&element, "an array") || !Read(&elements, "an array")) return false;
      if (!SkipElements(element, elements, depth + 1)) return false;
    }
    return true;
  }

  bool TensorInfos() {
    std::set<std::string_view> names;
    for (uint64_t i = 0; i < tensor_count_; ++i) {
      Pending pending;
      std::string_view name;
      if (!ReadString(kMaxNameBytes, &name, "a tensor name")) return false;
      if (!names.insert(name).second) return Fail("tensor '{}' stands twice", Printable(name));
      pending.tensor.name = name;
      if (!TensorInfo(&pending)) {
        error_ = fmt::format("tensor '{}': {}", Printable(name), error_);
        return false;
      }
      pending_.push_back(std::move(pending));
    }
    return true;
  }

  bool TensorInfo(Pending* pending) {
    uint32_t dims = 0, type = 0;
    if (!Read(&dims, "the number of dimensions")) return false;
    if (dims < 1 || dims > kMaxDims) return Fail("{} dimensions, allowed are 1 to 4", dims);
    auto& shape = pending->tensor.shape;
    shape.resize(dims);
    uint64_t elements = 1;
    for (uint32_t d = 0; d < dims; ++d) {
      uint64_t size = 0;
      if (!Read(&size, "the dimensions")) return false;
      if (size == 0) return Fail("dimension {} is 0", d);
      if (size > kMaxElements / elements) return Fail("dimensions too large");
      elements *= size;
      shape[dims - 1 - d] = static_cast<int64_t>(size);
    }
    if (!Read(&type, "the type") || !Read(&pending->offset, "the offset")) return false;
    const auto storage = StorageTypeFromGguf(type);
    if (!storage) {
      return FailUnsupported(
          "type {} is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, "
          "Q6_K are)",
          type);
    }
    pending->tensor.type = *storage;
    const StorageTraits& traits = Traits(*storage);
    const auto block = static_cast<uint64_t>(traits.block);
    if (static_cast<uint64_t>(shape.back()) % block != 0) {
      return Fail("rows of {} elements are not whole blocks of {}", shape.back(), traits.name);
    }
    pending->size = elements / block * static_cast<uint64_t>(traits.bytes);
    return true;
  }

  bool TensorData() {
    uint64_t alignment = 32;  // the format's default
    if (const auto it = out_->values_.find("general.alignment"); it != out_->values_.end()) {
      const auto value =
          it->second.array ? std::nullopt : LoadInteger(it->second.type, it->second.bytes.data());
      if (!value || *value <= 0 || *value % 8 != 0 ||
          static_cast<uint64_t>(*value) > kMaxAlignment) {
        return Fail("general.alignment is not a multiple of 8 between 8 and {}", kMaxAlignment);
      }
      alignment = static_cast<uint64_t>(*value);
    }
    const uint64_t begin = (at_ + alignment - 1) / alignment * alignment;
    if (begin > bytes_.size() && tensor_count_ > 0) {
      return Fail("truncated at byte {}, before the tensor data", bytes_.size());
    }
    const uint64_t available = begin > bytes_.size() ? 0 : bytes_.size() - begin;
    for (Pending& pending : pending_) {
      if (pending.offset % alignment != 0) {
        return Fail("tensor '{}': offset {} is not a multiple of {}",
                    Printable(pending.tensor.name), pending.offset, alignment);
      }
      if (pending.offset > available || pending.size > available - pending.offset) {
        return Fail("tensor '{}': {} bytes at offset {} run past the end of the file ({} bytes)",
                    Printable(pending.tensor.name), pending.size, pending.offset, bytes_.size());
      }
      pending.tensor.data = bytes_.subspan(begin + pending.offset, pending.size);
    }
    return true;
  }

  bool NoOverlaps() {
    std::vector<const Pending*> order;
    for (const Pending& pending : pending_) order.push_back(&pending);
    std::sort(order.begin(), order.end(),
              [](const Pending* a, const Pending* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < order.size(); ++i) {
      if (order[i]->offset < order[i - 1]->offset + order[i - 1]->size) {
        return Fail("tensors '{}' and '{}' overlap", Printable(order[i - 1]->tensor.name),
                    Printable(order[i]->tensor.name));
      }
    }
    for (Pending& pending : pending_) out_->tensors_.push_back(std::move(pending.tensor));
    return true;
  }

  const std::span<const std::byte> bytes_;
  GgufFile* const out_;
  uint64_t at_ = 0;
  uint64_t tensor_count_ = 0, value_count_ = 0;
  std::vector<Pending> pending_;
  std::string error_;
  bool unsupported_ = false;
};

Expected<GgufFile> GgufFile::Open(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  DSLA_ASSIGN_OR_RETURN(GgufFile gguf, Parse(file.bytes(), path));
  gguf.file_ = std::move(file);
  return gguf;
}

Expected<GgufFile> GgufFile::Parse(std::span<const std::byte> bytes, const std::string& path) {
  GgufFile gguf;
  gguf.path_ = path;
  GgufParser parser(bytes, &gguf);
  DSLA_RETURN_IF_ERROR(parser.Run());
  return gguf;
}

Status GgufFile::WrongType(const std::string& key, const char* wanted) const {
  return DataLoss("'{}': metadata '{}' is not {}", path_, Printable(key), wanted);
}

bool GgufFile::IsArray(const std::string& key) const {
  const auto it = values_.find(key);
  return it != values_.end() && it->second.array;
}

Expected<std::optional<int64_t>> GgufFile::Integer(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::optional<int64_t>();
  std::optional<int64_t> value;
  if (!it->second.array) value = LoadInteger(it->second.type, it->second.bytes.data());
  if (!value) return WrongType(key, "an integer");
  return value;
}

Expected<std::optional<double>> GgufFile::Number(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::optional<double>();
  std::optional<double> value;
  if (!it->second.array) value = LoadNumber(it->second.type, it->second.bytes.data());
  if (!value) return WrongType(key, "a number");
  return value;
}

Expected<std::optional<bool>> GgufFile::Bool(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::optional<bool>();
  if (it->second.array || it->second.type != kBool) return WrongType(key, "a bool");
  return std::optional<bool>(it->second.bytes[0] != std::byte{0});
}

Expected<std::optional<std::string_view>> GgufFile::String(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::optional<std::string_view>();
  if (it->second.array || it->second.type != kString) return WrongType(key, "a string");
  const auto* text = reinterpret_cast<const char*>(it->second.bytes.data()) + 8;
  return std::optional<std::string_view>(std::string_view(text, it->second.bytes.size() - 8));
}

Expected<std::vector<int64_t>> GgufFile::Integers(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::vector<int64_t>();
  const Value& value = it->second;
  const uint64_t size = FixedSize(value.type);
  if (!value.array || size == 0) return WrongType(key, "an array of integers");
  std::vector<int64_t> out(value.count);
  for (uint64_t i = 0; i < value.count; ++i) {
    const auto element = LoadInteger(value.type, value.bytes.data() + i * size);
    if (!element) return WrongType(key, "an array of integers");
    out[i] = *element;
  }
  return out;
}

Expected<std::vector<float>> GgufFile::Numbers(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::vector<float>();
  const Value& value = it->second;
  const uint64_t size = FixedSize(value.type);
  if (!value.array || size == 0) return WrongType(key, "an array of numbers");
  std::vector<float> out(value.count);
  for (uint64_t i = 0; i < value.count; ++i) {
    const auto element = LoadNumber(value.type, value.bytes.data() + i * size);
    if (!element) return WrongType(key, "an array of numbers");
    out[i] = static_cast<float>(*element);
  }
  return out;
}

Expected<std::vector<std::string_view>> GgufFile::Strings(const std::string& key) const {
  const auto it = values_.find(key);
  if (it == values_.end()) return std::vector<std::string_view>();
  const Value& value = it->second;
  if (!value.array || value.type != kString) return WrongType(key, "an array of strings");
  std::vector<std::string_view> out(value.count);
  const std::byte* p = value.bytes.data();
  for (auto& text : out) {
    const uint64_t size = Load<uint64_t>(p);
    text = {reinterpret_cast<const char*>(p + 8), size};
    p += 8 + size;
  }
  return out;
}

}  // namespace dsla
