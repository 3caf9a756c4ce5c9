// DSLA_CHECK: a condition that only our own bug can break; on in every build. DSLA_DCHECK: the same
// inside hot loops, off in Release. Both print the place and the condition and abort.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace dsla {

[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace dsla

#define DSLA_CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::dsla::CheckFailed(__FILE__, __LINE__, #condition))

#ifdef NDEBUG
#define DSLA_DCHECK(condition) static_cast<void>(0)
#else
#define DSLA_DCHECK(condition) DSLA_CHECK(condition)
#endif
