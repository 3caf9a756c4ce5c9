// The texts of a data file, one after another: a file whose name ends in .jsonl is JSON lines, one
// object with a string "text" each (blank lines are skipped); any other file is one text.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace dsla {

// Gets a text, valid during the call, and where it stands ("'f.jsonl' line 3"), for messages.
// false: no more are wanted.
using TextVisitor = std::function<Expected<bool>(std::string_view text, const std::string& where)>;

// Errors: those of `visit`; kNotFound and the like for the file; kDataLoss naming the line that is
// no such object.
Status ForEachText(const std::string& path, const TextVisitor& visit);

}  // namespace dsla
