// Documents to measure on: token sequences from a JSONL file (one object a line with a string field
// "text") or from a plain text file, which is one document.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {

struct DocumentOptions {
  int min_tokens = 2;  // shorter documents are left out
  int max_tokens = 0;  // longer ones are cut to this; 0 = the caller's context
  int max_docs = 0;    // 0 = all
};

// In the file's order, no BOS added. A file is read as JSONL if its name ends in .jsonl. Errors:
// kDataLoss naming the line that is no such object; kInvalidArgument when no document is long
// enough.
Expected<std::vector<std::vector<int32_t>>> ReadDocuments(const std::string& path,
                                                          const Tokenizer& tokenizer,
                                                          const DocumentOptions& options);

}  // namespace dsla
