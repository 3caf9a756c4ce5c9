// JsonWriter: appends compact JSON to a string. The hot path of every streamed token, so it keeps
// no tree and throws nothing: strings are escaped, ill-formed UTF-8 becomes U+FFFD, floats are the
// shortest text that reads back as the same value, and what JSON cannot hold (NaN, infinities) is
// null. The caller opens and closes what it writes; commas are put in here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dsla {

class JsonWriter {
 public:
  JsonWriter() = default;
  // Goes on behind `head`, which ends just after "[" or "{", or holds no open value.
  explicit JsonWriter(std::string head) : out_(std::move(head)) {}

  JsonWriter& BeginObject();
  JsonWriter& EndObject();
  JsonWriter& BeginArray();
  JsonWriter& EndArray();
  JsonWriter& Key(std::string_view key);

  JsonWriter& String(std::string_view text);
  JsonWriter& Int(int64_t value);
  JsonWriter& Float(float value);
  JsonWriter& Double(double value);
  JsonWriter& Bool(bool value);
  JsonWriter& Null();
  JsonWriter& Raw(std::string_view json);  // one value, already JSON

  // Key and value at once.
  JsonWriter& Field(std::string_view key, std::string_view text) { return Key(key).String(text); }
  JsonWriter& Field(std::string_view key, const char* text) { return Key(key).String(text); }
  JsonWriter& Field(std::string_view key, int64_t value) { return Key(key).Int(value); }
  JsonWriter& Field(std::string_view key, int value) { return Key(key).Int(value); }
  JsonWriter& Field(std::string_view key, bool value) { return Key(key).Bool(value); }

  const std::string& str() const { return out_; }
  std::string Take() { return std::move(out_); }

 private:
  void Separate();  // the comma before a value or key, where one is due

  std::string out_;
};

// `text` as a JSON string, quotes included.
void AppendJsonString(std::string_view text, std::string* out);

}  // namespace dsla
