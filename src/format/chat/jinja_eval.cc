#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "format/chat/jinja.h"
#include "format/chat/jinja_library.h"

namespace dsla::jinja {
namespace {

// A variable's nesting, so that destroying a value recurses no deeper than this and the parser's
// limit together.
constexpr int kMaxValueDepth = 32;
// Calls of macros in each other: each takes as much of the stack as the parser's limit allows.
constexpr int kMaxMacroDepth = 8;

// Bytes to copy a value, more or less; what lists within lists hold is shared.
size_t Size(const Value& value) {
  if (value.String()) return value.String()->size();
  size_t size = 0;
  if (const List* list = value.AsList()) {
    for (const Value& item : *list)
      size += sizeof(Value) + (item.String() ? item.String()->size() : 0);
  }
  return size;
}

class Evaluator {
 public:
  Evaluator(std::map<std::string, Value> globals, const Bounds& bounds) : bounds_(bounds) {
    scopes_.push_back(std::move(globals));
  }

  Expected<Rendered> Run(const Body& program) {
    Flow flow = Flow::kNext;
    const Status status = Execute(program, flow);
    if (raised_) return Rendered{true, raised_message_};
    DSLA_RETURN_IF_ERROR(status);
    if (flow != Flow::kNext) return Unsupported("break or continue outside a loop");
    return Rendered{false, std::move(out_)};
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  using Kind = Expr::Kind;

  Status Step() {
    if (++steps_ > bounds_.steps) return Unsupported("over {} steps", bounds_.steps);
    return Status::Ok();
  }

  Status Execute(const Body& body, Flow& flow) {
    for (const Node& node : body) {
      DSLA_RETURN_IF_ERROR(Step());
      DSLA_RETURN_IF_ERROR(Execute(node, flow));
      if (flow != Flow::kNext) break;
    }
    return Status::Ok();
  }

  Status Execute(const Node& node, Flow& flow) {
    switch (node.kind) {
      case Node::Kind::kText:
        return Emit(Text(node.text));
      case Node::Kind::kOutput: {
        DSLA_ASSIGN_OR_RETURN(const Value value, Eval(*node.expr));
        DSLA_ASSIGN_OR_RETURN(const Text text, ToText(value, bounds_));
        return Emit(text);
      }
      case Node::Kind::kIf: {
        DSLA_ASSIGN_OR_RETURN(const Value condition, Eval(*node.expr));
        return Execute(Truth(condition) ? node.body : node.otherwise, flow);
      }
      case Node::Kind::kFor:
        return Loop(node, flow);
      case Node::Kind::kSet:
        return Assign(node);
      case Node::Kind::kMacro:
        macros_[node.names[0]] = &node;
        return Status::Ok();
      case Node::Kind::kBreak:
        flow = Flow::kBreak;
        return Status::Ok();
      case Node::Kind::kContinue:
        flow = Flow::kContinue;
        return Status::Ok();
    }
    return Unsupported("an unknown statement");
  }

  Status Charge(const Value& value) {
    bytes_ += Size(value);
    if (bytes_ > bounds_.bytes) return Unsupported("over {} bytes of values", bounds_.bytes);
    return Status::Ok();
  }

  Status SetVariable(const std::string& name, Value value) {
    if (value.depth > kMaxValueDepth)
      return Unsupported("values nested over {} deep", kMaxValueDepth);
    scopes_.back()[name] = std::move(value);
    return Status::Ok();
  }

  Status Emit(const Text& text) {
    if (out_.bytes().size() + text.bytes().size() > bounds_.text)
      return Unsupported("over {} bytes of text", bounds_.text);
    out_.Append(text);
    return Status::Ok();
  }

  Status Bind(const std::vector<std::string>& names, const Value& item) {
    if (names.size() == 1) return SetVariable(names[0], item);
    const List* parts = item.AsList();
    if (!parts || parts->size() != names.size()) return Unsupported("unpacking of a loop's item");
    for (size_t i = 0; i < names.size(); ++i) {
      DSLA_RETURN_IF_ERROR(SetVariable(names[i], (*parts)[i]));
    }
    return Status::Ok();
  }

  Expected<List> Items(const Node& node) {
    DSLA_ASSIGN_OR_RETURN(const Value source, Eval(*node.expr));
    DSLA_ASSIGN_OR_RETURN(List items, ToList(source));
    if (!node.filter) return items;
    List kept;
    for (Value& item : items) {
      DSLA_RETURN_IF_ERROR(Step());
      scopes_.emplace_back();
      Status status = Bind(node.names, item);
      Expected<Value> keep = status.ok() ? Eval(*node.filter) : Expected<Value>(status);
      scopes_.pop_back();
      DSLA_RETURN_IF_ERROR(keep.status());
      if (Truth(*keep)) kept.push_back(std::move(item));
    }
    return kept;
  }

  Status Loop(const Node& node, Flow& flow) {
    DSLA_ASSIGN_OR_RETURN(const List items, Items(node));
    if (items.empty()) return Execute(node.otherwise, flow);
    const auto n = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < n; ++i) {
      DSLA_RETURN_IF_ERROR(Step());
      Dict loop = {
          {"index", i + 1},  {"index0", i},        {"revindex", n - i}, {"revindex0", n - i - 1},
          {"first", i == 0}, {"last", i + 1 == n}, {"length", n}};
      if (i > 0) loop.emplace_back("previtem", items[i - 1]);
      if (i + 1 < n) loop.emplace_back("nextitem", items[i + 1]);
      scopes_.emplace_back();
      scopes_.back()["loop"] = std::move(loop);
      Status status = Bind(node.names, items[i]);
      Flow inner = Flow::kNext;
      if (status.ok()) status = Execute(node.body, inner);
      scopes_.pop_back();
      DSLA_RETURN_IF_ERROR(status);
      if (inner == Flow::kBreak) break;
    }
    return Status::Ok();
  }

