#include "format/chat/jinja_library.h"

#include <fmt/format.h>

#include <algorithm>

#include "format/chat/jinja_print.h"
#include "format/chat/strip.h"

namespace dsla::jinja {
namespace {

// The budget: shared lists within lists can be far larger to walk than to hold.
bool Equal(const Value& a, const Value& b, int& budget) {
  if (--budget < 0) return false;
  const auto equal = [&](const Value& x, const Value& y) { return Equal(x, y, budget); };
  if (a.AsList() && b.AsList()) return std::ranges::equal(*a.AsList(), *b.AsList(), equal);
  if (a.AsDict() && b.AsDict()) {
    if (a.is_namespace || b.is_namespace) return a.AsDict() == b.AsDict();
    // Keys are in the order of insertion, which is the same for the messages that templates
    // compare.
    return std::ranges::equal(*a.AsDict(), *b.AsDict(), [&](const auto& x, const auto& y) {
      return x.first == y.first && equal(x.second, y.second);
    });
  }
  return a.v == b.v;
}

// `value`, unless comparing has used up its budget.
Expected<Value> Compared(Value value, int budget) {
  if (budget < 0) return Unsupported("a comparison of too many values");
  return value;
}

Expected<Value> Bounded(Text text, const Bounds& bounds) {
  if (text.bytes().size() > bounds.text) return Unsupported("a text of over {} bytes", bounds.text);
  return Value(std::move(text));
}

const std::string* TextArgument(const List& args, size_t i) {
  return i < args.size() ? args[i].String() : nullptr;
}

Expected<Value> Contains(const Value& item, const Value& container, const Bounds& bounds) {
  if (container.Is<Undefined>()) return Value(false);
  if (container.String() && item.String()) {
    if (item.String()->size() > kMaxPattern) return Unsupported("a search for a long text");
    return Value(container.String()->find(*item.String()) != std::string::npos);
  }
  if (const List* list = container.AsList()) {
    int budget = bounds.compared;
    const bool found =
        std::ranges::any_of(*list, [&](const Value& x) { return Equal(x, item, budget); });
    return Compared(found, budget);
  }
  if (container.AsDict() && item.String()) {
    return Value(std::ranges::any_of(*container.AsDict(),
                                     [&](const auto& x) { return x.first == *item.String(); }));
  }
  return Unsupported("'in' on these types");
}

Expected<Value> Arithmetic(std::string_view op, int64_t a, int64_t b) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every result in range
  if (std::max(a, b) > kLimit || std::min(a, b) < -kLimit) return Unsupported("a number over 2^31");
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (b == 0) return Unsupported("division by zero");
  const int64_t remainder = ((a % b) + b) % b;  // Python's: of b's sign
  return Value(op == "%" ? remainder : (a - remainder) / b);
}

Expected<Value> Order(std::string_view op, const Value& a, const Value& b) {
  int order = 0;
  if (a.Int() && b.Int()) {
    order = *a.Int() < *b.Int() ? -1 : *a.Int() > *b.Int();
  } else if (a.String() && b.String()) {
    order = a.String()->compare(*b.String());
  } else {
    return Unsupported("'{}' on these types", op);
  }
  if (op == "<") return Value(order < 0);
  if (op == ">") return Value(order > 0);
  return Value(op == "<=" ? order <= 0 : order >= 0);
}

// Python's strip, lstrip and rstrip.
Expected<Value> StripCall(const Text& self, std::string_view name, const List& args) {
  const bool left = name != "rstrip", right = name != "lstrip";
  std::string_view text = self.bytes();
  if (args.empty() || args[0].Is<None>()) {
    if (right) text = StripRight(text);
    if (left) text = StripLeft(text);
    return Value(self.Sub(text));
  }
  const std::string* characters = TextArgument(args, 0);
  if (!characters || std::ranges::any_of(*characters, [](char c) { return c < 0; })) {
    return Unsupported("'{}' of characters that are not ASCII", name);
  }
  if (right) text = StripRight(text, *characters);
  if (left) text = StripLeft(text, *characters);
  return Value(self.Sub(text));
}

Expected<Value> Split(const Text& self, const List& args, const Bounds& bounds) {
  const std::string* separator = TextArgument(args, 0);
  if (!separator || separator->empty() || separator->size() > kMaxPattern || args.size() > 2)
    return Unsupported("this use of split");
  auto left = static_cast<int64_t>(bounds.items);
  if (args.size() == 2) {
    if (!args[1].Int()) return Unsupported("this use of split");
    if (*args[1].Int() >= 0) left = std::min(left, *args[1].Int());
  }
  List parts;
  size_t from = 0;
  for (size_t at; left-- > 0 && (at = self.bytes().find(*separator, from)) != std::string::npos;) {
    parts.emplace_back(self.Sub(from, at - from));
    from = at + separator->size();
  }
  if (left < 0 && args.size() < 2) return Unsupported("split into over {} parts", bounds.items);
  parts.emplace_back(self.Sub(from));
  return Value(std::move(parts));
}

Expected<Value> Replace(const Text& self, const List& args, const Bounds& bounds) {
  const std::string* from = TextArgument(args, 0);
  const Text* to = args.size() == 2 ? args[1].AsText() : nullptr;
  if (!from || !to || from->empty() || from->size() > kMaxPattern)
    return Unsupported("this use of replace");
  Text result;
  size_t begin = 0;
  for (size_t at; (at = self.bytes().find(*from, begin)) != std::string::npos;) {
    result.Append(self.Sub(begin, at - begin));
    result.Append(*to);
    begin = at + from->size();
    if (result.bytes().size() > bounds.text) break;
  }
  result.Append(self.Sub(begin));
  return Bounded(std::move(result), bounds);
}

Expected<Value> MapAscii(const Text& self, bool upper) {
  if (std::ranges::any_of(self.bytes(), [](char c) { return c < 0; }))
    return Unsupported("upper or lower case beyond ASCII");
  return Value(self.MapRuns([&](std::string_view run) {
    std::string result(run);
    for (char& c : result) {
      if (upper && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
      if (!upper && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    return result;
  }));
}

Expected<Value> Length(const Value& value) {
  if (value.Is<Undefined>()) return Value(int64_t{0});
  if (value.AsList()) return Value(static_cast<int64_t>(value.AsList()->size()));
  if (value.AsDict()) return Value(static_cast<int64_t>(value.AsDict()->size()));
  if (!value.String()) return Unsupported("the length of this type");
  const auto is_first = [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; };
  return Value(static_cast<int64_t>(std::ranges::count_if(*value.String(), is_first)));
}

// selectattr(name, "equalto", value) and rejectattr.
Expected<Value> SelectAttribute(const Value& self, const List& args, bool keep,
                                const Bounds& bounds) {
  const std::string* test = TextArgument(args, 1);
  if (args.size() != 3 || !args[0].String() || !test ||
      (*test != "equalto" && *test != "==" && *test != "eq")) {
    return Unsupported("this use of selectattr or rejectattr");
  }
  DSLA_ASSIGN_OR_RETURN(const List items, ToList(self));
  List kept;
  int budget = bounds.compared;
  for (const Value& item : items) {
    DSLA_ASSIGN_OR_RETURN(const Value attribute, Item(item, args[0]));
    if (Equal(attribute, args[2], budget) == keep) kept.push_back(item);
  }
  return Compared(Value(std::move(kept)), budget);
}

Expected<Value> Join(const Value& self, const List& args, const Bounds& bounds) {
  DSLA_ASSIGN_OR_RETURN(const List items, ToList(self));
  const Text* separator = args.empty() ? nullptr : args[0].AsText();
  Text joined;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0 && separator) joined.Append(*separator);
    DSLA_ASSIGN_OR_RETURN(const Text text, ToText(items[i], bounds));
    joined.Append(text);
    if (joined.bytes().size() > bounds.text) break;
  }
  return Bounded(std::move(joined), bounds);
}

// map(attribute="name").
Expected<Value> MapAttribute(const Value& self, const Named& named) {
  const auto attribute = named.find("attribute");
  if (attribute == named.end() || !attribute->second.String())
    return Unsupported("this use of map");
  DSLA_ASSIGN_OR_RETURN(List items, ToList(self));
  for (Value& item : items) {
    DSLA_ASSIGN_OR_RETURN(item, Item(item, attribute->second));
  }
  return Value(std::move(items));
}

Value Items(const Value& self) {
  List items;
  for (const auto& [key, value] : *self.AsDict())
    items.push_back(Value(List{Value(Text(key, self.foreign_keys)), value}));
  return Value(std::move(items));
}

// A slice of a text: indices count code points.
Expected<Value> SliceText(const Text& text, int64_t from, int64_t to,
                          const std::vector<size_t>& starts) {
  if (from >= to) return Value(Text());
  return Value(text.Sub(starts[from], starts[to] - starts[from]));
}

// Where each code point begins, and the end.
std::vector<size_t> CodePoints(const std::string& text) {
  std::vector<size_t> starts;
  for (size_t i = 0; i < text.size(); ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) starts.push_back(i);
  }
  starts.push_back(text.size());
  return starts;
}

}  // namespace

