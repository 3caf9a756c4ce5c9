#include "format/chat/jinja_library.h"

#include <fmt/format.h>

#include <algorithm>

#include "format/chat/strip.h"

namespace dsla::jinja {
namespace {

// How many values one operator may compare: shared lists within lists can be far larger to walk
// than to hold.
constexpr int kMaxCompared = 1000;

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
  if (budget < 0) return Unsupported("a comparison of over {} values", kMaxCompared);
  return value;
}

Expected<Value> Bounded(std::string text) {
  if (text.size() > kMaxText) return Unsupported("a text of over {} bytes", kMaxText);
  return Value(std::move(text));
}

const std::string* TextArgument(const List& args, size_t i) {
  return i < args.size() ? args[i].String() : nullptr;
}

Expected<Value> Contains(const Value& item, const Value& container) {
  if (container.Is<Undefined>()) return Value(false);
  if (container.String() && item.String()) {
    if (item.String()->size() > kMaxPattern) return Unsupported("a search for a long text");
    return Value(container.String()->find(*item.String()) != std::string::npos);
  }
  if (const List* list = container.AsList()) {
    int budget = kMaxCompared;
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
Expected<Value> StripCall(std::string_view text, std::string_view name, const List& args) {
  const bool left = name != "rstrip", right = name != "lstrip";
  if (args.empty() || args[0].Is<None>()) {
    if (right) text = StripRight(text);
    if (left) text = StripLeft(text);
    return Value(text);
  }
  const std::string* characters = TextArgument(args, 0);
  if (!characters || std::ranges::any_of(*characters, [](char c) { return c < 0; })) {
    return Unsupported("'{}' of characters that are not ASCII", name);
  }
  if (right) text = StripRight(text, *characters);
  if (left) text = StripLeft(text, *characters);
  return Value(text);
}

Expected<Value> Split(std::string_view text, const List& args) {
  const std::string* separator = TextArgument(args, 0);
  if (!separator || separator->empty() || separator->size() > kMaxPattern || args.size() > 2)
    return Unsupported("this use of split");
  int64_t left = kMaxItems;
  if (args.size() == 2) {
    if (!args[1].Int()) return Unsupported("this use of split");
    if (*args[1].Int() >= 0) left = std::min(left, *args[1].Int());
  }
  List parts;
  for (size_t at; left-- > 0 && (at = text.find(*separator)) != std::string_view::npos;) {
    parts.emplace_back(text.substr(0, at));
    text.remove_prefix(at + separator->size());
  }
  if (left < 0 && args.size() < 2) return Unsupported("split into over {} parts", kMaxItems);
  parts.emplace_back(text);
  return Value(std::move(parts));
}

Expected<Value> Replace(std::string_view text, const List& args) {
  const std::string *from = TextArgument(args, 0), *to = TextArgument(args, 1);
  if (!from || !to || from->empty() || from->size() > kMaxPattern || args.size() != 2)
    return Unsupported("this use of replace");
  std::string result;
  for (size_t at; (at = text.find(*from)) != std::string_view::npos;) {
    result += text.substr(0, at);
    result += *to;
    text.remove_prefix(at + from->size());
    if (result.size() > kMaxText) break;
  }
  result += text;
  return Bounded(std::move(result));
}

Expected<Value> MapAscii(std::string_view text, bool upper) {
  std::string result(text);
  for (char& c : result) {
    if (c < 0) return Unsupported("upper or lower case beyond ASCII");
    if (upper && c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    if (!upper && c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return Value(std::move(result));
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
Expected<Value> SelectAttribute(const Value& self, const List& args, bool keep) {
  const std::string* test = TextArgument(args, 1);
  if (args.size() != 3 || !args[0].String() || !test ||
      (*test != "equalto" && *test != "==" && *test != "eq")) {
    return Unsupported("this use of selectattr or rejectattr");
  }
  DSLA_ASSIGN_OR_RETURN(const List items, ToList(self));
  List kept;
  int budget = kMaxCompared;
  for (const Value& item : items) {
    DSLA_ASSIGN_OR_RETURN(const Value attribute, Item(item, args[0]));
    if (Equal(attribute, args[2], budget) == keep) kept.push_back(item);
  }
  return Compared(Value(std::move(kept)), budget);
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

Expected<std::string> ToText(const Value& value) {
  if (value.Is<Undefined>()) return std::string();
  if (value.Is<None>()) return std::string("None");
  if (const bool* b = std::get_if<bool>(&value.v)) return std::string(*b ? "True" : "False");
  if (value.Int()) return std::to_string(*value.Int());
  if (value.String()) return *value.String();
  return Unsupported("a list or dictionary as text");
}

Expected<List> ToList(const Value& value) {
  if (value.Is<Undefined>()) return List();
  if (value.AsList()) return *value.AsList();
  if (value.AsDict() && !value.is_namespace) {
    List keys;
    for (const auto& [key, item] : *value.AsDict()) keys.emplace_back(key);
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
  if (!list) return Unsupported("a slice of something that is no list");
  const int64_t by = step.value_or(1), n = static_cast<int64_t>(list->size());
  if (by != 1 && by != -1) return Unsupported("a slice's step of {}", by);
  const int64_t low = by > 0 ? 0 : -1, high = by > 0 ? n : n - 1;
  const auto clamp = [&](int64_t i) { return std::clamp(i < 0 ? i + n : i, low, high); };
  const int64_t from = begin ? clamp(*begin) : (by > 0 ? low : high);
  const int64_t to = end ? clamp(*end) : (by > 0 ? high : low);
  List result;
  for (int64_t i = from; by > 0 ? i < to : i > to; i += by) result.push_back((*list)[i]);
  return Value(std::move(result));
}

Expected<Value> Range(const List& args) {
  if (args.empty() || args.size() > 2 || !args[0].Int() || !args.back().Int()) {
    return Unsupported("this use of range");
  }
  const int64_t begin = args.size() == 2 ? *args[0].Int() : 0, end = *args.back().Int();
  List result;
  for (int64_t i = begin; i < end; ++i) {
    if (result.size() >= kMaxItems) return Unsupported("a range of over {}", kMaxItems);
    result.emplace_back(i);
  }
  return Value(std::move(result));
}

Expected<Value> Binary(std::string_view op, const Value& a, const Value& b) {
  if (op == "==" || op == "!=") {
    int budget = kMaxCompared;
    const bool equal = Equal(a, b, budget);
    return Compared(equal == (op == "=="), budget);
  }
  if (op == "in") return Contains(a, b);
  if (op == "not in") {
    DSLA_ASSIGN_OR_RETURN(const Value in, Contains(a, b));
    return Value(!Truth(in));
  }
  if (op[0] == '<' || op[0] == '>') return Order(op, a, b);
  if (op == "~") {
    DSLA_ASSIGN_OR_RETURN(std::string left, ToText(a));
    DSLA_ASSIGN_OR_RETURN(const std::string right, ToText(b));
    return Bounded(left + right);
  }
  if (op == "+" && a.String() && b.String()) return Bounded(*a.String() + *b.String());
  if (op == "+" && a.AsList() && b.AsList()) {
    List joined = *a.AsList();
    joined.insert(joined.end(), b.AsList()->begin(), b.AsList()->end());
    if (joined.size() > kMaxItems) return Unsupported("a list of over {}", kMaxItems);
    return Value(std::move(joined));
  }
  if (a.Int() && b.Int()) return Arithmetic(op, *a.Int(), *b.Int());
  return Unsupported("'{}' on these types", op);
}

Expected<Value> CallMethod(const Value& self, std::string_view name, const List& args) {
  if (const std::string* text = self.String()) {
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      return StripCall(*text, name, args);
    }
    if (name == "split") return Split(*text, args);
    if (name == "replace") return Replace(*text, args);
    if (name == "upper" || name == "lower") return MapAscii(*text, name == "upper");
    const std::string* part = TextArgument(args, 0);
    if (name == "startswith" && part) return Value(text->starts_with(*part));
    if (name == "endswith" && part) return Value(text->ends_with(*part));
  }
  if (const Dict* dict = self.AsDict()) {
    if (name == "items" && args.empty()) {
      List items;
      for (const auto& [key, value] : *dict) items.push_back(Value(List{Value(key), value}));
      return Value(std::move(items));
    }
    if (name == "get" && !args.empty() && args[0].String()) {
      DSLA_ASSIGN_OR_RETURN(Value value, Item(self, args[0]));
      if (!value.Is<Undefined>()) return value;
      return args.size() > 1 ? args[1] : Value(None{});
    }
  }
  return Unsupported("the method '{}'", name.substr(0, 32));
}

Expected<Value> CallFilter(const Value& self, std::string_view name, const List& args) {
  if (name == "trim") {
    DSLA_ASSIGN_OR_RETURN(const std::string text, ToText(self));
    return StripCall(text, "strip", args);
  }
  if (name == "length" || name == "count") return Length(self);
  if (name == "string") {
    DSLA_ASSIGN_OR_RETURN(std::string text, ToText(self));
    return Value(std::move(text));
  }
  if (name == "list") {
    DSLA_ASSIGN_OR_RETURN(List items, ToList(self));
    return Value(std::move(items));
  }
  if (name == "default" || name == "d") {
    if (!self.Is<Undefined>()) return self;
    return args.empty() ? Value(std::string()) : args[0];
  }
  if (name == "first" || name == "last") {
    return Item(self, Value(name == "first" ? int64_t{0} : int64_t{-1}));
  }
  if (name == "selectattr" || name == "rejectattr") {
    return SelectAttribute(self, args, name == "selectattr");
  }
  if ((name == "upper" || name == "lower") && self.String()) {
    return MapAscii(*self.String(), name == "upper");
  }
  if (name == "replace" && self.String()) return Replace(*self.String(), args);
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
  if (name == "number" || name == "integer") return Value(value.Int() != nullptr);
  if (name == "iterable" || name == "sequence") {
    return Value(value.String() || value.AsList() || value.AsDict() || value.Is<Undefined>());
  }
  return Unsupported("the test '{}'", name.substr(0, 32));
}

}  // namespace dsla::jinja
