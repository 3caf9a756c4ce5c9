// The memory that the system lets this process have.
#pragma once

#include <cstdint>
#include <string>

namespace dsla {

// The least of the limits of the process's control group and of those above it, of version 2 or 1;
// 0: there is none. It may be more than the machine has: that is how version 1 says "none". `root`:
// a folder with the proc and sys to be read.
int64_t CgroupMemoryLimit(const std::string& root = "/");

}  // namespace dsla