Value::Value(List l) {
  for (const Value& item : l) depth = std::max(depth, item.depth);
  ++depth;
  v = std::make_shared<List>(std::move(l));
}

Value::Value(Dict d) {
  for (const auto& [key, item] : d) depth = std::max(depth, item.depth);
  ++depth;
  v = std::make_shared<Dict>(std::move(d));
}

bool Truth(const Value& value) {
  if (const bool* b = std::get_if<bool>(&value.v)) return *b;
  if (value.Int()) return *value.Int() != 0;
  if (value.String()) return !value.String()->empty();
  if (value.AsList()) return !value.AsList()->empty();
  if (value.AsDict()) return value.is_namespace || !value.AsDict()->empty();
  return false;
}

Expected<Text> ToText(const Value& value, const Bounds& bounds) {
  if (value.Is<Undefined>()) return Text();
  if (value.AsText()) return *value.AsText();
  return ToPython(value, bounds);
}

Expected<List> ToList(const Value& value) {
  if (value.Is<Undefined>()) return List();
  if (value.AsList()) return *value.AsList();
  if (value.AsDict() && !value.is_namespace) {
    List keys;
    for (const auto& [key, item] : *value.AsDict())
      keys.emplace_back(Text(key, value.foreign_keys));
    return keys;
  }
  return Unsupported("iteration over this type");
}

