#include "format/chat/tool_parser.h"

#include <algorithm>
#include <span>
#include <utility>

#include "format/chat/tool_call_reader.h"

namespace dsla {
namespace {

using std::string_view;

bool IsSpace(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

// What a text holds besides content.
struct Marker {
  enum class Kind {
    kBegin,   // a call follows
    kInside,  // the call has begun with it: its reader sees it, too
    kBefore,  // stands before calls
    kAfter,   // stands behind a call, and is text elsewhere
  };
  string_view text;
  Kind kind;
};

constexpr Marker kHermes[] = {{"<tool_call>", Marker::Kind::kBegin},
                              {"</tool_call>", Marker::Kind::kAfter}};
constexpr Marker kLlama3[] = {{"<|python_tag|>", Marker::Kind::kBegin}};
constexpr Marker kMistral[] = {{"[TOOL_CALLS]", Marker::Kind::kBegin}};
constexpr Marker kQwen3Coder[] = {{"<tool_call>", Marker::Kind::kBefore},
                                  {"<function=", Marker::Kind::kInside},
                                  {"</tool_call>", Marker::Kind::kAfter}};
constexpr Marker kDeepSeek[] = {{"<｜tool▁calls▁begin｜>", Marker::Kind::kBefore},
                                {"<｜tool▁call▁begin｜>", Marker::Kind::kBegin},
                                {"```", Marker::Kind::kAfter},
                                {"<｜tool▁call▁end｜>", Marker::Kind::kAfter},
                                {"<｜tool▁calls▁end｜>", Marker::Kind::kAfter}};

std::span<const Marker> Markers(ToolDialect dialect) {
  switch (dialect) {
    case ToolDialect::kHermes:
      return kHermes;
    case ToolDialect::kLlama3:
      return kLlama3;
    case ToolDialect::kMistral:
      return kMistral;
    case ToolDialect::kQwen3Coder:
      return kQwen3Coder;
    case ToolDialect::kDeepSeek:
      return kDeepSeek;
  }
  return {};
}

}  // namespace

class ToolParser::Impl {
 public:
  explicit Impl(Options options)
      : options_(std::move(options)), markers_(Markers(options_.dialect)) {}

  ToolReplyDelta Push(string_view text) {
    for (const char c : text) Byte(c);
    return std::exchange(delta_, {});
  }

  ToolReplyDelta Finish() {
    if (calling_) Break();
    // What may stand behind a call, or has begun to, is no content.
    const bool behind = after_call() && (held_.empty() || MayBecomeMarker());
    if (!behind) Content(held_);
    return std::exchange(delta_, {});
  }

  const ToolReply& reply() const { return reply_; }

 private:
  bool after_call() const { return blank_ && called_; }

  void Byte(char c) {
    if (calling_) return InCall(c);
    held_ += c;
    while (!held_.empty() && !calling_) {
      if (const Marker* marker = Whole()) {
        Take(*marker);
      } else if (MayBecomeMarker()) {
        return;
      } else {
        const char first = held_[0];
        held_.erase(0, 1);
        Single(first);
      }
    }
  }

  bool Counts(const Marker& marker) const {
    return marker.kind != Marker::Kind::kAfter || after_call();
  }
  const Marker* Whole() const {
    const auto found = std::ranges::find_if(
        markers_, [&](const Marker& marker) { return Counts(marker) && marker.text == held_; });
    return found == markers_.end() ? nullptr : &*found;
  }
  bool MayBecomeMarker() const {
    return std::ranges::any_of(markers_, [&](const Marker& marker) {
      return Counts(marker) && marker.text.starts_with(held_);
    });
  }

  void Take(const Marker& marker) {
    const std::string text = std::exchange(held_, {});
    if (marker.kind == Marker::Kind::kBegin) {
      Begin(text);
    } else if (marker.kind == Marker::Kind::kInside) {
      Begin("");
      for (const char c : text) InCall(c);
    } else if (marker.kind == Marker::Kind::kBefore) {
      pending_ += text;
    } else {
      pending_.clear();
    }
  }

  // A byte that is part of no marker.
  void Single(char c) {
    if (c == '{' && MayBegin()) {
      Begin("");
      unmarked_ = options_.dialect == ToolDialect::kLlama3;
      if (!unmarked_) reader_ = NewJsonCallReader();
      InCall(c);
    } else if (c == ']' && in_list_ && after_call()) {
      in_list_ = false;
      pending_.clear();
    } else if ((IsSpace(c) && (blank_ || !pending_.empty())) || IsSeparator(c)) {
      pending_ += c;
    } else {
      Content(string_view(&c, 1));
    }
  }

