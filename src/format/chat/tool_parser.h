// ToolParser: from a reply's text, piece by piece, to its content and its calls of tools.
//
// Bytes are held back while they may begin a call. A call's arguments come as the model writes
// them, from the moment its name is known. What turns out to be no call is content, byte for byte;
// where a part of it has already gone out as a call's arguments, the rest of its text is content.
// Text before a call stands as it is; white space alone before or between calls is left out. The
// result does not depend on how the text is cut into pieces, and a piece of whole code points gives
// whole code points. One per reply, one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "format/chat/tool_dialect.h"
#include "format/chat/tools.h"

namespace dsla {

struct ToolReplyDelta {
  struct Call {
    int index = 0;          // of calls, from 0
    std::string name;       // in the first delta of a call alone
    std::string arguments;  // to append
  };
  std::string content;
  std::vector<Call> calls;
};

struct ToolReply {
  std::string content;
  std::vector<ToolCall> calls;  // complete ones; ids empty
};

class ToolParser {
 public:
  struct Options {
    ToolDialect dialect = ToolDialect::kHermes;
    std::shared_ptr<const std::vector<Tool>> tools;  // not null
    bool parallel = true;                            // false: the calls after the first are dropped
  };
  explicit ToolParser(Options options);
  ~ToolParser();
  ToolParser(ToolParser&&) noexcept;

  ToolReplyDelta Push(std::string_view text);
  ToolReplyDelta Finish();  // the reply has ended

  // All of it so far, without the calls that are not complete: after Finish these are content.
  const ToolReply& reply() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