  Status Assign(const Node& node) {
    DSLA_ASSIGN_OR_RETURN(Value value, node.expr ? Eval(*node.expr) : Capture(node.body));
    if (node.names.size() == 1) return SetVariable(node.names[0], std::move(value));
    Value target = Lookup(node.names[0]);
    // A namespace inside a namespace could hold itself.
    if (!target.is_namespace || value.is_namespace || value.depth > kMaxValueDepth) {
      return Unsupported("assignment to an attribute");
    }
    Dict& dict = *target.AsDict();
    const auto entry = std::ranges::find(dict, node.names[1], &Dict::value_type::first);
    if (entry != dict.end()) {
      entry->second = std::move(value);
    } else {
      dict.emplace_back(node.names[1], std::move(value));
    }
    return Status::Ok();
  }

  // What a body renders, as a value.
  Expected<Value> Capture(const Body& body) {
    Text outer = std::exchange(out_, {});
    Flow flow = Flow::kNext;
    const Status status = Execute(body, flow);
    Text text = std::exchange(out_, std::move(outer));
    DSLA_RETURN_IF_ERROR(status);
    if (flow != Flow::kNext) return Unsupported("break or continue outside a loop");
    return Value(std::move(text));
  }

  // A macro sees its arguments and the globals.
  Expected<Value> CallMacro(const Node& macro, const Expr& call) {
    if (macro_depth_ == kMaxMacroDepth)
      return Unsupported("macros nested over {} deep", kMaxMacroDepth);
    std::map<std::string, Value> arguments;
    DSLA_ASSIGN_OR_RETURN(List values, EvalAll(call));
    DSLA_ASSIGN_OR_RETURN(Named named, EvalNamed(call));
    if (values.size() >= macro.names.size()) return Unsupported("too many arguments of a macro");
    for (size_t i = 1; i < macro.names.size(); ++i) {
      const std::string& name = macro.names[i];
      if (i <= values.size()) {
        arguments[name] = std::move(values[i - 1]);
      } else if (const auto entry = named.find(name); entry != named.end()) {
        arguments[name] = std::move(entry->second);
      } else if (macro.expr->args[i - 1]) {
        DSLA_ASSIGN_OR_RETURN(arguments[name], Eval(*macro.expr->args[i - 1]));
      }
    }
    const size_t outer = std::exchange(first_scope_, scopes_.size());
    ++macro_depth_;
    scopes_.push_back(std::move(arguments));
    Expected<Value> result = Capture(macro.body);
    scopes_.resize(first_scope_);
    --macro_depth_;
    first_scope_ = outer;
    return result;
  }

