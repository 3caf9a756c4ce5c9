// JSON that comes from clients, as values for a template.
#pragma once

#include <string_view>

#include "base/status.h"
#include "format/chat/jinja.h"

namespace dsla {

// Lists and objects in each other. A variable of a template may be somewhat deeper.
inline constexpr int kMaxToolJsonDepth = 24;

// Keys and texts are marked as foreign; keys stay in their order. kInvalidArgument for what is no
// JSON or nested deeper than kMaxToolJsonDepth.
Expected<jinja::Value> ParseForeignJson(std::string_view text);

}  // namespace dsla
