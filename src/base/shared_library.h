// Parts of the build that are shared libraries of their own, because they bring large libraries
// along (CUDA's, libtorch): a program loads one when it first needs it.
#pragma once

#include <string>

#include "base/status.h"

namespace dsla {

// The path of a file of the build, such as a library or a program: beside this program, for one of
// the build folder also at that folder's top; its bare name if it is in neither place.
std::string BesideProgram(const std::string& name);

// The address of `function`, extern "C", in the shared library `library` ("libdsla_x.so"), which
// stays loaded. It is looked for beside the program, then where the system looks. Thread-safe.
// Errors: kUnavailable, naming the file and the reason.
Expected<void*> LibraryFunction(const std::string& library, const char* function);

}  // namespace dsla
