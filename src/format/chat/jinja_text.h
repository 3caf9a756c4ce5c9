// A string in a template's evaluation that knows which of its bytes come from outside the template,
// so that no message, tool or argument can spell a control token. Every operation that cuts or
// joins strings keeps the marks.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace dsla::jinja {

class Text {
 public:
  struct Range {
    size_t begin, end;
    bool operator==(const Range&) const = default;
  };

  Text() = default;
  explicit Text(std::string bytes, bool foreign = false);

  const std::string& bytes() const { return bytes_; }
  // In order, not empty, not touching each other.
  const std::vector<Range>& foreign() const { return foreign_; }

  Text Sub(size_t begin, size_t length = std::string::npos) const;
  // `part` must be a view into bytes().
  Text Sub(std::string_view part) const { return Sub(part.data() - bytes_.data(), part.size()); }
  void Append(const Text& other);

  // The same with each run of equal origin replaced by map(run).
  template <typename Map>
  Text MapRuns(Map map) const {
    Text result;
    size_t at = 0;
    const auto run = [&](size_t end, bool is_foreign) {
      if (at < end)
        result.Append(Text(map(std::string_view(bytes_).substr(at, end - at)), is_foreign));
      at = end;
    };
    for (const Range& range : foreign_) {
      run(range.begin, false);
      run(range.end, true);
    }
    run(bytes_.size(), false);
    return result;
  }

  // Of the bytes alone: a template cannot tell where a string is from.
  bool operator==(const Text& other) const { return bytes_ == other.bytes_; }

 private:
  void AddForeign(size_t begin, size_t end);

  std::string bytes_;
  std::vector<Range> foreign_;
};

}  // namespace dsla::jinja
