#include <algorithm>

#include "format/chat/jinja.h"

namespace dsla::jinja {
namespace {

constexpr std::string_view kWhiteSpace = " \t\n\r\v\f";
constexpr size_t kMaxSource = 256 << 10;

bool IsNameStart(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  explicit Lexer(std::string source) : source_(std::move(source)) {}

  Expected<std::vector<Token>> Run() {
    while (at_ < source_.size()) {
      Text();
      if (at_ >= source_.size()) break;
      const char kind = source_[at_ + 1];
      at_ += 2;
      if (At('-') || At('+')) ++at_;
      if (kind == '#') {
        DSLA_RETURN_IF_ERROR(Comment());
      } else {
        const bool output = kind == '{';
        Add(output ? Token::Type::kOutputBegin : Token::Type::kBlockBegin);
        DSLA_RETURN_IF_ERROR(Inside(output ? "}}" : "%}"));
        Add(output ? Token::Type::kOutputEnd : Token::Type::kBlockEnd);
      }
    }
    Add(Token::Type::kEnd);
    return std::move(tokens_);
  }

 private:
  bool At(char c) const { return at_ < source_.size() && source_[at_] == c; }
  bool At(std::string_view s) const { return std::string_view(source_).substr(at_).starts_with(s); }
  void Add(Token::Type type, std::string text = {}) { tokens_.push_back({type, std::move(text)}); }

  // Text up to the next tag, less the white space that the tags on both sides take away.
  void Text() {
    size_t end = at_;
    while (end < source_.size() &&
           !(source_[end] == '{' && end + 1 < source_.size() &&
             std::string_view("{%#").find(source_[end + 1]) != std::string_view::npos)) {
      ++end;
    }
    std::string_view text(source_.data() + at_, end - at_);
    if (end < source_.size()) {
      const char mark = end + 2 < source_.size() ? source_[end + 2] : '\0';
      if (mark == '-') {
        text = text.substr(0, text.find_last_not_of(kWhiteSpace) + 1);
      } else if (mark != '+' && source_[end + 1] != '{') {
        const size_t line = text.rfind('\n') + 1;
        if ((line > 0 || line_starting_) &&
            text.find_first_not_of(" \t", line) == std::string_view::npos) {
          text = text.substr(0, line);
        }
      }
    }
    if (!text.empty()) Add(Token::Type::kText, std::string(text));
    at_ = end;
  }

  // After a tag's end: `-` takes all white space, a block or comment takes one newline.
  void AfterTag(bool strip, bool takes_newline) {
    const size_t begin = at_;
    if (strip) {
      at_ = std::min(source_.find_first_not_of(kWhiteSpace, at_), source_.size());
    } else if (takes_newline && At('\n')) {
      ++at_;
    }
    line_starting_ = at_ > begin && source_[at_ - 1] == '\n';
  }

  Status Comment() {
    const size_t end = source_.find("#}", at_);
    if (end == std::string::npos) return Unsupported("a comment has no end");
    const bool strip = end > at_ && source_[end - 1] == '-';
    const bool keep = end > at_ && source_[end - 1] == '+';
    at_ = end + 2;
    AfterTag(strip, !keep);
    return Status::Ok();
  }

  Status Inside(std::string_view close) {
    int braces = 0;
    for (;;) {
      at_ = std::min(source_.find_first_not_of(kWhiteSpace, at_), source_.size());
      if (at_ >= source_.size()) return Unsupported("a tag has no end");
      const char c = source_[at_];
      if (braces == 0) {
        const bool marked = c == '-' || (c == '+' && close == "%}");
        const std::string_view rest = std::string_view(source_).substr(at_ + (marked ? 1 : 0));
        if (rest.starts_with(close)) {
          at_ += close.size() + (marked ? 1 : 0);
          AfterTag(c == '-', close == "%}" && c != '+');
          return Status::Ok();
        }
      }
      if (c == '{' || c == '[' || c == '(') ++braces;
      if (c == '}' || c == ']' || c == ')') --braces;
      if (braces < 0) return Unsupported("unbalanced '{}'", c);
      if (c == '\'' || c == '"') {
        DSLA_RETURN_IF_ERROR(String(c));
      } else if (IsNameStart(c)) {
        const size_t begin = at_;
        while (at_ < source_.size() && (IsNameStart(source_[at_]) || IsDigit(source_[at_]))) ++at_;
        Add(Token::Type::kName, source_.substr(begin, at_ - begin));
      } else if (IsDigit(c)) {
        const size_t begin = at_;
        while (at_ < source_.size() && IsDigit(source_[at_])) ++at_;
        if (at_ - begin > 9) return Unsupported("a number of over 9 digits");
        if (At('.') && at_ + 1 < source_.size() && IsDigit(source_[at_ + 1])) {
          return Unsupported("a floating-point number");
        }
        Add(Token::Type::kInt, source_.substr(begin, at_ - begin));
      } else {
        DSLA_RETURN_IF_ERROR(Operator());
      }
    }
  }

  Status String(char quote) {
    std::string text;
    for (++at_; at_ < source_.size() && source_[at_] != quote; ++at_) {
      if (source_[at_] != '\\') {
        text += source_[at_];
        continue;
      }
      if (++at_ >= source_.size()) break;
      switch (source_[at_]) {
        case 'n':
          text += '\n';
          break;
        case 't':
          text += '\t';
          break;
        case 'r':
          text += '\r';
          break;
        case '\\':
        case '\'':
        case '"':
          text += source_[at_];
          break;
        case 'u':
        case 'x':
        case 'U':
        case 'N':
        case '0':
          return Unsupported("the escape \\{} in a string", source_[at_]);
        default:  // Python keeps the backslash of an escape that it does not know
          text += '\\';
          text += source_[at_];
      }
    }
    if (at_ >= source_.size()) return Unsupported("a string has no end");
    ++at_;
    Add(Token::Type::kString, std::move(text));
    return Status::Ok();
  }

  Status Operator() {
    for (const std::string_view op : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (At(op)) {
        at_ += op.size();
        Add(Token::Type::kOperator, std::string(op));
        return Status::Ok();
      }
    }
    const char c = source_[at_];
    if (std::string_view("+-*/%~|.,:()[]{}<>=").find(c) == std::string_view::npos) {
      return Unsupported("an unexpected character in a tag (code {})",
                         static_cast<int>(static_cast<unsigned char>(c)));
    }
    ++at_;
    Add(Token::Type::kOperator, std::string(1, c));
    return Status::Ok();
  }

  std::string source_;
  size_t at_ = 0;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

Expected<std::vector<Token>> Tokenize(std::string_view source) {
  if (source.size() > kMaxSource) {
    return Unsupported("{} bytes of source, over {}", source.size(), kMaxSource);
  }
  std::string text;  // as Jinja does: \r\n and \r are \n, and the last newline goes
  text.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      if (i + 1 == source.size() || source[i + 1] != '\n') text += '\n';
    } else {
      text += source[i];
    }
  }
  if (text.ends_with('\n')) text.pop_back();
  return Lexer(std::move(text)).Run();
}

}  // namespace dsla::jinja
