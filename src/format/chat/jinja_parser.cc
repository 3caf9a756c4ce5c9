#include <algorithm>
#include <cstdlib>
#include <initializer_list>

#include "format/chat/jinja.h"

namespace dsla::jinja {
namespace {

constexpr int kMaxDepth =
    100;  // of blocks and expressions in each other, and of an expression's tree

using ExprPtr = std::unique_ptr<Expr>;
using Kind = Expr::Kind;

ExprPtr Make(Kind kind, std::string text = {}) {
  auto e = std::make_unique<Expr>();
  e->kind = kind;
  e->text = std::move(text);
  return e;
}

void Deepen(Expr& parent, const ExprPtr& child) {
  if (child) parent.depth = std::max(parent.depth, child->depth + 1);
}

void Adopt(Expr& parent, ExprPtr child) {
  Deepen(parent, child);
  parent.args.push_back(std::move(child));
}

ExprPtr Make(Kind kind, std::string text, ExprPtr a, ExprPtr b = nullptr) {
  auto e = Make(kind, std::move(text));
  Adopt(*e, std::move(a));
  if (b) Adopt(*e, std::move(b));
  return e;
}

Status CheckDepth(const Expr& e) {
  if (e.depth > kMaxDepth) return Unsupported("an expression over {} deep", kMaxDepth);
  return Status::Ok();
}

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  Expected<Body> Run() {
    DSLA_ASSIGN_OR_RETURN(Body body, ParseBody());
    if (Peek().type != Token::Type::kEnd) return Unexpected();
    return body;
  }

 private:
  // Counts a level of recursion while it lives.
  struct Nested {
    explicit Nested(int& depth) : depth(depth) { ++depth; }
    ~Nested() { --depth; }
    int& depth;
  };

  const Token& Peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  Token Next() { return at_ + 1 < tokens_.size() ? tokens_[at_++] : tokens_.back(); }
  bool IsOp(std::string_view op) const {
    return Peek().type == Token::Type::kOperator && Peek().text == op;
  }
  bool IsName(std::string_view name, size_t ahead = 0) const {
    return Peek(ahead).type == Token::Type::kName && Peek(ahead).text == name;
  }
  bool TakeOp(std::string_view op) {
    if (!IsOp(op)) return false;
    ++at_;
    return true;
  }
  bool TakeName(std::string_view name) {
    if (!IsName(name)) return false;
    ++at_;
    return true;
  }
  Status Unexpected() const {
    const std::string text = Peek().text.substr(0, 32);
    const bool shown = Peek().type == Token::Type::kName || Peek().type == Token::Type::kOperator;
    return Unsupported("unexpected {}", shown ? "'" + text + "'" : "end or text of a tag");
  }
  Status WantOp(std::string_view op) { return TakeOp(op) ? Status::Ok() : Unexpected(); }
  Status WantType(Token::Type type) {
    if (Peek().type != type) return Unexpected();
    if (type != Token::Type::kEnd) ++at_;
    return Status::Ok();
  }
  Expected<std::string> WantName() {
    if (Peek().type != Token::Type::kName) return Unexpected();
    return Next().text;
  }

  // Statements up to the end or a block that the caller must see: elif, else, end....
  Expected<Body> ParseBody() {
    const Nested nested(depth_);
    if (depth_ > kMaxDepth) return Unsupported("blocks nested over {} deep", kMaxDepth);
    Body body;
    for (;;) {
      if (Peek().type == Token::Type::kText) {
        body.emplace_back().kind = Node::Kind::kText;
        body.back().text = Next().text;
      } else if (Peek().type == Token::Type::kOutputBegin) {
        ++at_;
        Node node;
        node.kind = Node::Kind::kOutput;
        DSLA_ASSIGN_OR_RETURN(node.expr, Expression());
        DSLA_RETURN_IF_ERROR(WantType(Token::Type::kOutputEnd));
        body.push_back(std::move(node));
      } else if (Peek().type == Token::Type::kBlockBegin) {
        if (IsName("elif", 1) || IsName("else", 1) || Peek(1).text.starts_with("end")) return body;
        ++at_;
        DSLA_RETURN_IF_ERROR(Statement(body));
      } else {
        return body;
      }
    }
  }

