// The grammar of replies that call tools, as one of XGrammar's structural tags.
#pragma once

#include <span>
#include <string>

#include "format/chat/tool_dialect.h"
#include "format/chat/tools.h"

namespace dsla {

struct ToolGrammar {
  enum class Calls { kOne, kSome };
  enum class Text {
    kNone,  // calls alone
    kAny,   // and calls in it
    kJson,  // of `schema`, or calls in place of it
  };
  Calls calls = Calls::kSome;
  Text text = Text::kNone;
  std::string schema = {};  // empty: any object
};

// As JSON. The arguments follow their schemas; a tool without one, and in kAny one that is not
// strict, takes any object. `markers`, the dialect's that are control tokens, are written as these
// and never as text. tools: not empty.
std::string StructuralTagOf(ToolDialect dialect, const ToolGrammar& grammar,
                            std::span<const Tool> tools, std::span<const ToolMarker> markers);

}  // namespace dsla
