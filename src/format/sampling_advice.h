// Reading a model's advice on sampling from whichever file has it. Internal to this folder.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "format/config.h"

namespace dsla {

// The keys of a kind of file.
struct SamplingKeys {
  const char *temperature, *top_k, *top_p, *min_p, *repetition_penalty;
};

// A number by its key, if there is one.
using NumberReader = std::function<Expected<std::optional<double>>(const char* key)>;

// kDataLoss names `path`, the key and the range.
Expected<SamplingAdvice> ReadSamplingAdvice(const SamplingKeys& keys, const std::string& path,
                                            const NumberReader& read);

}  // namespace dsla
