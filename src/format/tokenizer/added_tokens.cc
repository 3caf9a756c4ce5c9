#include "format/tokenizer/added_tokens.h"

#include <algorithm>

#include "base/check.h"
#include "format/tokenizer/utf8.h"

namespace dsla {
namespace {

// The code point that ends just before `end`.
char32_t Before(std::string_view text, size_t end, size_t* begin) {
  *begin = end - 1;
  while (*begin > 0 && (static_cast<unsigned char>(text[*begin]) & 0xc0) == 0x80) --*begin;
  return utf8::Decode(text.substr(*begin, end - *begin)).code_point;
}

bool TouchesWord(std::string_view text, size_t begin, size_t end) {
  size_t ignored;
  return (begin > 0 && utf8::IsWordCharacter(Before(text, begin, &ignored))) ||
         (end < text.size() && utf8::IsWordCharacter(utf8::Decode(text.substr(end)).code_point));
}

size_t SkipSpacesLeft(std::string_view text, size_t begin) {
  size_t previous;
  while (begin > 0 && utf8::IsWhiteSpace(Before(text, begin, &previous))) begin = previous;
  return begin;
}

size_t SkipSpacesRight(std::string_view text, size_t end) {
  while (end < text.size()) {
    const utf8::Decoded d = utf8::Decode(text.substr(end));
    if (!utf8::IsWhiteSpace(d.code_point)) break;
    end += static_cast<size_t>(d.length);
  }
  return end;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::stable_sort(tokens_.begin(), tokens_.end(),
                   [](const AddedToken& a, const AddedToken& b) { return a.text < b.text; });
  const auto same = [](const AddedToken& a, const AddedToken& b) { return a.text == b.text; };
  tokens_.erase(std::unique(tokens_.begin(), tokens_.end(), same), tokens_.end());
  for (const AddedToken& token : tokens_) {
    DSLA_CHECK(!token.text.empty());
    ++by_first_[static_cast<unsigned char>(token.text[0]) + 1u];
  }
  for (size_t b = 0; b < 256; ++b) by_first_[b + 1] += by_first_[b];
}

const AddedToken* AddedTokenMatcher::LongestAt(std::string_view text) const {
  const auto first = static_cast<unsigned char>(text[0]);
  auto low = tokens_.begin() + by_first_[first], high = tokens_.begin() + by_first_[first + 1u];
  const AddedToken* longest = nullptr;
  // [low, high): the tokens that agree with the text up to `depth`; a token that ends there is the
  // first of them.
  for (size_t depth = 1; low != high; ++depth) {
    if (low->text.size() == depth) {
      longest = &*low;
      if (++low == high) break;
    }
    if (depth == text.size()) break;
    const char c = text[depth];
    const auto byte = [depth](const AddedToken& t) {
      return static_cast<unsigned char>(t.text[depth]);
    };
    low = std::partition_point(
        low, high, [&](const AddedToken& t) { return byte(t) < static_cast<unsigned char>(c); });
    high = std::partition_point(
        low, high, [&](const AddedToken& t) { return byte(t) == static_cast<unsigned char>(c); });
  }
  return longest;
}

bool AddedTokenMatcher::Next(std::string_view text, size_t from, Match* match) const {
  for (size_t i = from; i < text.size(); ++i) {
    const auto first = static_cast<unsigned char>(text[i]);
    if (by_first_[first] == by_first_[first + 1u]) continue;
    if (const AddedToken* token = LongestAt(text.substr(i))) {
      *match = {token, i, i + token->text.size()};
      return true;
    }
  }
  return false;
}

void AddedTokenMatcher::Cut(std::string_view text, bool parse_special,
                            std::vector<Segment>* out) const {
  out->clear();
  size_t done = 0;  // up to here the text is in *out
  Match match;
  for (size_t from = 0; !tokens_.empty() && Next(text, from, &match); from = match.end) {
    const AddedToken& token = *match.token;
    if (token.special && !parse_special) continue;
    if (token.single_word && TouchesWord(text, match.begin, match.end)) continue;
    // White space that the token before took is gone.
    const size_t begin =
        token.lstrip ? std::max(SkipSpacesLeft(text, match.begin), done) : match.begin;
    const size_t end = token.rstrip ? SkipSpacesRight(text, match.end) : match.end;
    if (done < begin) out->push_back({-1, done, begin});
    out->push_back({token.id, begin, end});
    done = end;
  }
  if (done < text.size()) out->push_back({-1, done, text.size()});
}

}  // namespace dsla