Expected<Value> Item(const Value& base, const Value& key) {
  if (base.Is<Undefined>()) return Unsupported("an attribute of an undefined value");
  if (const Dict* dict = base.AsDict(); dict && key.String()) {
    for (const auto& [name, value] : *dict) {
      if (name == *key.String()) return value;
    }
  }
  if (const List* list = base.AsList(); list && key.Int()) {
    const auto n = static_cast<int64_t>(list->size());
    const int64_t i = *key.Int() < 0 ? *key.Int() + n : *key.Int();
    if (i >= 0 && i < n) return (*list)[i];
  }
  if (base.String() && key.Int()) return Unsupported("a character of a text");
  return Value();
}

Expected<Value> Slice(const Value& base, std::optional<int64_t> begin, std::optional<int64_t> end,
                      std::optional<int64_t> step) {
  const List* list = base.AsList();
  const int64_t by = step.value_or(1);
  if (!list && (!base.AsText() || by != 1))
    return Unsupported("a slice of something that is no list");
  if (by != 1 && by != -1) return Unsupported("a slice's step of {}", by);
  std::vector<size_t> starts;
  if (!list) starts = CodePoints(*base.String());
  const auto n = static_cast<int64_t>(list ? list->size() : starts.size() - 1);
  const int64_t low = by > 0 ? 0 : -1, high = by > 0 ? n : n - 1;
  const auto clamp = [&](int64_t i) { return std::clamp(i < 0 ? i + n : i, low, high); };
  const int64_t from = begin ? clamp(*begin) : (by > 0 ? low : high);
  const int64_t to = end ? clamp(*end) : (by > 0 ? high : low);
  if (!list) return SliceText(*base.AsText(), from, to, starts);
  List result;
  for (int64_t i = from; by > 0 ? i < to : i > to; i += by) result.push_back((*list)[i]);
  return Value(std::move(result));
}

Expected<Value> Range(const List& args, const Bounds& bounds) {
  if (args.empty() || args.size() > 2 || !args[0].Int() || !args.back().Int()) {
    return Unsupported("this use of range");
  }
  const int64_t begin = args.size() == 2 ? *args[0].Int() : 0, end = *args.back().Int();
  List result;
  for (int64_t i = begin; i < end; ++i) {
    if (result.size() >= bounds.items) return Unsupported("a range of over {}", bounds.items);
    result.emplace_back(i);
  }
  return Value(std::move(result));
}

Expected<Value> Binary(std::string_view op, const Value& a, const Value& b, const Bounds& bounds) {
  if (op == "==" || op == "!=") {
    int budget = bounds.compared;
    const bool equal = Equal(a, b, budget);
    return Compared(equal == (op == "=="), budget);
  }
  if (op == "in") return Contains(a, b, bounds);
  if (op == "not in") {
    DSLA_ASSIGN_OR_RETURN(const Value in, Contains(a, b, bounds));
    return Value(!Truth(in));
  }
  if (op[0] == '<' || op[0] == '>') return Order(op, a, b);
  if (op == "~") {
    DSLA_ASSIGN_OR_RETURN(Text text, ToText(a, bounds));
    DSLA_ASSIGN_OR_RETURN(const Text right, ToText(b, bounds));
    text.Append(right);
    return Bounded(std::move(text), bounds);
  }
  if (op == "+" && a.AsText() && b.AsText()) {
    Text text = *a.AsText();
    text.Append(*b.AsText());
    return Bounded(std::move(text), bounds);
  }
  if (op == "+" && a.AsList() && b.AsList()) {
    List joined = *a.AsList();
    joined.insert(joined.end(), b.AsList()->begin(), b.AsList()->end());
    if (joined.size() > bounds.items) return Unsupported("a list of over {}", bounds.items);
    return Value(std::move(joined));
  }
  if (a.Int() && b.Int()) return Arithmetic(op, *a.Int(), *b.Int());
  return Unsupported("'{}' on these types", op);
}

