#include "format/json.h"

#include <utility>
#include <vector>

namespace dsla {
namespace {

using nlohmann::json;

// Builds the value while parsing, so that depth and duplicate keys stop the parser at once.
class Builder final : public nlohmann::json_sax<json> {
 public:
  explicit Builder(int max_depth) : max_depth_(max_depth) {}

  bool null() override { return Add(nullptr) != nullptr; }
  bool boolean(bool value) override { return Add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return Add(value) != nullptr;
  }
  bool string(string_t& value) override { return Add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return Open(json::object()); }
  bool start_array(std::size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& value) override {
    if (stack_.back()->contains(value)) {
      error_ = fmt::format("key '{}' stands twice in one object", Printable(value));
      return false;
    }
    key_ = std::move(value);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& exception) override {
    // 406 is the library's number for a number that no double can hold.
    error_ = fmt::format("{} at byte {}",
                         exception.id == 406 ? "number out of range" : "malformed JSON", position);
    return false;
  }

  json& root() { return root_; }
  const std::string& error() const { return error_; }

 private:
  template <typename T>
  json* Add(T&& value) {
    if (stack_.empty()) {
      root_ = std::forward<T>(value);
      return &root_;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::forward<T>(value));
      return &parent.back();
    }
    return &(parent[key_] = std::forward<T>(value));
  }
  bool Open(json value) {
    if (static_cast<int>(stack_.size()) >= max_depth_) {
      error_ = fmt::format("JSON nested deeper than {} levels", max_depth_);
      return false;
    }
    stack_.push_back(Add(std::move(value)));
    return true;
  }
  bool Close() {
    stack_.pop_back();
    return true;
  }

  const int max_depth_;
  json root_;
  std::vector<json*> stack_;  // open containers; addresses are stable while they are open
  std::string key_;
  std::string error_;
};

}  // namespace

Expected<json> ParseJson(std::string_view text, const std::string& path, int max_depth) {
  Builder builder(max_depth);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return DataLoss("'{}': {}", path,
                    builder.error().empty() ? std::string("malformed JSON") : builder.error());
  }
  if (!builder.root().is_structured()) return DataLoss("'{}': not a JSON object", path);
  return std::move(builder.root());
}

std::string Printable(std::string_view text) {
  constexpr size_t kMax = 80;
  std::string out;
  for (const char c : text.substr(0, kMax)) out += c >= 0x20 && c < 0x7f ? c : '?';
  if (text.size() > kMax) out += "...";
  return out;
}

}  // namespace dsla
