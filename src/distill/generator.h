// Text by the teacher itself: many continuations at once, with a KV cache, on one device. Its words
// are what training on the teacher's own distribution needs (completions, chat answers).
//
// Not thread-safe. Running out of memory leaves by exception, as Network's does.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "format/model_file.h"

namespace dsla {

struct GeneratorOptions {
  std::string device = "cpu", dtype = "auto";  // as NetworkOptions
  int threads = 0;
  std::vector<bool> stops;  // [V] tokens that end a text
};

struct Sampling {
  int length = 0;          // tokens of a text at most, its prompt included
  double temperature = 1;  // 0: the most likely token
  double top_p = 1;        // draws from the likeliest tokens that hold so much probability together
                     // (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020)
};

class Generator {
 public:
  // Errors: those of Network::Create.
  static Expected<std::unique_ptr<Generator>> Create(const ModelFile& file,
                                                     const GeneratorOptions& options);
  ~Generator();

  // Texts that begin with `prompts`, all of one length, in their order, each up to the token that
  // ended it, which is left out. uniform(row, position), in [0, 1), decides the token at a
  // position: with the same numbers a text is the same, whatever stands beside it, but for
  // rounding.
  std::vector<std::vector<int32_t>> Generate(
      const std::vector<std::vector<int32_t>>& prompts, const Sampling& sampling,
      const std::function<double(int row, int position)>& uniform);

 private:
  struct Impl;
  explicit Generator(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsla
