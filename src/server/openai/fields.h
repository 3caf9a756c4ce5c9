// Fields: typed reading of one JSON object's fields. Nothing is narrowed or converted silently: a
// value of another type or outside its range is an error that names the field. null is the same as
// absent. The first error is kept and everything after it is skipped, so callers read all fields
// and look at the error once.
#pragma once

#include <simdjson.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/http/errors.h"

namespace dsla::openai {

using Element = simdjson::dom::element;

// The first error of a request.
class FirstError {
 public:
  bool ok() const { return !error_; }
  void Set(HttpError error) {
    if (!error_) error_ = std::move(error);
  }
  std::optional<HttpError> Take() { return std::move(error_); }

 private:
  std::optional<HttpError> error_;
};

const char* TypeName(Element value);  // "a string", "an integer", ...

// One value; `path` names it in the error. An integer may be written 5 or 5.0, never "5" or true.
bool ReadInt(Element value, std::string_view path, int64_t low, int64_t high, int64_t* out,
             FirstError* error);
// low_open: `low` itself is refused.
bool ReadNumber(Element value, std::string_view path, double low, double high, bool low_open,
                double* out, FirstError* error);
bool ReadString(Element value, std::string_view path, size_t max_bytes, std::string* out,
                FirstError* error);
// Token ids in [0, vocab_size).
bool ReadTokens(Element value, std::string_view path, int64_t vocab_size, std::vector<int32_t>* out,
                FirstError* error);

void SetTypeError(std::string_view path, const char* wanted, Element got, FirstError* error);

class Fields {
 public:
  // prefix: "messages[0]." for the fields of a nested object.
  Fields(simdjson::dom::object object, std::string prefix, FirstError* error)
      : object_(object), prefix_(std::move(prefix)), error_(error) {}

  std::string Path(std::string_view name) const { return prefix_ + std::string(name); }
  // Nothing if absent, null, or after an error.
  std::optional<Element> Find(std::string_view name) const;

  // Each leaves *out alone if there is nothing; true if it was set.
  bool Bool(std::string_view name, bool* out) const;
  bool Int(std::string_view name, int64_t low, int64_t high, int64_t* out) const;
  bool Int(std::string_view name, int64_t low, int64_t high, int* out) const;
  bool Number(std::string_view name, double low, double high, float* out,
              bool low_open = false) const;
  bool String(std::string_view name, size_t max_bytes, std::string* out) const;
  // The object or array of that name.
  std::optional<simdjson::dom::object> Object(std::string_view name) const;
  std::optional<simdjson::dom::array> Array(std::string_view name) const;

  // Fields that exist in the API but not here: anything but null is refused.
  void Refuse(std::initializer_list<std::string_view> names) const;
  void RefuseUnless(std::string_view name, bool accepted) const;
  // For objects of this server's own, in which nothing is ignored; `known` says what there is.
  void RefuseOthers(std::initializer_list<std::string_view> names, std::string_view known) const;

  FirstError* error() const { return error_; }

 private:
  simdjson::dom::object object_;
  std::string prefix_;
  FirstError* error_;
};

}  // namespace dsla::openai
