// Files that appear whole or not at all.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace dsla {

// Written beside `path`, synced and renamed over it. Errors: kInternal with the system's reason.
Status WriteFileAtomically(const std::string& path, std::string_view content);

// The directory and those above it, unless they are there. Errors: kInternal.
Status MakeDirectories(const std::string& path);

}  // namespace dsla
