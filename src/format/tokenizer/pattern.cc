#include "format/tokenizer/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <new>

#include "base/check.h"

namespace dsla {
namespace {

// Unicode's White_Space. PCRE2's own \s also matches U+180E.
constexpr std::string_view kSpaces =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{"
    "205f}\\x{3000}";

// Reads an expression and writes its PCRE2 form. Whatever is not known to mean the same in both
// engines is refused.
class Translator {
 public:
  explicit Translator(std::string_view in) : in_(in) {}

  Expected<std::string> Run() {
    while (pos_ < in_.size()) DSLA_RETURN_IF_ERROR(Item());
    return std::move(out_);
  }

 private:
  Status Item() {
    const char c = in_[pos_];
    switch (c) {
      case '\\':
        return Escape(false);
      case '[':
        return Class();
      case '(':
        return Group();
      case '{':
        return Repeat();
      case '^':
      case '$':
        return Refuse(1);  // anchors of lines in Ruby's syntax
      default:
        Copy(1);
        return Status::Ok();
    }
  }

  Status Escape(bool in_class) {
    if (pos_ + 1 == in_.size()) return DataLoss("pattern ends in a backslash");
    const char c = in_[pos_ + 1];
    switch (c) {
      case 's':
        out_.append(in_class ? "" : "[").append(kSpaces).append(in_class ? "" : "]");
        pos_ += 2;
        return Status::Ok();
      case 'S':
        if (in_class) return Refuse(2);
        out_.append("[^").append(kSpaces).append("]");
        pos_ += 2;
        return Status::Ok();
      case 'd':
      case 'D':
        out_.append(c == 'd' ? "\\p{Nd}" : "\\P{Nd}");
        pos_ += 2;
        return Status::Ok();
      case 'p':
      case 'P':
        return Property();
      case 'u':
      case 'x':
        return HexEscape(c);
      case 'r':
      case 'n':
      case 't':
      case 'f':
        Copy(2);
        return Status::Ok();
      default:
        // A backslash before punctuation makes it literal in both; before a letter or digit it has
        // many meanings.
        if (std::isalnum(static_cast<unsigned char>(c)) || static_cast<unsigned char>(c) >= 0x80)
          return Refuse(2);
        Copy(2);
        return Status::Ok();
    }
  }

  // \p{L}, \p{Lu}, \p{Han}. A longer name is a script, which PCRE2 would also find in a character's
  // script extensions.
  Status Property() {
    const size_t close = in_.find('}', pos_);
    if (in_.substr(pos_ + 2, 1) != "{" || close == in_.npos) return Refuse(2);
    std::string_view name = in_.substr(pos_ + 3, close - pos_ - 3);
    const bool negated = name.starts_with('^');
    if (negated) name.remove_prefix(1);
    const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
      return c == '_' || std::isalpha(static_cast<unsigned char>(c));
    });
    if (name.empty() || !plain) return Refuse(close + 1 - pos_);
    out_.append(in_.substr(pos_, 3))
        .append(negated ? "^" : "")
        .append(name.size() > 2 && name != "Any" ? "sc:" : "");
    out_.append(name).append("}");
    pos_ = close + 1;
    return Status::Ok();
  }

  Status HexEscape(char kind) {
    size_t digits = pos_ + 2;
    const bool braces = digits < in_.size() && in_[digits] == '{';
    digits += braces ? 1 : 0;
    size_t end = digits;
    const size_t most = braces ? 6 : kind == 'u' ? 4 : 2;
    while (end < in_.size() && end - digits < most &&
           std::isxdigit(static_cast<unsigned char>(in_[end])))
      ++end;
    const bool closed =
        braces ? end > digits && end < in_.size() && in_[end] == '}' : end - digits == most;
    // \xHH above 7F is a byte in one engine and a code point in the other.
    if (!closed || (braces && kind == 'u') || (!braces && kind == 'x' && in_[digits] > '7'))
      return Refuse(2);
    out_.append("\\x{").append(in_.substr(digits, end - digits)).append("}");
    pos_ = end + (braces ? 1 : 0);
    return Status::Ok();
  }

  Status Class() {
    Copy(1);
    if (Next() == '^') Copy(1);
    if (Next() == ']') return Refuse(1);
    while (pos_ < in_.size() && in_[pos_] != ']') {
      if (in_[pos_] == '[' || in_.substr(pos_, 2) == "&&") return Refuse(2);
      if (in_[pos_] == '\\') {
        DSLA_RETURN_IF_ERROR(Escape(true));
      } else {
        Copy(1);
      }
    }
    if (pos_ == in_.size()) return DataLoss("pattern has a '[' that is not closed");
    Copy(1);
    return Status::Ok();
  }