  // An object that no marker announces.
  bool MayBegin() const {
    return options_.dialect == ToolDialect::kLlama3 ? blank_ : in_list_ && after_call();
  }
  // Between calls.
  bool IsSeparator(char c) const {
    if (!after_call()) return false;
    if (options_.dialect == ToolDialect::kLlama3) return c == ';' || c == ',';
    return in_list_ && c == ',';
  }

  void Content(string_view text) {
    for (const string_view part : {string_view(pending_), text}) {
      reply_.content += part;
      delta_.content += part;
    }
    pending_.clear();
    blank_ = in_list_ = false;
  }

  void Begin(string_view marker) {
    raw_ = std::exchange(pending_, {}) + std::string(marker);
    sent_ = 0;
    calling_ = true;
    unmarked_ = begun_ = false;
    arguments_.clear();
    reader_ = NewReader();
  }

  // Mistral's is known once there is a byte of it.
  std::unique_ptr<ToolCallReader> NewReader() const {
    switch (options_.dialect) {
      case ToolDialect::kHermes:
      case ToolDialect::kLlama3:
        return NewJsonCallReader();
      case ToolDialect::kQwen3Coder:
        return NewXmlCallReader(options_.tools);
      case ToolDialect::kDeepSeek:
        return NewDeepSeekCallReader();
      case ToolDialect::kMistral:
        break;
    }
    return nullptr;
  }

  void InCall(char c) {
    if (!reader_ && !ChooseReader(c)) {
      raw_ += c;
      return;
    }
    const auto result = reader_->Next(c);
    const bool unknown = unmarked_ && !reader_->name().empty() && !IsTool(reader_->name());
    if (result == ToolCallReader::Result::kBad || unknown) {
      Break();
      Byte(c);
      return;
    }
    raw_ += c;
    // After every byte, so that what goes out of a call that breaks does not depend on the pieces.
    Stream();
    if (result == ToolCallReader::Result::kDone) Complete();
  }

  // false: the byte stands before the call.
  bool ChooseReader(char c) {
    if (IsSpace(c)) return false;
    if (c == '[' && !in_list_) {
      in_list_ = true;
      return false;
    }
    reader_ = c == '{' || in_list_ ? NewJsonCallReader() : NewMistralCallReader();
    return true;
  }

  bool IsTool(string_view name) const {
    return std::ranges::any_of(*options_.tools, [&](const Tool& t) { return t.name == name; });
  }

  // Sends what is known of the call.
  void Stream() {
    std::string arguments = reader_->TakeArguments();
    if (arguments.empty() || Dropped()) return;
    sent_ = raw_.size();
    arguments_ += arguments;
    if (!std::exchange(begun_, true)) {
      delta_.calls.push_back({next_index_, reader_->name(), std::move(arguments)});
    } else if (!delta_.calls.empty()) {  // all of one Push, so it is this call's
      delta_.calls.back().arguments += arguments;
    } else {
      delta_.calls.push_back({next_index_, "", std::move(arguments)});
    }
  }

  bool Dropped() const { return !options_.parallel && !reply_.calls.empty(); }

  void Complete() {
    if (!Dropped()) {
      reply_.calls.push_back({"", reader_->name(), std::move(arguments_)});
      ++next_index_;
    }
    reader_.reset();
    calling_ = false;
    blank_ = called_ = true;
  }

  // It is no call after all.
  void Break() {
    const std::string raw = std::exchange(raw_, {});
    reader_.reset();
    calling_ = blank_ = in_list_ = false;
    if (begun_) ++next_index_;
    reply_.content += raw;
    delta_.content += string_view(raw).substr(sent_);
  }

  const Options options_;
  const std::span<const Marker> markers_;
  ToolReplyDelta delta_;  // since the last Push
  ToolReply reply_;
  std::string held_;      // may become a marker
  std::string pending_;   // left out if a call follows, content otherwise
  bool blank_ = true;     // no content yet, or none since the last call
  bool called_ = false;   // there is a call
  bool in_list_ = false;  // Mistral: of calls
  int next_index_ = 0;

  // Of the call that is being read.
  bool calling_ = false;
  bool unmarked_ = false;  // its name must be a tool's
  bool begun_ = false;     // its name has gone out
  std::unique_ptr<ToolCallReader> reader_;
  std::string raw_;  // its text, with what announced it
  size_t sent_ = 0;  // bytes of that which have gone out
  std::string arguments_;
};

ToolParser::ToolParser(Options options) : impl_(std::make_unique<Impl>(std::move(options))) {}
ToolParser::~ToolParser() = default;
ToolParser::ToolParser(ToolParser&&) noexcept = default;

ToolReplyDelta ToolParser::Push(std::string_view text) { return impl_->Push(text); }
ToolReplyDelta ToolParser::Finish() { return impl_->Finish(); }
const ToolReply& ToolParser::reply() const { return impl_->reply(); }

}  // namespace dsla
