#include "format/chat/json_scanner.h"

namespace dsla {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxWord = 400;  // more than any number of a double has

bool IsSpace(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

size_t Digits(std::string_view text, size_t at) {
  const size_t end = text.find_first_not_of("0123456789", at);
  return (end == std::string_view::npos ? text.size() : end) - at;
}

// -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?
bool IsNumber(std::string_view text) {
  size_t at = text.starts_with('-') ? 1 : 0;
  const size_t whole = Digits(text, at);
  if (whole == 0 || (whole > 1 && text[at] == '0')) return false;
  at += whole;
  if (at < text.size() && text[at] == '.') {
    const size_t fraction = Digits(text, at + 1);
    if (fraction == 0) return false;
    at += 1 + fraction;
  }
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    ++at;
    if (at < text.size() && (text[at] == '+' || text[at] == '-')) ++at;
    const size_t exponent = Digits(text, at);
    if (exponent == 0) return false;
    at += exponent;
  }
  return at == text.size();
}

bool IsWord(std::string_view text) {
  return text == "true" || text == "false" || text == "null" || IsNumber(text);
}

}  // namespace

JsonScanner::Result JsonScanner::Open(char c, State next) {
  if (open_.size() == kMaxDepth) return Result::kBad;
  open_ += c;
  state_ = next;
  return Result::kMore;
}

JsonScanner::Result JsonScanner::End() {
  state_ = State::kAfter;
  return open_.empty() ? Result::kDone : Result::kMore;
}

// The first byte of a value.
JsonScanner::Result JsonScanner::Begin(char c) {
  if (IsSpace(c)) return Result::kMore;
  if (c == '{') return Open(c, State::kFirstKey);
  if (c == '[') return Open(c, State::kFirstItem);
  if (c == '"') {
    in_key_ = false;
    state_ = State::kString;
    return Result::kMore;
  }
  if (c != '-' && !IsDigit(c) && c != 't' && c != 'f' && c != 'n') return Result::kBad;
  word_ = c;
  state_ = State::kWord;
  return Result::kMore;
}

// Behind a value that is within a list or an object.
JsonScanner::Result JsonScanner::After(char c) {
  if (IsSpace(c)) return Result::kMore;
  const bool in_object = open_.back() == '{';
  if (c == ',') {
    state_ = in_object ? State::kKey : State::kValue;
    return Result::kMore;
  }
  if (c != (in_object ? '}' : ']')) return Result::kBad;
  open_.pop_back();
  return End();
}

JsonScanner::Result JsonScanner::Next(char c) {
  switch (state_) {
    case State::kValue:
      return Begin(c);
    case State::kFirstItem:
      if (c != ']') {
        if (!IsSpace(c)) state_ = State::kValue;
        return Begin(c);
      }
      return After(c);
    case State::kFirstKey:
      if (c == '}') return After(c);
      [[fallthrough]];
    case State::kKey:
      if (IsSpace(c)) return Result::kMore;
      in_key_ = true;
      state_ = State::kString;
      return c == '"' ? Result::kMore : Result::kBad;
    case State::kColon:
      if (IsSpace(c)) return Result::kMore;
      state_ = State::kValue;
      return c == ':' ? Result::kMore : Result::kBad;
    case State::kAfter:
      return After(c);
    case State::kString:
      if (c == '\\') {
        state_ = State::kEscape;
      } else if (c == '"') {
        if (!in_key_) return End();
        state_ = State::kColon;
      }
      return static_cast<unsigned char>(c) < ' ' ? Result::kBad : Result::kMore;
    case State::kEscape:
      hex_ = c == 'u' ? 4 : 0;
      state_ = c == 'u' ? State::kHex : State::kString;
      return std::string_view("\"\\/bfnrtu").find(c) == std::string_view::npos ? Result::kBad
                                                                               : Result::kMore;
    case State::kHex:
      if (--hex_ == 0) state_ = State::kString;
      return std::string_view("0123456789abcdefABCDEF").find(c) == std::string_view::npos
                 ? Result::kBad
                 : Result::kMore;
    case State::kWord:
      break;
  }
  const bool in_word =
      IsDigit(c) || (c >= 'a' && c <= 'z') || c == 'E' || c == '+' || c == '-' || c == '.';
  if (in_word) {
    word_ += c;
    return word_.size() > kMaxWord ? Result::kBad : Result::kMore;
  }
  if (!IsWord(word_)) return Result::kBad;
  if (open_.empty()) return Result::kDoneBefore;
  state_ = State::kAfter;
  return After(c);
}

bool IsJson(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  JsonScanner scanner;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto result = scanner.Next(text[i]);
    if (result == JsonScanner::Result::kMore) continue;
    if (result == JsonScanner::Result::kBad) return false;
    const size_t end = result == JsonScanner::Result::kDone ? i + 1 : i;
    return text.find_first_not_of(kSpace, end) == std::string_view::npos;
  }
  return scanner.Next(' ') == JsonScanner::Result::kDoneBefore;
}

bool IsJsonObject(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  return begin != std::string_view::npos && text[begin] == '{' && IsJson(text);
}

}  // namespace dsla
