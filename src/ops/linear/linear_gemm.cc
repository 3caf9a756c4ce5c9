#include "ops/linear/linear_gemm.h"

#include "base/shared_library.h"

namespace dsla {

Expected<Gemm> LoadGemm() {
  static const Expected<Gemm> gemm = []() -> Expected<Gemm> {
    DSLA_ASSIGN_OR_RETURN(void* const function, LibraryFunction("libdsla_gemm.so", "DslaGemm"));
    return reinterpret_cast<Gemm>(function);
  }();
  return gemm;
}

}  // namespace dsla
