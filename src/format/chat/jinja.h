// The part of Jinja that chat templates are written in: to find out what a model file's template
// renders (detect.cc), and to render prompts with tools and those of templates
// that are not rendered natively (model_template.h). White space follows transformers' environment:
// trim_blocks and lstrip_blocks on, the source's last newline dropped.
//
// Not in it, and refused with kUnsupported: imports, call blocks, tuples as targets of set,
// arithmetic on floats, filters and methods that conversations do not reach. Names that are not
// defined behave as Jinja's Undefined.
//
// Sources are untrusted: nesting, steps, bytes made, and the sizes of strings and lists are bounded
// (Bounds, and the k... constants in jinja_parser.cc and jinja_library.h), so that time and memory
// are.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/status.h"
#include "format/chat/jinja_text.h"

namespace dsla::jinja {

struct Undefined {
  bool operator==(const Undefined&) const = default;
};
struct None {
  bool operator==(const None&) const = default;
};

// A number that is no int64, as its source writes it.
struct Real {
  std::string text;
  bool operator==(const Real&) const = default;
};

struct Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // insertion order, as in Python

// Lists and dictionaries are shared and, but for a namespace, never changed after they are made. A
// namespace is held by variables alone, never by another value, so there are no cycles.
struct Value {
  std::variant<Undefined, None, bool, int64_t, Real, Text, std::shared_ptr<List>,
               std::shared_ptr<Dict>>
      v;
  bool is_namespace = false;
  bool foreign_keys = false;  // of a dictionary: they come from outside, as a Text's bytes may
  int depth = 0;              // of the lists and dictionaries in it, when it was made

  Value() = default;
  Value(None n) : v(n) {}                               // NOLINT: implicit
  Value(bool b) : v(b) {}                               // NOLINT
  Value(int64_t i) : v(i) {}                            // NOLINT
  Value(Real r) : v(std::move(r)) {}                    // NOLINT
  Value(Text t) : v(std::move(t)) {}                    // NOLINT
  Value(std::string s) : v(Text(std::move(s))) {}       // NOLINT
  Value(std::string_view s) : Value(std::string(s)) {}  // NOLINT
  Value(const char*) = delete;                          // would become a bool
  Value(List l);                                        // NOLINT
  Value(Dict d);                                        // NOLINT

  template <typename T>
  bool Is() const {
    return std::holds_alternative<T>(v);
  }
  const Text* AsText() const { return std::get_if<Text>(&v); }
  const std::string* String() const { return AsText() ? &AsText()->bytes() : nullptr; }
  const int64_t* Int() const { return std::get_if<int64_t>(&v); }
  const List* AsList() const {
    const auto* p = std::get_if<std::shared_ptr<List>>(&v);
    return p ? p->get() : nullptr;
  }
  Dict* AsDict() const {
    const auto* p = std::get_if<std::shared_ptr<Dict>>(&v);
    return p ? p->get() : nullptr;
  }
};

struct Token {
  enum class Type {
    kText,
    kOutputBegin,
    kOutputEnd,
    kBlockBegin,
    kBlockEnd,
    kName,
    kString,
    kInt,
    kOperator,
    kEnd
  };
  Type type;
  std::string text;
};

// One node type for all expressions: `kind` says what `text`, `number`, `args` and `named` mean.
struct Expr {
  enum class Kind {
    kString,       // text
    kInt,          // number
    kName,         // text
    kConstant,     // text: true, false, none
    kList,         // args
    kDict,         // args: key, value, key, value ...
    kAttribute,    // args[0].text
    kItem,         // args[0][args[1]]
    kSlice,        // args[0][args[1]:args[2]:args[3]], absent ones null
    kCall,         // text(args..., named...): a global function
    kMethod,       // args[0].text(args[1]...)
    kFilter,       // args[0] | text(args[1]...)
    kTest,         // args[0] is text
    kNot,          // args[0]
    kNegate,       // args[0]
    kBinary,       // args[0] text args[1]
    kConditional,  // args[0] if args[1] else args[2]; args[2] may be null
  };
  Kind kind;
  std::string text;
  int64_t number = 0;
  int depth = 1;  // of the tree below, which is how deep evaluation recurses
  std::vector<std::unique_ptr<Expr>> args;
  std::vector<std::pair<std::string, std::unique_ptr<Expr>>> named;
};

struct Node;
using Body = std::vector<Node>;

struct Node {
  enum class Kind {
    kText,    // text
    kOutput,  // expr
    kIf,      // expr, body, otherwise
    kFor,     // names in expr [if filter]: body, else otherwise
    kSet,     // names[0] = expr, or names[0].names[1] = expr on a namespace; without expr: what
              // body renders
    kMacro,   // names[0](the other names): body; expr: a list of their defaults, absent ones null
    kBreak,
    kContinue,
  };
  Kind kind;
  std::string text;
  std::vector<std::string> names;
  std::unique_ptr<Expr> expr, filter;
  Body body, otherwise;
};

Expected<std::vector<Token>> Tokenize(std::string_view source);
Expected<Body> Parse(std::string_view source);

// What one rendering may take.
struct Bounds {
  int steps = 20000;       // a probing conversation takes a few hundred of the largest published
                           // templates
  size_t bytes = 4 << 20;  // of all values made
  size_t text = 16 << 10;  // of one string, and of the result
  size_t items = 1024;     // of one list
  int compared = 1000;     // values that one operator may look at
};

// What a template renders, or that it called raise_exception.
struct Rendered {
  bool raised = false;
  Text text;  // the exception's message if raised
};

Expected<Rendered> Render(const Body& program, std::map<std::string, Value> globals,
                          const Bounds& bounds = {});

}  // namespace dsla::jinja
