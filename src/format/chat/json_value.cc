#include "format/chat/json_value.h"

#include <limits>
#include <nlohmann/json.hpp>

namespace dsla {
namespace {

using jinja::Value;

// Builds the value while parsing, which keeps the order of keys and the digits of numbers.
class Builder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return Add(jinja::None{}); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      return Add(static_cast<int64_t>(value));
    return Add(jinja::Real{std::to_string(value)});
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Add(jinja::Real{text});
  }
  bool string(string_t& value) override { return Add(Foreign(std::move(value))); }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return Open(true); }
  bool start_array(std::size_t) override { return Open(false); }
  bool key(string_t& value) override {
    frames_.back().key = std::move(value);
    return true;
  }
  bool end_object() override {
    Value made(std::move(frames_.back().dict));
    made.foreign_keys = true;
    return Close(std::move(made));
  }
  bool end_array() override { return Close(Value(std::move(frames_.back().list))); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception&) override {
    return false;
  }

  Value Take() { return std::move(root_); }

 private:
  struct Frame {
    bool object;
    std::string key;
    jinja::Dict dict;
    jinja::List list;
  };
  static Value Foreign(std::string text) { return jinja::Text(std::move(text), true); }

  bool Open(bool object) {
    if (frames_.size() == static_cast<size_t>(kMaxToolJsonDepth)) return false;
    frames_.push_back({object, {}, {}, {}});
    return true;
  }
  bool Close(Value made) {
    frames_.pop_back();
    return Add(std::move(made));
  }
  bool Add(Value value) {
    if (frames_.empty()) {
      root_ = std::move(value);
    } else if (frames_.back().object) {
      frames_.back().dict.emplace_back(std::move(frames_.back().key), std::move(value));
    } else {
      frames_.back().list.push_back(std::move(value));
    }
    return true;
  }

  std::vector<Frame> frames_;
  Value root_;
};

}  // namespace

Expected<Value> ParseForeignJson(std::string_view text) {
  Builder builder;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder))
    return InvalidArgument("is no JSON of at most {} levels", kMaxToolJsonDepth);
  return builder.Take();
}

}  // namespace dsla
