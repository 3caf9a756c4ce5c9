// dsla distill write: a file of texts by the teacher itself, as `prepare` reads them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/exec.h"
#include "base/status.h"
#include "format/model_file.h"

namespace dsla {

struct WriteJob {
  std::vector<std::string> prompts;  // text files or one token file: their documents' openings
                                     // begin the texts. Empty: the BOS token does
  std::string out;                   // JSON lines, one object with a string "text" each
  int64_t documents = 1000;
  int prompt_tokens = 32;  // of an opening; documents that are not longer are left out
  int length = 1024;       // tokens of a text at most, its opening included
  int batch = 64;          // texts at a time
  double temperature = 1, top_p = 0.95;
  int64_t seed = 1;
  std::string device = "cpu", dtype = "auto";
  int threads = 0;
  bool quiet = false;
  std::function<bool()> interrupted;  // asked between batches
};

struct WriteOutcome {
  bool finished = false;
  int64_t documents = 0;  // in the file
};

// A text is a function of the model, the settings, the seed and its number, so one call that was
// cut short at any moment and the same again leave the file of one that was not (on a GPU but for
// rounding). `out`.json says what the file was written with. Errors: kInvalidArgument for settings,
// prompts that are too short, a model without BOS and prompts, a file of other settings or origin;
// those of PrepareTokens and Generator; kInternal where the file cannot be written.
Expected<WriteOutcome> WriteTexts(const ExecContext& ctx, const ModelFile& model,
                                  const WriteJob& job);

}  // namespace dsla
