// What a JSON schema asks for that XGrammar would leave out without a word.
#pragma once

#include <string_view>

#include "base/status.h"

namespace dsla {

// kInvalidArgument, naming the keyword, or why it is no schema.
Status CheckSchema(std::string_view text);
// The same of every schema within a structural tag.
Status CheckStructuralTag(std::string_view text);

}  // namespace dsla