  Status Group() {
    constexpr std::array<std::string_view, 8> kKnown = {
        "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"};
    for (const std::string_view opening : kKnown) {
      if (in_.substr(pos_).starts_with(opening)) {
        Copy(opening.size());
        return Status::Ok();
      }
    }
    if (pos_ + 1 < in_.size() && (in_[pos_ + 1] == '?' || in_[pos_ + 1] == '*')) return Refuse(3);
    Copy(1);
    return Status::Ok();
  }

  // {n}, {n,} and {n,m}. A '+' after one repeats it in Ruby's syntax and makes it possessive in
  // PCRE2's.
  Status Repeat() {
    size_t end = pos_ + 1;
    const auto digits = [&] {
      const size_t from = end;
      while (end < in_.size() && std::isdigit(static_cast<unsigned char>(in_[end]))) ++end;
      return end > from;
    };
    if (!digits()) return Refuse(1);
    if (end < in_.size() && in_[end] == ',') {
      ++end;
      digits();
    }
    if (end == in_.size() || in_[end] != '}') return Refuse(1);
    if (end + 1 < in_.size() && (in_[end + 1] == '+' || in_[end + 1] == '?'))
      return Refuse(end + 2 - pos_);
    Copy(end + 1 - pos_);
    return Status::Ok();
  }

  char Next() const { return pos_ < in_.size() ? in_[pos_] : '\0'; }
  void Copy(size_t n) {
    out_.append(in_.substr(pos_, n));
    pos_ += n;
  }
  Status Refuse(size_t n) const {
    return Unsupported("pattern has '{}' at byte {}, which is not supported", in_.substr(pos_, n),
                       pos_);
  }

  std::string_view in_;
  size_t pos_ = 0;
  std::string out_;
};

std::string ErrorText(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

void Pattern::Free::operator()(pcre2_real_code_8* p) const { pcre2_code_free(p); }
void Pattern::Matcher::Free::operator()(pcre2_real_match_data_8* p) const {
  pcre2_match_data_free(p);
}
void Pattern::Matcher::Free::operator()(pcre2_real_match_context_8* p) const {
  pcre2_match_context_free(p);
}

Expected<std::string> Pattern::Translate(std::string_view expression) {
  return Translator(expression).Run();
}

Expected<Pattern> Pattern::Compile(std::string_view expression) {
  DSLA_ASSIGN_OR_RETURN(const std::string translated, Translate(expression));
  std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // what '.' stops at
  pcre2_set_parens_nest_limit(context.get(), 32);
  int error = 0;
  PCRE2_SIZE offset = 0;
  Pattern pattern;
  pattern.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                    translated.size(), PCRE2_UTF | PCRE2_UCP, &error, &offset,
                                    context.get()));
  if (!pattern.code_) return DataLoss("pattern does not compile: {}", ErrorText(error));
  pcre2_jit_compile(pattern.code_.get(), PCRE2_JIT_COMPLETE);  // without it matching is only slower
  return pattern;
}

Pattern::Matcher::Matcher()
    : data_(pcre2_match_data_create(1, nullptr)), context_(pcre2_match_context_create(nullptr)) {
  if (!data_ || !context_) throw std::bad_alloc();
  pcre2_set_heap_limit(context_.get(), 256 * 1024);  // KiB
}

Expected<bool> Pattern::Matcher::Find(const Pattern& pattern, std::string_view text, size_t start) {
  // The expressions of known families take a small multiple of the text's length.
  const size_t limit = std::min<size_t>(1'000'000 + 8 * text.size(), UINT32_MAX);
  pcre2_set_match_limit(context_.get(), static_cast<uint32_t>(limit));
  const auto match = [&](uint32_t options) {
    return pcre2_match(pattern.code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                       start, options, data_.get(), context_.get());
  };
  int rc = match(PCRE2_NO_UTF_CHECK);
  // The compiled matcher has a small stack; the interpreter takes what it needs from the heap.
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = match(PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT);
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  if (rc < 0)
    return ResourceExhausted("a pre-tokenizer pattern gave up on {} bytes of text: {}", text.size(),
                             ErrorText(rc));
  const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data_.get());
  begin_ = offsets[0];
  end_ = std::max(offsets[0], offsets[1]);
  return true;
}

}  // namespace dsla
