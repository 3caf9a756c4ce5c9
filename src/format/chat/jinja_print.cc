#include "format/chat/jinja_print.h"

#include <fmt/format.h>

namespace dsla::jinja {
namespace {

std::string JsonEscaped(std::string_view run) {
  std::string out;
  for (const char c : run) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) >= ' ') {
      out += c;
    } else if (const size_t at = std::string_view("\n\r\t\b\f").find(c);
               at != std::string_view::npos) {
      out += {'\\', "nrtbf"[at]};
    } else {
      out += fmt::format("\\u{:04x}", static_cast<int>(c));
    }
  }
  return out;
}

std::string PythonEscaped(std::string_view run, char quote) {
  std::string out;
  for (const char c : run) {
    if (c == quote || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) >= ' ' && c != '\x7f') {
      out += c;
    } else if (const size_t at = std::string_view("\n\r\t").find(c); at != std::string_view::npos) {
      out += {'\\', "nrt"[at]};
    } else {
      out += fmt::format("\\x{:02x}", static_cast<int>(c));
    }
  }
  return out;
}

class Printer {
 public:
  enum class Form { kJson, kPython };
  Printer(Form form, int64_t indent, const Bounds& bounds)
      : json_(form == Form::kJson), indent_(indent), bounds_(bounds) {}

  Expected<Text> Print(const Value& value) {
    DSLA_RETURN_IF_ERROR(Any(value, 0));
    return std::move(out_);
  }

 private:
  // What every value passes, so that lists that are shared many times end at the bound, too.
  Status Any(const Value& value, int depth) {
    if (out_.bytes().size() > bounds_.text)
      return Unsupported("a text of over {} bytes", bounds_.text);
    if (value.Is<Undefined>()) return Unsupported("an undefined value as JSON or in a list's text");
    if (value.AsText()) {
      Quoted(*value.AsText());
    } else if (const List* list = value.AsList()) {
      return Sequence(*list, depth);
    } else if (value.AsDict()) {
      return Mapping(value, depth);
    } else {
      Own(Scalar(value));
    }
    return Status::Ok();
  }

  std::string Scalar(const Value& value) const {
    if (value.Is<None>()) return json_ ? "null" : "None";
    if (const bool* b = std::get_if<bool>(&value.v)) {
      if (json_) return *b ? "true" : "false";
      return *b ? "True" : "False";
    }
    return value.Int() ? std::to_string(*value.Int()) : std::get<Real>(value.v).text;
  }

  Status Sequence(const List& list, int depth) {
    Own("[");
    for (size_t i = 0; i < list.size(); ++i) {
      Separate(i, depth + 1);
      DSLA_RETURN_IF_ERROR(Any(list[i], depth + 1));
    }
    if (!list.empty()) Line(depth);
    Own("]");
    return Status::Ok();
  }

  Status Mapping(const Value& value, int depth) {
    const Dict& dict = *value.AsDict();
    Own("{");
    for (size_t i = 0; i < dict.size(); ++i) {
      Separate(i, depth + 1);
      Quoted(Text(dict[i].first, value.foreign_keys));
      Own(": ");
      DSLA_RETURN_IF_ERROR(Any(dict[i].second, depth + 1));
    }
    if (!dict.empty()) Line(depth);
    Own("}");
    return Status::Ok();
  }

  void Separate(size_t i, int depth) {
    if (i > 0) Own(indent_ >= 0 ? "," : ", ");
    Line(depth);
  }
  void Line(int depth) {
    if (indent_ < 0) return;
    std::string line(1, '\n');
    line.append(static_cast<size_t>(indent_ * depth), ' ');
    Own(std::move(line));
  }

  void Quoted(const Text& text) {
    const std::string& bytes = text.bytes();
    const bool apostrophe = bytes.find('\'') != std::string::npos;
    const bool quotes = bytes.find('"') != std::string::npos;
    const char quote = json_ || (apostrophe && !quotes) ? '"' : '\'';
    Own(std::string(1, quote));
    out_.Append(text.MapRuns([&](std::string_view run) {
      return json_ ? JsonEscaped(run) : PythonEscaped(run, quote);
    }));
    Own(std::string(1, quote));
  }

  void Own(std::string bytes) { out_.Append(Text(std::move(bytes))); }

  const bool json_;
  const int64_t indent_;  // below 0: all in one line
  const Bounds& bounds_;
  Text out_;
};

}  // namespace

Expected<Text> ToPython(const Value& value, const Bounds& bounds) {
  return Printer(Printer::Form::kPython, -1, bounds).Print(value);
}

Expected<Value> ToJson(const Value& value, const Named& named, const Bounds& bounds) {
  int64_t indent = -1;
  for (const auto& [name, argument] : named) {
    const bool ascii = name == "ensure_ascii" && !Truth(argument);
    if (name == "indent" && argument.Int() && *argument.Int() >= 0 && *argument.Int() <= 16) {
      indent = *argument.Int();
    } else if (!ascii && !argument.Is<None>()) {
      return Unsupported("this use of tojson");
    }
  }
  DSLA_ASSIGN_OR_RETURN(Text text, Printer(Printer::Form::kJson, indent, bounds).Print(value));
  return Value(std::move(text));
}

}  // namespace dsla::jinja
