#include "format/safetensors.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "format/json.h"

namespace dsla {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the safetensors library
constexpr size_t kMaxDims = 8;
constexpr uint64_t kMaxElements = uint64_t{1} << 48;  // keeps products far from overflow

uint64_t ElementBytes(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kBytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
      {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8},
  };
  const auto it = kBytes.find(dtype);
  return it == kBytes.end() ? 0 : it->second;
}

std::optional<uint64_t> Unsigned(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  return value.get<uint64_t>();
}

// One entry of the header: dtype, shape, data_offsets. `where` begins every message.
Status ParseEntry(const json& entry, const std::string& where, uint64_t available,
                  SafetensorsTensor* tensor, uint64_t* begin, uint64_t* end) {
  if (!entry.is_object()) return DataLoss("{}: not an object", where);
  for (const auto& item : entry.items()) {
    if (item.key() != "dtype" && item.key() != "shape" && item.key() != "data_offsets") {
      return DataLoss("{}: unknown key '{}'", where, Printable(item.key()));
    }
  }
  const auto dtype = entry.find("dtype"), shape = entry.find("shape"),
             offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string()) return DataLoss("{}: no dtype", where);
  if (shape == entry.end() || !shape->is_array()) return DataLoss("{}: no shape", where);
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2) {
    return DataLoss("{}: no pair of data_offsets", where);
  }
  tensor->dtype = dtype->get<std::string>();
  const uint64_t element = ElementBytes(tensor->dtype);
  if (element == 0) {
    return Unsupported("{}: unknown dtype '{}'", where, Printable(tensor->dtype));
  }
  if (shape->size() > kMaxDims) {
    return DataLoss("{}: {} dimensions, allowed are {}", where, shape->size(), kMaxDims);
  }
  uint64_t elements = 1;
  for (const json& item : *shape) {
    const auto size = Unsigned(item);
    if (!size) return DataLoss("{}: a dimension is not a whole number", where);
    if (*size > kMaxElements / std::max<uint64_t>(elements, 1)) {
      return DataLoss("{}: dimensions too large", where);
    }
    elements *= *size;
    tensor->shape.push_back(static_cast<int64_t>(*size));
  }
  const auto from = Unsigned((*offsets)[0]), to = Unsigned((*offsets)[1]);
  if (!from || !to || *from > *to) {
    return DataLoss("{}: data_offsets are not two ascending whole numbers", where);
  }
  if (*to > available) {
    return DataLoss("{}: data_offsets [{}, {}] run past the {} bytes of data", where, *from, *to,
                    available);
  }
  if (*to - *from != elements * element) {
    return DataLoss("{}: {} bytes of data for a shape and dtype of {}", where, *to - *from,
                    elements * element);
  }
  *begin = *from;
  *end = *to;
  return Status::Ok();
}

}  // namespace

Expected<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  DSLA_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  DSLA_ASSIGN_OR_RETURN(SafetensorsFile out, Parse(file.bytes(), path));
  out.file_ = std::move(file);
  return out;
}

Expected<SafetensorsFile> SafetensorsFile::Parse(std::span<const std::byte> bytes,
                                                 const std::string& path) {
  SafetensorsFile out;
  out.path_ = path;
  DSLA_RETURN_IF_ERROR(out.ParseHeader(bytes));
  return out;
}

Status SafetensorsFile::ParseHeader(std::span<const std::byte> bytes) {
  if (bytes.size() < 8) {
    return DataLoss("'{}': {} bytes are too few for a safetensors file", path_, bytes.size());
  }
  uint64_t size = 0;
  std::memcpy(&size, bytes.data(), 8);
  if (size > kMaxHeaderBytes) {
    return DataLoss("'{}': header of {} bytes, more than the {} allowed", path_, size,
                    kMaxHeaderBytes);
  }
  if (size > bytes.size() - 8) {
    return DataLoss("'{}': header of {} bytes in a file of {}", path_, size, bytes.size());
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, size);
  if (text.empty() || text[0] != '{') {
    return DataLoss("'{}': the header does not begin with '{{'", path_);
  }
  // Header, entry, list: no deeper.
  DSLA_ASSIGN_OR_RETURN(const json header, ParseJson(text, path_, 3));
  const auto data = bytes.subspan(8 + size);
  std::vector<std::pair<uint64_t, SafetensorsTensor>> found;
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") {
      if (!item.value().is_object()) return DataLoss("'{}': __metadata__ is not an object", path_);
      for (const auto& entry : item.value().items()) {
        if (!entry.value().is_string()) {
          return DataLoss("'{}': metadata '{}' is not a string", path_, Printable(entry.key()));
        }
        metadata_[entry.key()] = entry.value().get<std::string>();
      }
      continue;
    }
    SafetensorsTensor tensor;
    tensor.name = item.key();
    uint64_t begin = 0, end = 0;
    DSLA_RETURN_IF_ERROR(ParseEntry(item.value(),
                                    fmt::format("'{}': tensor '{}'", path_, Printable(tensor.name)),
                                    data.size(), &tensor, &begin, &end));
    tensor.data = data.subspan(begin, end - begin);
    found.emplace_back(begin, std::move(tensor));
  }
  return AddTensors(data, std::move(found));
}

Status SafetensorsFile::AddTensors(std::span<const std::byte> data,
                                   std::vector<std::pair<uint64_t, SafetensorsTensor>> found) {
  // Empty tensors first where several begin at one place.
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first, a.second.data.size()) < std::pair(b.first, b.second.data.size());
  });
  uint64_t at = 0;
  for (auto& [begin, tensor] : found) {
    if (begin < at) {
      return DataLoss("'{}': tensors '{}' and '{}' overlap", path_, Printable(tensors_.back().name),
                      Printable(tensor.name));
    }
    if (begin > at) {
      return DataLoss("'{}': {} bytes before tensor '{}' belong to no tensor", path_, begin - at,
                      Printable(tensor.name));
    }
    at = begin + tensor.data.size();
    tensors_.push_back(std::move(tensor));
  }
  if (at != data.size()) {
    return DataLoss("'{}': {} bytes at the end belong to no tensor", path_, data.size() - at);
  }
  return Status::Ok();
}

}  // namespace dsla
