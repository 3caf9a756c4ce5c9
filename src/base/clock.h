// Monotonic seconds since an unspecified start.
#pragma once

#include <chrono>

namespace dsla {

inline double NowSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace dsla
