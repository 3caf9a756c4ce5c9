// For tests: how many times memory was asked for, by any thread, through operator new or the C
// library's allocator. The program must be linked as step_allocation_test is.
#pragma once

#include <cstdint>

namespace dsla {

int64_t Allocations();  // since the start of the program

}  // namespace dsla
