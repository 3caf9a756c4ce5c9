#include "server/openai/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace dsla::openai {
namespace {

using Type = simdjson::dom::element_type;

// Doubles above this no longer hold every integer.
constexpr double kExactInteger = 9007199254740992.0;

std::string Bound(double value) { return fmt::format("{}", value); }

HttpError RangeError(std::string_view path, const char* kind, bool below, std::string message) {
  return InvalidRequestError(std::move(message), std::string(path),
                             fmt::format("{}_{}_value", kind, below ? "below_min" : "above_max"));
}

}  // namespace

const char* TypeName(Element value) {
  switch (value.type()) {
    case Type::ARRAY:
      return "an array";
    case Type::OBJECT:
      return "an object";
    case Type::INT64:
    case Type::UINT64:
      return "an integer";
    case Type::DOUBLE:
      return "a number with a fraction";
    case Type::STRING:
      return "a string";
    case Type::BOOL:
      return "a boolean";
    case Type::NULL_VALUE:
      break;
  }
  return "null";
}

void SetTypeError(std::string_view path, const char* wanted, Element got, FirstError* error) {
  error->Set(
      InvalidRequestError(fmt::format("'{}' must be {}, not {}", path, wanted, TypeName(got)),
                          std::string(path), "invalid_type"));
}

bool ReadInt(Element value, std::string_view path, int64_t low, int64_t high, int64_t* out,
             FirstError* error) {
  int64_t read = 0;
  if (uint64_t large; value.type() == Type::UINT64 && value.get(large) == simdjson::SUCCESS) {
    error->Set(InvalidRequestError(fmt::format("'{}' is out of range: {}", path, large),
                                   std::string(path), "integer_out_of_range"));
    return false;
  }
  if (double real; value.type() == Type::DOUBLE && value.get(real) == simdjson::SUCCESS &&
                   std::floor(real) == real && std::fabs(real) <= kExactInteger) {
    read = static_cast<int64_t>(real);
  } else if (value.type() != Type::INT64 || value.get(read) != simdjson::SUCCESS) {
    SetTypeError(path, "an integer", value, error);
    return false;
  }
  if (read < low || read > high) {
    const bool below = read < low;
    error->Set(RangeError(path, "integer", below,
                          fmt::format("'{}' must be {} {}, not {}", path,
                                      below ? "at least" : "at most", below ? low : high, read)));
    return false;
  }
  *out = read;
  return true;
}

bool ReadNumber(Element value, std::string_view path, double low, double high, bool low_open,
                double* out, FirstError* error) {
  double read = 0;
  if (!value.is_number() || value.get(read) != simdjson::SUCCESS) {
    SetTypeError(path, "a number", value, error);
    return false;
  }
  const bool below = low_open ? read <= low : read < low;
  if (below || read > high) {
    error->Set(RangeError(path, "decimal", below,
                          fmt::format("'{}' must be {} {}, not {}", path,
                                      !below     ? "at most"
                                      : low_open ? "above"
                                                 : "at least",
                                      Bound(below ? low : high), Bound(read))));
    return false;
  }
  *out = read;
  return true;
}

bool ReadString(Element value, std::string_view path, size_t max_bytes, std::string* out,
                FirstError* error) {
  std::string_view text;
  if (value.get(text) != simdjson::SUCCESS) {
    SetTypeError(path, "a string", value, error);
    return false;
  }
  if (text.size() > max_bytes) {
    error->Set(InvalidRequestError(
        fmt::format("'{}' has {} bytes, more than {}", path, text.size(), max_bytes),
        std::string(path), "string_above_max_length"));
    return false;
  }
  *out = text;
  return true;
}

bool ReadTokens(Element value, std::string_view path, int64_t vocab_size, std::vector<int32_t>* out,
                FirstError* error) {
  simdjson::dom::array array;
  if (value.get(array) != simdjson::SUCCESS) {
    SetTypeError(path, "an array of token ids", value, error);
    return false;
  }
  for (const Element element : array) {
    int64_t id = 0;
    // The fast case first: the error's path is not made for every token.
    if (element.type() == Type::INT64 && element.get(id) == simdjson::SUCCESS && id >= 0 &&
        id < vocab_size) {
      out->push_back(static_cast<int32_t>(id));
      continue;
    }
    if (!ReadInt(element, fmt::format("{}[{}]", path, out->size()), 0, vocab_size - 1, &id,
                 error)) {
      return false;
    }
    out->push_back(static_cast<int32_t>(id));
  }
  return true;
}

std::optional<Element> Fields::Find(std::string_view name) const {
  if (!error_->ok()) return std::nullopt;
  Element value;
  if (object_.at_key(name).get(value) != simdjson::SUCCESS || value.is_null()) return std::nullopt;
  return value;
}

bool Fields::Bool(std::string_view name, bool* out) const {
  const auto value = Find(name);
  if (!value) return false;
  if (value->get(*out) == simdjson::SUCCESS) return true;
  SetTypeError(Path(name), "a boolean", *value, error_);
  return false;
}

bool Fields::Int(std::string_view name, int64_t low, int64_t high, int64_t* out) const {
  const auto value = Find(name);
  return value && ReadInt(*value, Path(name), low, high, out, error_);
}

bool Fields::Int(std::string_view name, int64_t low, int64_t high, int* out) const {
  int64_t read = 0;
  if (!Int(name, low, std::min<int64_t>(high, std::numeric_limits<int>::max()), &read)) {
    return false;
  }
  *out = static_cast<int>(read);
  return true;
}

bool Fields::Number(std::string_view name, double low, double high, float* out,
                    bool low_open) const {
  const auto value = Find(name);
  double read = 0;
  if (!value || !ReadNumber(*value, Path(name), low, high, low_open, &read, error_)) return false;
  *out = static_cast<float>(read);
  return true;
}

bool Fields::String(std::string_view name, size_t max_bytes, std::string* out) const {
  const auto value = Find(name);
  return value && ReadString(*value, Path(name), max_bytes, out, error_);
}

std::optional<simdjson::dom::object> Fields::Object(std::string_view name) const {
  const auto value = Find(name);
  if (!value) return std::nullopt;
  simdjson::dom::object object;
  if (value->get(object) == simdjson::SUCCESS) return object;
  SetTypeError(Path(name), "an object", *value, error_);
  return std::nullopt;
}

std::optional<simdjson::dom::array> Fields::Array(std::string_view name) const {
  const auto value = Find(name);
  if (!value) return std::nullopt;
  simdjson::dom::array array;
  if (value->get(array) == simdjson::SUCCESS) return array;
  SetTypeError(Path(name), "an array", *value, error_);
  return std::nullopt;
}

void Fields::Refuse(std::initializer_list<std::string_view> names) const {
  for (const std::string_view name : names) {
    if (Find(name)) error_->Set(UnsupportedParameterError(Path(name)));
  }
}

void Fields::RefuseUnless(std::string_view name, bool accepted) const {
  if (!accepted && Find(name)) error_->Set(UnsupportedParameterError(Path(name)));
}

void Fields::RefuseOthers(std::initializer_list<std::string_view> names,
                          std::string_view known) const {
  for (const simdjson::dom::key_value_pair field : object_) {
    if (std::find(names.begin(), names.end(), field.key) != names.end()) continue;
    const std::string path = Path(field.key.substr(0, 64));
    error_->Set(InvalidRequestError(fmt::format("'{}' is unknown: {}", path, known), path,
                                    "unknown_parameter"));
  }
}

}  // namespace dsla::openai