Expected<Value> CallMethod(const Value& self, std::string_view name, const List& args,
                           const Bounds& bounds) {
  if (const Text* text = self.AsText()) {
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      return StripCall(*text, name, args);
    }
    if (name == "split") return Split(*text, args, bounds);
    if (name == "replace") return Replace(*text, args, bounds);
    if (name == "upper" || name == "lower") return MapAscii(*text, name == "upper");
    const std::string* part = TextArgument(args, 0);
    if (name == "startswith" && part) return Value(text->bytes().starts_with(*part));
    if (name == "endswith" && part) return Value(text->bytes().ends_with(*part));
  }
  if (self.AsDict()) {
    if (name == "items" && args.empty()) return Items(self);
    if (name == "keys" && args.empty()) {
      DSLA_ASSIGN_OR_RETURN(List keys, ToList(self));
      return Value(std::move(keys));
    }
    if (name == "get" && !args.empty() && args[0].String()) {
      DSLA_ASSIGN_OR_RETURN(Value value, Item(self, args[0]));
      if (!value.Is<Undefined>()) return value;
      return args.size() > 1 ? args[1] : Value(None{});
    }
  }
  return Unsupported("the method '{}'", name.substr(0, 32));
}

Expected<Value> CallFilter(const Value& self, std::string_view name, const List& args,
                           const Named& named, const Bounds& bounds) {
  if (name == "tojson" && args.empty()) return ToJson(self, named, bounds);
  if (name == "map" && args.empty()) return MapAttribute(self, named);
  if (!named.empty()) return Unsupported("named arguments of '{}'", name.substr(0, 32));
  if (name == "trim") {
    DSLA_ASSIGN_OR_RETURN(const Text text, ToText(self, bounds));
    return StripCall(text, "strip", args);
  }
  if (name == "length" || name == "count") return Length(self);
  if (name == "string") {
    DSLA_ASSIGN_OR_RETURN(Text text, ToText(self, bounds));
    return Value(std::move(text));
  }
  if (name == "safe") return self;
  if (name == "list") {
    DSLA_ASSIGN_OR_RETURN(List items, ToList(self));
    return Value(std::move(items));
  }
  if (name == "default" || name == "d") {
    const bool falsy = args.size() > 1 && Truth(args[1]) && !Truth(self);
    if (!self.Is<Undefined>() && !falsy) return self;
    return args.empty() ? Value(std::string()) : args[0];
  }
  if (name == "first" || name == "last") {
    return Item(self, Value(name == "first" ? int64_t{0} : int64_t{-1}));
  }
  if (name == "selectattr" || name == "rejectattr") {
    return SelectAttribute(self, args, name == "selectattr", bounds);
  }
  if (name == "join") return Join(self, args, bounds);
  if (name == "items" && self.AsDict()) return Items(self);
  if ((name == "upper" || name == "lower") && self.AsText()) {
    return MapAscii(*self.AsText(), name == "upper");
  }
  if (name == "replace" && self.AsText()) return Replace(*self.AsText(), args, bounds);
  return Unsupported("the filter '{}'", name.substr(0, 32));
}

Expected<Value> CallTest(const Value& value, std::string_view name) {
  if (name == "defined") return Value(!value.Is<Undefined>());
  if (name == "undefined") return Value(value.Is<Undefined>());
  if (name == "none") return Value(value.Is<None>());
  if (name == "string") return Value(value.String() != nullptr);
  if (name == "mapping") return Value(value.AsDict() != nullptr);
  if (name == "boolean") return Value(value.Is<bool>());
  if (name == "true") return Value(value.Is<bool>() && Truth(value));
  if (name == "false") return Value(value.Is<bool>() && !Truth(value));
  if (name == "integer") return Value(value.Int() != nullptr);
  if (name == "number") return Value(value.Int() != nullptr || value.Is<Real>());
  if (name == "iterable" || name == "sequence") {
    return Value(value.String() || value.AsList() || value.AsDict() || value.Is<Undefined>());
  }
  return Unsupported("the test '{}'", name.substr(0, 32));
}

}  // namespace dsla::jinja
