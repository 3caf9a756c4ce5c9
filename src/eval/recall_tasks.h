// Texts in which something said earlier must be said again. Between what is recalled lies running
// text; what is recalled is random tokens, so that nothing but the context can tell it. The
// definitions are the trainer's, with tokens of its own.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace dsla {

enum class RecallKind {
  kCopy,      // 96 random tokens come again `gap` tokens after their end; from the ninth on each
              // is to be told by those before it
  kKeyValue,  // a table of up to 32 pairs of two tokens each, asked at the end in another order;
              // the two tokens of each value are to be told
  kNeedle,    // 24 random tokens at each depth, each asked by itself at the end by its first 8
};
const char* Name(RecallKind kind);

// One continuation of a text. targets[i] is the token that should follow tokens[i], -1 where
// nothing is asked.
struct RecallQuestion {
  double depth = 0;  // needles: where in the text, 0 its beginning, 1 its end
  std::vector<int32_t> tokens, targets;
};

struct RecallText {
  std::vector<int32_t> context;
  std::vector<RecallQuestion> questions;
};

struct RecallTask {
  RecallKind kind = RecallKind::kCopy;
  int gap = 0;                 // copies
  int length = 0;              // tokens of the context and one question
  std::vector<double> depths;  // needles

  std::string Title() const;  // "copy, gap 512"
};

RecallTask CopyTask(int gap);
RecallTask KeyValueTask(int length);
// Whether needles at these depths, in [0, 1], do not overlap in a text of so many tokens.
bool NeedlesFit(int length, std::span<const double> depths);
RecallTask NeedleTask(int length, std::vector<double> depths);

// Number `index` of a task: a function of the arguments alone. `filler`: running text, at least one
// token, repeated where it is short. Random tokens come from the middle of the vocabulary [0, V),
// where neither control tokens nor the rarest stand.
RecallText MakeRecallText(const RecallTask& task, std::span<const int32_t> filler, int64_t V,
                          uint64_t seed, int index);

}  // namespace dsla
