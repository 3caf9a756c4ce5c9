#include "engine/text_stream.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace dsla {

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop, bool continues,
                       std::vector<int32_t> shown)
    : decoder_(tokenizer, {.skip_special = true, .continues = continues}),
      shown_(std::move(shown)) {
  for (std::string& text : stop) {
    DSLA_CHECK(!text.empty());
    Stop& s = stops_.emplace_back();
    s.text = std::move(text);
    s.fallback.assign(s.text.size() + 1, 0);
    for (size_t i = 1, border = 0; i < s.text.size(); ++i) {
      while (border > 0 && s.text[i] != s.text[border]) border = s.fallback[border];
      if (s.text[i] == s.text[border]) ++border;
      s.fallback[i + 1] = static_cast<int>(border);
    }
  }
}

bool TextStream::Stop::Next(char byte) {
  if (matched == static_cast<int>(text.size())) matched = fallback[matched];
  while (matched > 0 && text[matched] != byte) matched = fallback[matched];
  if (text[matched] == byte) ++matched;
  return matched == static_cast<int>(text.size());
}

std::string TextStream::Push(int32_t token, bool may_stop) {
  DSLA_CHECK(!stop_string_.has_value());
  const bool shown = std::ranges::find(shown_, token) != shown_.end();
  return Scan(decoder_.Push(token, shown), may_stop);
}

std::string TextStream::Scan(std::string_view text, bool may_stop) {
  if (stops_.empty()) return std::string(text);
  held_ += text;
  size_t certain = 0;  // bytes of held_ that are part of no possible stop string
  for (size_t end = held_.size() - text.size() + 1; end <= held_.size(); ++end) {
    size_t longest = 0;  // that is being matched here
    const Stop* completed = nullptr;
    for (Stop& stop : stops_) {
      const bool whole = stop.Next(held_[end - 1]);
      // A string that is completed too early is text: only its border may still be a beginning.
      const auto length =
          static_cast<size_t>(whole && !may_stop ? stop.fallback[stop.matched] : stop.matched);
      longest = std::max(longest, length);
      if (whole && may_stop && (completed == nullptr || stop.text.size() > completed->text.size()))
        completed = &stop;
    }
    if (completed != nullptr) {
      stop_string_ = completed->text;
      held_.resize(end - completed->text.size());
      return std::exchange(held_, {});
    }
    certain = end - longest;
  }
  std::string out = held_.substr(0, certain);
  held_.erase(0, certain);
  return out;
}

std::string TextStream::Finish() {
  // Ill-formed bytes at the very end may still complete a stop string that ends in U+FFFD: that is
  // no reason to end what has ended.
  held_ += decoder_.Finish();
  return std::exchange(held_, {});
}

}  // namespace dsla