  Value Lookup(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > first_scope_;) {
      if (const auto entry = scopes_[i].find(name); entry != scopes_[i].end()) return entry->second;
    }
    const auto entry = scopes_[0].find(name);
    return entry == scopes_[0].end() ? Value() : entry->second;
  }

  Expected<Value> Eval(const Expr& e) {
    DSLA_RETURN_IF_ERROR(Step());
    DSLA_ASSIGN_OR_RETURN(Value value, EvalUncharged(e));
    // A list that was there already is shared, not copied.
    const bool found = e.kind == Kind::kName || e.kind == Kind::kAttribute || e.kind == Kind::kItem;
    if (!found || !value.AsList()) DSLA_RETURN_IF_ERROR(Charge(value));
    return value;
  }

  Expected<Value> EvalUncharged(const Expr& e) {
    switch (e.kind) {
      case Kind::kString:
        return Value(e.text);
      case Kind::kInt:
        return Value(e.number);
      case Kind::kName:
        return Lookup(e.text);
      case Kind::kConstant:
        return e.text == "none" ? Value(None{}) : Value(e.text == "true");
      case Kind::kList: {
        DSLA_ASSIGN_OR_RETURN(List items, EvalAll(e));
        if (std::ranges::any_of(items, &Value::is_namespace))
          return Unsupported("a namespace in a list");
        return Value(std::move(items));
      }
      case Kind::kDict:
        return EvalDict(e);
      case Kind::kAttribute: {
        DSLA_ASSIGN_OR_RETURN(const Value base, Eval(*e.args[0]));
        return Item(base, Value(e.text));
      }
      case Kind::kItem: {
        DSLA_ASSIGN_OR_RETURN(const Value base, Eval(*e.args[0]));
        DSLA_ASSIGN_OR_RETURN(const Value key, Eval(*e.args[1]));
        return Item(base, key);
      }
      case Kind::kSlice:
        return EvalSlice(e);
      case Kind::kCall:
        return EvalCall(e);
      case Kind::kMethod:
      case Kind::kFilter: {
        DSLA_ASSIGN_OR_RETURN(List args, EvalAll(e));
        DSLA_ASSIGN_OR_RETURN(const Named named, EvalNamed(e));
        const Value self = std::move(args[0]);
        args.erase(args.begin());
        if (e.kind == Kind::kFilter) return CallFilter(self, e.text, args, named, bounds_);
        if (!named.empty()) return Unsupported("named arguments of '{}'", e.text.substr(0, 32));
        return CallMethod(self, e.text, args, bounds_);
      }
      case Kind::kTest: {
        DSLA_ASSIGN_OR_RETURN(const Value value, Eval(*e.args[0]));
        return CallTest(value, e.text);
      }
      case Kind::kNot: {
        DSLA_ASSIGN_OR_RETURN(const Value value, Eval(*e.args[0]));
        return Value(!Truth(value));
      }
      case Kind::kNegate: {
        DSLA_ASSIGN_OR_RETURN(const Value value, Eval(*e.args[0]));
        if (!value.Int()) return Unsupported("'-' on something that is no number");
        return Value(-*value.Int());
      }
      case Kind::kBinary:
        return EvalBinary(e);
      case Kind::kConditional: {
        DSLA_ASSIGN_OR_RETURN(const Value condition, Eval(*e.args[1]));
        if (Truth(condition)) return Eval(*e.args[0]);
        return e.args[2] ? Eval(*e.args[2]) : Expected<Value>(Value());
      }
    }
    return Unsupported("an unknown expression");
  }

