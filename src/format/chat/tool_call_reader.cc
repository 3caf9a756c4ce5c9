#include "format/chat/tool_call_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "format/chat/json_scanner.h"
#include "format/chat/strip.h"

namespace dsla {
namespace {

using nlohmann::json;

constexpr size_t kMaxName = 256;  // bytes

bool IsSpace(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

// Of a JSON string; empty if it is none.
std::string Decoded(std::string_view text) {
  const json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  return value.is_string() ? value.get<std::string>() : std::string();
}

class JsonCallReader : public ToolCallReader {
 public:
  Result Next(char c) override {
    switch (at_) {
      case At::kBegin:
        if (IsSpace(c)) return Result::kMore;
        at_ = At::kKey;
        return c == '{' ? Result::kMore : Result::kBad;
      case At::kKey:
        return Key(c);
      case At::kColon:
        if (IsSpace(c)) return Result::kMore;
        at_ = At::kValue;
        return c == ':' ? Result::kMore : Result::kBad;
      case At::kValue:
        return Value(c);
      case At::kAfter:
        return After(c);
    }
    return Result::kBad;
  }

 private:
  enum class At { kBegin, kKey, kColon, kValue, kAfter };

  Result Key(char c) {
    if (text_.empty() && IsSpace(c)) return Result::kMore;
    if (text_.empty() && c != '"') return Result::kBad;
    text_ += c;
    if (text_.size() == 1 || c != '"')
      return text_.size() > kMaxName ? Result::kBad : Result::kMore;
    key_ = text_.substr(1, text_.size() - 2);
    text_.clear();
    at_ = At::kColon;
    return Known() ? Result::kMore : Result::kBad;
  }

  // A key that a call may have here; a second name or second arguments are none.
  bool Known() const {
    if (key_ == "name") return name_.empty();
    if (IsArguments()) return !has_arguments_;
    return key_ == "id" || key_ == "type";
  }
  bool IsArguments() const { return key_ == "arguments" || key_ == "parameters"; }

  Result Value(char c) {
    if (text_.empty() && IsSpace(c)) return Result::kMore;
    const bool object = IsArguments() && (text_.empty() ? c == '{' : text_[0] == '{');
    const auto result = scanner_.Next(c);
    if (result == JsonScanner::Result::kBad) return Result::kBad;
    if (result == JsonScanner::Result::kDoneBefore) return Ended() ? After(c) : Result::kBad;
    if (object) {
      has_arguments_ = true;
      arguments_ += c;
      text_ = '{';  // only says that it is an object
    } else {
      text_ += c;
    }
    if (result == JsonScanner::Result::kMore) return Result::kMore;
    if (object) return Forward();
    return Ended() ? Result::kMore : Result::kBad;
  }

  // Of a value that is no object of arguments: whether it may stand there.
  bool Ended() {
    if (key_ == "name") {
      name_ = Decoded(text_);
      if (name_.empty() || name_.size() > kMaxName) return false;
    } else if (IsArguments()) {
      has_arguments_ = true;
      arguments_ = text_ == "null" ? "{}" : Decoded(text_);
      if (!IsJsonObject(arguments_)) return false;
    }
    Forward();
    return true;
  }

  Result Forward() {
    text_.clear();
    scanner_ = {};
    at_ = At::kAfter;
    return Result::kMore;
  }

  Result After(char c) {
    if (IsSpace(c)) return Result::kMore;
    if (c == ',') {
      at_ = At::kKey;
      return Result::kMore;
    }
    if (c != '}' || name_.empty()) return Result::kBad;
    if (!has_arguments_) arguments_ = "{}";
    return Result::kDone;
  }

  At at_ = At::kBegin;
  std::string text_, key_;
  JsonScanner scanner_;
  bool has_arguments_ = false;
};

// A name by a rule of its own and then an object.
class NamedCallReader : public ToolCallReader {
 public:
  Result Next(char c) override {
    if (!name_.empty()) return Arguments(c);
    head_ += c;
    if (c != '{') return head_.size() > kMaxName ? Result::kBad : Result::kMore;
    name_ = NameIn(std::string_view(head_).substr(0, head_.size() - 1));
    return name_.empty() ? Result::kBad : Arguments(c);
  }

 protected:
  // The name in what stands before the object; empty: there is none.
  virtual std::string NameIn(std::string_view head) const = 0;

 private:
  Result Arguments(char c) {
    const auto result = scanner_.Next(c);
    if (result == JsonScanner::Result::kBad) return Result::kBad;
    arguments_ += c;
    return result == JsonScanner::Result::kDone ? Result::kDone : Result::kMore;
  }

  std::string head_;
  JsonScanner scanner_;
};

class MistralCallReader final : public NamedCallReader {
 protected:
  std::string NameIn(std::string_view head) const override {
    for (const std::string_view mark : {"[CALL_ID]", "[ARGS]"})
      head = head.substr(0, head.find(mark));
    return std::string(Strip(head));
  }
};

class DeepSeekCallReader final : public NamedCallReader {
 protected:
  std::string NameIn(std::string_view head) const override {
    constexpr std::string_view kSeparator = "<｜tool▁sep｜>";
    const size_t at = head.find(kSeparator);
    if (at == std::string_view::npos) return {};
    const std::string_view before = Strip(head.substr(0, at));
    std::string_view after = Strip(head.substr(at + kSeparator.size()));
    if (after.empty()) return std::string(before);
    if (after.ends_with("json")) after.remove_suffix(4);
    if (before != "function" || !after.ends_with("```")) return {};
    return std::string(Strip(after.substr(0, after.size() - 3)));
  }
};

class XmlCallReader final : public ToolCallReader {
 public:
  explicit XmlCallReader(std::shared_ptr<const std::vector<Tool>> tools)
      : tools_(std::move(tools)) {}

  Result Next(char c) override {
    if (key_.empty() && text_.empty() && IsSpace(c)) return Result::kMore;
    text_ += c;
    if (name_.empty()) return Head("<function=", &name_);
    return key_.empty() ? Parameter() : Value(c);
  }

 private:
  // Reads `tag`, a value and >.
  Result Head(std::string_view tag, std::string* value) {
    const size_t common = std::min(text_.size(), tag.size());
    if (text_.compare(0, common, tag.substr(0, common)) != 0 || text_.size() > kMaxName)
      return Result::kBad;
    if (text_.size() <= tag.size() || text_.back() != '>') return Result::kMore;
    *value = text_.substr(tag.size(), text_.size() - tag.size() - 1);
    text_.clear();
    if (!value->empty() && value == &name_) Begin();
    return value->empty() ? Result::kBad : Result::kMore;
  }

  Result Parameter() {
    constexpr std::string_view kEnd = "</function>";
    if (!kEnd.starts_with(text_)) return Head("<parameter=", &key_);
    if (text_ != kEnd) return Result::kMore;
    arguments_ += '}';
    return Result::kDone;
  }

  Result Value(char c) {
    constexpr std::string_view kEnd = "</parameter>";
    if (c != '>' || !text_.ends_with(kEnd)) return Result::kMore;
    std::string_view value = std::string_view(text_).substr(0, text_.size() - kEnd.size());
    if (value.starts_with('\n')) value.remove_prefix(1);
    if (value.ends_with('\n')) value.remove_suffix(1);
    if (arguments_begun_) arguments_ += ", ";
    arguments_begun_ = true;
    arguments_ += Quoted(key_) + ": " + AsJson(value);
    key_.clear();
    text_.clear();
    return Result::kMore;
  }

  std::string AsJson(std::string_view value) const {
    const json schema = SchemaOf(key_);
    // One of several texts is that text, whatever white space is around it.
    const std::string stripped(Strip(value));
    const auto choices = schema.find("enum");
    if (choices != schema.end() && std::ranges::find(*choices, json(stripped)) != choices->end())
      return Quoted(stripped);
    const auto type = schema.find("type");
    const bool text = type != schema.end() && *type == "string";
    return !text && IsJson(value) ? std::string(value) : Quoted(value);
  }

  static std::string Quoted(std::string_view text) {
    return json(std::string(text)).dump(-1, ' ', false, json::error_handler_t::replace);
  }

  void Begin() {
    arguments_ = "{";
    for (const Tool& tool : *tools_) {
      if (tool.name != name_) continue;
      schema_ = json::parse(tool.parameters, nullptr, /*allow_exceptions=*/false);
      return;
    }
  }

  // Of the parameter; an empty object if there is none.
  json SchemaOf(const std::string& key) const {
    const json none = json::object();
    if (!schema_.is_object()) return none;
    const json properties = schema_.value("properties", none);
    if (!properties.is_object()) return none;
    const auto found = properties.find(key);
    return found != properties.end() && found->is_object() ? *found : none;
  }

  const std::shared_ptr<const std::vector<Tool>> tools_;
  json schema_;
  std::string text_, key_;
  bool arguments_begun_ = false;
};

}  // namespace

std::string ToolCallReader::TakeArguments() {
  return name_.empty() ? std::string() : std::exchange(arguments_, {});
}

std::unique_ptr<ToolCallReader> NewJsonCallReader() { return std::make_unique<JsonCallReader>(); }
std::unique_ptr<ToolCallReader> NewMistralCallReader() {
  return std::make_unique<MistralCallReader>();
}
std::unique_ptr<ToolCallReader> NewDeepSeekCallReader() {
  return std::make_unique<DeepSeekCallReader>();
}
std::unique_ptr<ToolCallReader> NewXmlCallReader(std::shared_ptr<const std::vector<Tool>> tools) {
  return std::make_unique<XmlCallReader>(std::move(tools));
}

}  // namespace dsla