  Status End(std::string_view name) {
    DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockBegin));
    if (!TakeName(name)) return Unexpected();
    return WantType(Token::Type::kBlockEnd);
  }

  Status Statement(Body& body) {
    DSLA_ASSIGN_OR_RETURN(const std::string name, WantName());
    Node node;
    if (name == "if") {
      DSLA_RETURN_IF_ERROR(If(node));
    } else if (name == "for") {
      DSLA_RETURN_IF_ERROR(For(node));
    } else if (name == "set") {
      DSLA_RETURN_IF_ERROR(Set(node));
    } else if (name == "macro") {
      DSLA_RETURN_IF_ERROR(Macro(node));
    } else if (name == "break" || name == "continue") {
      node.kind = name == "break" ? Node::Kind::kBreak : Node::Kind::kContinue;
      DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
    } else if (name ==
               "generation") {  // transformers' mark around answers, without effect on the text
      DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
      DSLA_ASSIGN_OR_RETURN(Body inner, ParseBody());
      for (Node& n : inner) body.push_back(std::move(n));
      return End("endgeneration");
    } else {
      return Unsupported("the statement '{}'", name.substr(0, 32));
    }
    body.push_back(std::move(node));
    return Status::Ok();
  }

  // From the condition of `if` or `elif` to endif.
  Status If(Node& node) {
    const Nested nested(depth_);
    if (depth_ > kMaxDepth) return Unsupported("over {} elif in a row", kMaxDepth);
    node.kind = Node::Kind::kIf;
    DSLA_ASSIGN_OR_RETURN(node.expr, Expression());
    DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
    DSLA_ASSIGN_OR_RETURN(node.body, ParseBody());
    if (IsName("elif", 1)) {
      at_ += 2;
      Node next;
      DSLA_RETURN_IF_ERROR(If(next));
      node.otherwise.push_back(std::move(next));
      return Status::Ok();
    }
    DSLA_RETURN_IF_ERROR(Else(node));
    return End("endif");
  }

  Status Else(Node& node) {
    if (!IsName("else", 1)) return Status::Ok();
    ++at_;
    ++at_;
    DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
    DSLA_ASSIGN_OR_RETURN(node.otherwise, ParseBody());
    return Status::Ok();
  }

  Status For(Node& node) {
    node.kind = Node::Kind::kFor;
    do {
      DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
      node.names.push_back(std::move(name));
    } while (TakeOp(","));
    if (!TakeName("in")) return Unexpected();
    DSLA_ASSIGN_OR_RETURN(node.expr, Or());  // not a conditional: `if` here is the loop's filter
    if (TakeName("if")) {
      DSLA_ASSIGN_OR_RETURN(node.filter, Expression());
    }
    DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
    DSLA_ASSIGN_OR_RETURN(node.body, ParseBody());
    DSLA_RETURN_IF_ERROR(Else(node));
    return End("endfor");
  }

  Status Set(Node& node) {
    node.kind = Node::Kind::kSet;
    do {
      DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
      node.names.push_back(std::move(name));
    } while (node.names.size() < 2 && TakeOp("."));
    if (Peek().type == Token::Type::kBlockEnd) {
      ++at_;
      DSLA_ASSIGN_OR_RETURN(node.body, ParseBody());
      return End("endset");
    }
    DSLA_RETURN_IF_ERROR(WantOp("="));
    DSLA_ASSIGN_OR_RETURN(node.expr, Expression());
    return WantType(Token::Type::kBlockEnd);
  }

  Status Macro(Node& node) {
    node.kind = Node::Kind::kMacro;
    node.expr = Make(Kind::kList);
    DSLA_ASSIGN_OR_RETURN(std::string macro, WantName());
    node.names.push_back(std::move(macro));
    DSLA_RETURN_IF_ERROR(WantOp("("));
    while (!TakeOp(")")) {
      DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
      node.names.push_back(std::move(name));
      ExprPtr value;
      if (TakeOp("=")) {
        DSLA_ASSIGN_OR_RETURN(value, Expression());
      }
      Adopt(*node.expr, std::move(value));
      if (!IsOp(")")) DSLA_RETURN_IF_ERROR(WantOp(","));
    }
    DSLA_RETURN_IF_ERROR(WantType(Token::Type::kBlockEnd));
    DSLA_ASSIGN_OR_RETURN(node.body, ParseBody());
    return End("endmacro");
  }

  Expected<ExprPtr> Expression() {
    const Nested nested(depth_);
    if (depth_ > kMaxDepth) return Unsupported("expressions nested over {} deep", kMaxDepth);
    DSLA_ASSIGN_OR_RETURN(ExprPtr e, Or());
    if (!TakeName("if")) return e;
    DSLA_ASSIGN_OR_RETURN(ExprPtr condition, Or());
    ExprPtr otherwise;
    if (TakeName("else")) {
      DSLA_ASSIGN_OR_RETURN(otherwise, Expression());
    }
    e = Make(Kind::kConditional, {}, std::move(e), std::move(condition));
    Adopt(*e, std::move(otherwise));
    return e;
  }

  // A left-associative chain of the operators that `take` accepts over operands that `operand`
  // reads.
  template <typename Take, typename Operand>
  Expected<ExprPtr> Chain(Take take, Operand operand) {
    DSLA_ASSIGN_OR_RETURN(ExprPtr e, operand());
    for (std::string op; !(op = take()).empty();) {
      DSLA_RETURN_IF_ERROR(CheckDepth(*e));
      DSLA_ASSIGN_OR_RETURN(ExprPtr right, operand());
      e = Make(Kind::kBinary, std::move(op), std::move(e), std::move(right));
    }
    return e;
  }

  std::string TakeAny(std::initializer_list<std::string_view> operators) {
    for (const std::string_view op : operators) {
      if (TakeOp(op) || TakeName(op)) return std::string(op);
    }
    return {};
  }

  Expected<ExprPtr> Or() {
    return Chain([&] { return TakeAny({"or"}); }, [&] { return And(); });
  }
  Expected<ExprPtr> And() {
    return Chain([&] { return TakeAny({"and"}); }, [&] { return Not(); });
  }
  Expected<ExprPtr> Not() {
    const Nested nested(depth_);
    if (depth_ > kMaxDepth) return Unsupported("expressions nested over {} deep", kMaxDepth);
    if (!TakeName("not")) return Comparison();
    DSLA_ASSIGN_OR_RETURN(ExprPtr e, Not());
    return Make(Kind::kNot, {}, std::move(e));
  }
  Expected<ExprPtr> Comparison() {
    DSLA_ASSIGN_OR_RETURN(ExprPtr e, Sum());
    std::string op = TakeAny({"==", "!=", "<=", ">=", "<", ">", "in"});
    if (op.empty() && IsName("not") && IsName("in", 1)) {
      at_ += 2;
      op = "not in";
    }
    if (op.empty()) return e;
    DSLA_ASSIGN_OR_RETURN(ExprPtr right, Sum());
    return Make(Kind::kBinary, std::move(op), std::move(e), std::move(right));
  }
  Expected<ExprPtr> Sum() {
    return Chain([&] { return TakeAny({"+", "-"}); }, [&] { return Concatenation(); });
  }
  Expected<ExprPtr> Concatenation() {
    return Chain([&] { return TakeAny({"~"}); }, [&] { return Product(); });
  }
  Expected<ExprPtr> Product() {
    return Chain([&] { return TakeAny({"*", "//", "%"}); }, [&] { return Unary(true); });
  }

  Expected<ExprPtr> Unary(bool with_filters) {
    const Nested nested(depth_);
    if (depth_ > kMaxDepth) return Unsupported("expressions nested over {} deep", kMaxDepth);
    ExprPtr e;
    if (TakeOp("-")) {
      DSLA_ASSIGN_OR_RETURN(e, Unary(false));
      e = Make(Kind::kNegate, {}, std::move(e));
    } else {
      DSLA_ASSIGN_OR_RETURN(e, Primary());
      DSLA_ASSIGN_OR_RETURN(e, Postfix(std::move(e)));
    }
    if (!with_filters) return e;
    return Filters(std::move(e));
  }

  Expected<ExprPtr> Primary() {
    if (Peek().type == Token::Type::kString) {
      ExprPtr e = Make(Kind::kString, Next().text);
      while (Peek().type == Token::Type::kString) e->text += Next().text;
      return e;
    }
    if (Peek().type == Token::Type::kInt) {
      ExprPtr e = Make(Kind::kInt);
      e->number = std::strtoll(Next().text.c_str(), nullptr, 10);
      return e;
    }
    if (Peek().type == Token::Type::kName) return NameOrConstant(Next().text);
    if (TakeOp("(")) {
      DSLA_ASSIGN_OR_RETURN(ExprPtr e, Expression());
      DSLA_RETURN_IF_ERROR(WantOp(")"));
      return e;
    }
    if (TakeOp("[")) {
      ExprPtr e = Make(Kind::kList);
      while (!TakeOp("]")) {
        DSLA_ASSIGN_OR_RETURN(ExprPtr item, Expression());
        Adopt(*e, std::move(item));
        if (!IsOp("]")) DSLA_RETURN_IF_ERROR(WantOp(","));
      }
      return e;
    }
    if (TakeOp("{")) return Dictionary();
    return Unexpected();
  }

  static ExprPtr NameOrConstant(std::string name) {
    for (const std::string_view constant : {"true", "false", "none"}) {
      std::string capital(constant);
      capital[0] = static_cast<char>(capital[0] - 'a' + 'A');
      if (name == constant || name == capital) return Make(Kind::kConstant, std::string(constant));
    }
    return Make(Kind::kName, std::move(name));
  }

  Expected<ExprPtr> Dictionary() {
    ExprPtr e = Make(Kind::kDict);
    while (!TakeOp("}")) {
      DSLA_ASSIGN_OR_RETURN(ExprPtr key, Expression());
      DSLA_RETURN_IF_ERROR(WantOp(":"));
      DSLA_ASSIGN_OR_RETURN(ExprPtr value, Expression());
      Adopt(*e, std::move(key));
      Adopt(*e, std::move(value));
      if (!IsOp("}")) DSLA_RETURN_IF_ERROR(WantOp(","));
    }
    return e;
  }

  Expected<ExprPtr> Postfix(ExprPtr e) {
    for (;;) {
      DSLA_RETURN_IF_ERROR(CheckDepth(*e));
      if (TakeOp(".")) {
        DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
        const bool call = IsOp("(");
        e = Make(call ? Kind::kMethod : Kind::kAttribute, std::move(name), std::move(e));
        if (call) DSLA_RETURN_IF_ERROR(Arguments(*e));
      } else if (TakeOp("[")) {
        DSLA_ASSIGN_OR_RETURN(e, Subscript(std::move(e)));
      } else if (IsOp("(")) {
        if (e->kind != Kind::kName) return Unsupported("a call of an expression");
        e->kind = Kind::kCall;
        DSLA_RETURN_IF_ERROR(Arguments(*e));
      } else {
        return e;
      }
    }
  }

  Expected<ExprPtr> Subscript(ExprPtr base) {
    ExprPtr e = Make(Kind::kSlice, {}, std::move(base));
    for (;;) {
      ExprPtr part;
      if (!IsOp(":") && !IsOp("]")) {
        DSLA_ASSIGN_OR_RETURN(part, Expression());
      }
      Adopt(*e, std::move(part));
      if (TakeOp("]")) break;
      DSLA_RETURN_IF_ERROR(WantOp(":"));
    }
    if (e->args.size() > 4) return Unsupported("a slice of over three parts");
    if (e->args.size() == 2) {
      if (!e->args[1]) return Unsupported("an empty subscript");
      e->kind = Kind::kItem;
    }
    if (e->kind == Kind::kSlice) e->args.resize(4);
    return e;
  }

  Status Arguments(Expr& call) {
    DSLA_RETURN_IF_ERROR(WantOp("("));
    while (!TakeOp(")")) {
      std::string name;
      if (Peek().type == Token::Type::kName && Peek(1).type == Token::Type::kOperator &&
          Peek(1).text == "=") {
        name = Next().text;
        ++at_;
      }
      DSLA_ASSIGN_OR_RETURN(ExprPtr value, Expression());
      if (name.empty()) {
        Adopt(call, std::move(value));
      } else {
        Deepen(call, value);
        call.named.emplace_back(std::move(name), std::move(value));
      }
      if (!IsOp(")")) DSLA_RETURN_IF_ERROR(WantOp(","));
    }
    return Status::Ok();
  }

  Expected<ExprPtr> Filters(ExprPtr e) {
    for (;;) {
      DSLA_RETURN_IF_ERROR(CheckDepth(*e));
      if (TakeOp("|")) {
        DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
        e = Make(Kind::kFilter, std::move(name), std::move(e));
        if (IsOp("(")) DSLA_RETURN_IF_ERROR(Arguments(*e));
      } else if (TakeName("is")) {
        const bool negated = TakeName("not");
        DSLA_ASSIGN_OR_RETURN(std::string name, WantName());
        e = Make(Kind::kTest, std::move(name), std::move(e));
        if (negated) e = Make(Kind::kNot, {}, std::move(e));
      } else {
        return e;
      }
    }
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

Expected<Body> Parse(std::string_view source) {
  DSLA_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace dsla::jinja