  Expected<List> EvalAll(const Expr& e) {
    List values;
    for (const auto& arg : e.args) {
      DSLA_ASSIGN_OR_RETURN(Value value, Eval(*arg));
      values.push_back(std::move(value));
    }
    return values;
  }

  Expected<Named> EvalNamed(const Expr& e) {
    Named named;
    for (const auto& [name, expr] : e.named) {
      DSLA_ASSIGN_OR_RETURN(named[name], Eval(*expr));
    }
    return named;
  }

  Expected<Value> EvalDict(const Expr& e) {
    Dict dict;
    for (size_t i = 0; i + 1 < e.args.size(); i += 2) {
      DSLA_ASSIGN_OR_RETURN(const Value key, Eval(*e.args[i]));
      DSLA_ASSIGN_OR_RETURN(Value value, Eval(*e.args[i + 1]));
      if (!key.String()) return Unsupported("a dictionary's key that is no string");
      if (value.is_namespace) return Unsupported("a namespace in a dictionary");
      dict.emplace_back(*key.String(), std::move(value));
    }
    return Value(std::move(dict));
  }

  Expected<Value> EvalSlice(const Expr& e) {
    DSLA_ASSIGN_OR_RETURN(const Value base, Eval(*e.args[0]));
    std::optional<int64_t> bounds[3];
    for (int i = 0; i < 3; ++i) {
      if (!e.args[i + 1]) continue;
      DSLA_ASSIGN_OR_RETURN(const Value bound, Eval(*e.args[i + 1]));
      if (bound.Is<None>()) continue;
      if (!bound.Int()) return Unsupported("a slice's bound that is no number");
      bounds[i] = *bound.Int();
    }
    return Slice(base, bounds[0], bounds[1], bounds[2]);
  }

  Expected<Value> EvalCall(const Expr& e) {
    if (e.text == "namespace" && e.args.empty()) {
      Dict dict;
      for (const auto& [name, expr] : e.named) {
        DSLA_ASSIGN_OR_RETURN(Value value, Eval(*expr));
        if (value.is_namespace) return Unsupported("a namespace in a namespace");
        dict.emplace_back(name, std::move(value));
      }
      Value made(std::move(dict));
      made.is_namespace = true;
      return made;
    }
    if (const auto macro = macros_.find(e.text); macro != macros_.end())
      return CallMacro(*macro->second, e);
    DSLA_ASSIGN_OR_RETURN(const List args, EvalAll(e));
    if (e.text == "raise_exception" && args.size() == 1) {
      raised_ = true;
      if (args[0].AsText()) raised_message_ = *args[0].AsText();
      return Unsupported("raise_exception");  // unwinds; Run sees raised_
    }
    if (e.text == "range" && e.named.empty()) return Range(args, bounds_);
    return Unsupported("the function '{}'", e.text.substr(0, 32));
  }

  Expected<Value> EvalBinary(const Expr& e) {
    DSLA_ASSIGN_OR_RETURN(const Value a, Eval(*e.args[0]));
    if (e.text == "and" && !Truth(a)) return a;
    if (e.text == "or" && Truth(a)) return a;
    DSLA_ASSIGN_OR_RETURN(const Value b, Eval(*e.args[1]));
    if (e.text == "and" || e.text == "or") return b;
    return Binary(e.text, a, b, bounds_);
  }

  std::vector<std::map<std::string, Value>> scopes_;
  size_t first_scope_ = 0;  // of those that are seen; the globals always are
  std::map<std::string, const Node*> macros_;
  int macro_depth_ = 0;
  const Bounds bounds_;
  Text out_;
  int steps_ = 0;
  size_t bytes_ = 0;
  bool raised_ = false;
  Text raised_message_;
};

}  // namespace

Expected<Rendered> Render(const Body& program, std::map<std::string, Value> globals,
                          const Bounds& bounds) {
  return Evaluator(std::move(globals), bounds).Run(program);
}

}  // namespace dsla::jinja
