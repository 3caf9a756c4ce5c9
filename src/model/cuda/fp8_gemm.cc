#include "model/cuda/fp8_gemm.h"

#include "model/cuda/cublas_util.h"

namespace dsla::cuda {
namespace {

template <typename T>
void Set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  CheckCublas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)),
              "describing a product in fp8");
}

void SetScales(cublasLtMatmulDesc_t product, const Fp8Gemm::Operand& weight,
               const Fp8Gemm::Operand& x) {
  Set(product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight.scale);
  Set(product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.scale);
}

cublasLtMatrixLayout_t NewLayout(cudaDataType_t type, int64_t rows, int64_t columns,
                                 int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  CheckCublas(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows),
                                         static_cast<uint64_t>(columns), stride),
              "describing a matrix");
  return layout;
}

}  // namespace

Fp8Gemm::Fp8Gemm(cudaStream_t stream, const DeviceBuffer& workspace)
    : stream_(stream), workspace_(workspace) {
  CheckCublas(cublasLtCreate(&handle_), "starting");
}

Fp8Gemm::~Fp8Gemm() {
  plans_.clear();
  cublasLtDestroy(handle_);
}

// Column-major, as in Gemm: y^T [out, T] = (W^T)^T [out, in] x^T [in, T].
const Fp8Gemm::Plan& Fp8Gemm::PlanOf(const Operand& weight, const Operand& x, int64_t in,
                                     int64_t stride, bool f32) {
  const int64_t out = weight.rows, T = x.rows;
  const Shape shape{out, in, T, stride, f32};
  const auto found = plans_.find(shape);
  if (found != plans_.end()) return found->second;
  cublasLtMatmulDesc_t product = nullptr;
  CheckCublas(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
              "describing a product in fp8");
  Plan plan;
  plan.product.reset(product);
  plan.weight.reset(NewLayout(CUDA_R_8F_E4M3, in, out, in));
  plan.x.reset(NewLayout(CUDA_R_8F_E4M3, in, T, in));
  plan.y.reset(NewLayout(f32 ? CUDA_R_32F : CUDA_R_16BF, out, T, stride));
  Set(product, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  const cublasLtMatmulMatrixScale_t by_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  Set(product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, by_row);
  Set(product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, by_row);
  // Without scales there is no kernel to be found.
  SetScales(product, weight, x);
  Set(product, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});

  cublasLtMatmulPreference_t preference = nullptr;
  CheckCublas(cublasLtMatmulPreferenceCreate(&preference), "asking for a kernel");
  const auto bytes = static_cast<uint64_t>(workspace_.bytes());
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                       sizeof(bytes));
  cublasLtMatmulHeuristicResult_t best = {};
  int results = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, product, plan.weight.get(), plan.x.get(),
                                     plan.y.get(), plan.y.get(), preference, 1, &best, &results);
  cublasLtMatmulPreferenceDestroy(preference);
  CheckCublas(results > 0 ? status : CUBLAS_STATUS_NOT_SUPPORTED, "finding a kernel for fp8");
  plan.algorithm = best.algo;
  return plans_.emplace(shape, std::move(plan)).first->second;
}

void Fp8Gemm::Run(const Operand& weight, const Operand& x, int64_t in, void* y, int64_t y_stride,
                  bool y_f32) {
  const Plan& plan = PlanOf(weight, x, in, y_stride, y_f32);
  SetScales(plan.product.get(), weight, x);
  const float one = 1, zero = 0;
  CheckCublas(
      cublasLtMatmul(handle_, plan.product.get(), &one, weight.data, plan.weight.get(), x.data,
                     plan.x.get(), &zero, y, plan.y.get(), y, plan.y.get(), &plan.algorithm,
                     workspace_.as(), static_cast<size_t>(workspace_.bytes()), stream_),
      "a product in fp8");
}

}  // namespace dsla::cuda
