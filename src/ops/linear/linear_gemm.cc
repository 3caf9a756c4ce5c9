#include "ops/linear/linear_gemm.h"

#include "base/shared_library.h"

namespace dsla {

Expected<const Gemm*> LoadGemm() {
  static const Expected<const Gemm*> gemm = []() -> Expected<const Gemm*> {
    DSLA_ASSIGN_OR_RETURN(void* const get, LibraryFunction("libdsla_gemm.so", "DslaGemm"));
    return reinterpret_cast<const Gemm* (*)()>(get)();
  }();
  return gemm;
}

}  // namespace dsla
