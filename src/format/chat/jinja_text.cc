#include "format/chat/jinja_text.h"

#include <algorithm>
#include <utility>

namespace dsla::jinja {

Text::Text(std::string bytes, bool foreign) : bytes_(std::move(bytes)) {
  if (foreign) AddForeign(0, bytes_.size());
}

void Text::AddForeign(size_t begin, size_t end) {
  if (begin == end) return;
  if (!foreign_.empty() && foreign_.back().end == begin) {
    foreign_.back().end = end;
  } else {
    foreign_.push_back({begin, end});
  }
}

Text Text::Sub(size_t begin, size_t length) const {
  begin = std::min(begin, bytes_.size());
  const size_t end = begin + std::min(length, bytes_.size() - begin);
  Text part(bytes_.substr(begin, end - begin));
  for (const Range& range : foreign_) {
    const size_t from = std::max(range.begin, begin), to = std::min(range.end, end);
    if (from < to) part.AddForeign(from - begin, to - begin);
  }
  return part;
}

void Text::Append(const Text& other) {
  const size_t size = bytes_.size();
  bytes_ += other.bytes_;
  for (const Range& range : other.foreign_) AddForeign(size + range.begin, size + range.end);
}

}  // namespace dsla::jinja
