#include "server/openai/json_doc.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "format/tokenizer/utf8.h"

namespace dsla::openai {
namespace {

namespace dom = simdjson::dom;

HttpError TooDeepError(std::string message) {
  return InvalidRequestError(std::move(message), "", "json_too_deep");
}

// What simdjson lets through: keys that come twice, huge objects, and surrogates without their
// other half. `escapes`: the body has \u at all. The depth is bounded by the parser.
class Checker {
 public:
  explicit Checker(bool escapes) : escapes_(escapes) {}

  std::optional<HttpError> Check(dom::element element) const {
    switch (element.type()) {
      case dom::element_type::OBJECT:
        return CheckObject(element);
      case dom::element_type::ARRAY:
        for (const dom::element child : dom::array(element)) {
          if (child.is_number()) continue;  // lists of token ids
          if (auto error = Check(child)) return error;
        }
        return std::nullopt;
      case dom::element_type::STRING:
        return CheckText(std::string_view(element));
      default:
        return std::nullopt;
    }
  }

 private:
  std::optional<HttpError> CheckText(std::string_view text) const {
    if (!escapes_ || utf8::IsValid(text)) return std::nullopt;
    return InvalidJsonError("a \\u escape is half of a surrogate pair");
  }

  std::optional<HttpError> CheckObject(dom::object object) const {
    std::vector<std::string_view> keys;
    for (const dom::key_value_pair field : object) {
      if (keys.size() == kMaxJsonKeys) {
        return TooDeepError(
            fmt::format("the body has an object of more than {} keys", kMaxJsonKeys));
      }
      keys.push_back(field.key);
      if (auto error = CheckText(field.key)) return error;
      if (auto error = Check(field.value)) return error;
    }
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice == keys.end()) return std::nullopt;
    return InvalidJsonError(
        fmt::format("the key '{}' comes twice in one object", twice->substr(0, 64)));
  }

  bool escapes_;
};

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// Whether this is a number of JSON's grammar, however large.
bool IsJsonNumber(std::string_view text, bool* integer) {
  size_t i = 0;
  const auto digits = [&] {
    const size_t begin = i;
    while (i < text.size() && IsDigit(text[i])) ++i;
    return i - begin;
  };
  if (i < text.size() && text[i] == '-') ++i;
  const size_t first = i;
  const size_t whole = digits();
  if (whole == 0 || (whole > 1 && text[first] == '0')) return false;
  *integer = i == text.size();
  if (i < text.size() && text[i] == '.') {
    ++i;
    if (digits() == 0) return false;
  }
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    if (i < text.size() && (text[i] == '+' || text[i] == '-')) ++i;
    if (digits() == 0) return false;
  }
  return i == text.size();
}

template <typename T>
bool Fits(std::string_view text) {
  T value;
  return std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc();
}

// simdjson refuses a document for a number that is too large without saying where it is. Walks the
// text to the first such number and names the field of the outermost object that it belongs to.
std::optional<HttpError> FindUnholdableNumber(std::string_view body) {
  int depth = 0;
  std::string_view key, last_string;
  for (size_t i = 0; i < body.size();) {
    const char c = body[i];
    if (c == '"') {
      const size_t begin = ++i;
      while (i < body.size() && body[i] != '"') i += body[i] == '\\' ? 2 : 1;
      if (i >= body.size()) return std::nullopt;
      last_string = body.substr(begin, i - begin);
      ++i;
    } else if (c == '-' || IsDigit(c)) {
      const size_t begin = i;
      while (i < body.size() && (IsDigit(body[i]) || std::string_view("+-.eE").find(body[i]) !=
                                                         std::string_view::npos)) {
        ++i;
      }
      const std::string_view number = body.substr(begin, i - begin);
      bool integer = false;
      if (!IsJsonNumber(number, &integer)) return std::nullopt;
      const bool fits =
          integer ? Fits<int64_t>(number) || Fits<uint64_t>(number) : Fits<double>(number);
      if (!fits) {
        const std::string name(key.substr(0, 64));
        return InvalidRequestError(fmt::format("'{}' has a number that is out of range", name),
                                   name, integer ? "integer_out_of_range" : "decimal_out_of_range");
      }
    } else {
      if (c == ':' && depth == 1) key = last_string;
      if (c == '{' || c == '[') ++depth;
      if (c == '}' || c == ']') --depth;
      ++i;
    }
  }
  return std::nullopt;
}

HttpError ParseError(simdjson::error_code code, std::string_view body) {
  switch (code) {
    case simdjson::DEPTH_ERROR:
      return TooDeepError(fmt::format("the body is nested more than {} deep", kMaxJsonDepth));
    case simdjson::MEMALLOC:
    case simdjson::CAPACITY:
      return OutOfMemoryError();
    case simdjson::UTF8_ERROR:
      return InvalidJsonError("it is not UTF-8");
    case simdjson::EMPTY:
      return InvalidJsonError("it is empty");
    case simdjson::UNCLOSED_STRING:
      return InvalidJsonError("a string does not end");
    case simdjson::STRING_ERROR:
      return InvalidJsonError("a string has an escape that JSON does not know");
    case simdjson::UNESCAPED_CHARS:
      return InvalidJsonError("a string has a control character that is not escaped");
    default:
      break;
  }
  // NUMBER_ERROR, and BIGINT_ERROR of later versions.
  if (auto error = FindUnholdableNumber(body)) return *error;
  return InvalidJsonError(code == simdjson::NUMBER_ERROR ? "it has a malformed number"
                                                         : "its structure is broken");
}

}  // namespace

std::optional<HttpError> JsonDoc::Parse(std::string_view body) {
  if (body.starts_with("\xef\xbb\xbf")) return InvalidJsonError("it begins with a byte-order mark");
  if (parser_.allocate(std::max<size_t>(body.size(), 32), kMaxJsonDepth) != simdjson::SUCCESS) {
    return OutOfMemoryError();
  }
  dom::element root;
  if (const auto code = parser_.parse(body.data(), body.size()).get(root);
      code != simdjson::SUCCESS) {
    return ParseError(code, body);
  }
  if (auto error = Checker(body.find("\\u") != std::string_view::npos).Check(root)) return error;
  if (root.get(object_) != simdjson::SUCCESS) {
    return InvalidRequestError("the body must be a JSON object", "", "invalid_type");
  }
  return std::nullopt;
}

}  // namespace dsla::openai
