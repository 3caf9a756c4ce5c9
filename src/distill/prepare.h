// The first stage: text files to one token file.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {

struct PrepareResult {
  int64_t documents = 0, tokens = 0;
};

// Tokenises `inputs` into the token file `output`, documents in the files' order, each whole, with
// no token added. A name that ends in .jsonl is JSON lines, one object with a string "text" each;
// any other file is one document of plain text. Errors: kNotFound; kDataLoss naming file and line
// for what is no such object, no UTF-8 or holds NUL bytes (binary data); kInvalidArgument if a
// file, or all together, hold no token. `progress` gets bytes done and bytes of all.
Expected<PrepareResult> PrepareTokens(const ExecContext& ctx,
                                      const std::vector<std::string>& inputs,
                                      const Tokenizer& tokenizer, const std::string& output,
                                      const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace dsla
