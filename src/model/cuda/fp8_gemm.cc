#include "model/cuda/fp8_gemm.h"

#include "model/cuda/cublas_util.h"

namespace dsla::cuda {
namespace {

template <typename T>
void Set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  CheckCublas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)),
              "describing a product in fp8");
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
const Fp8Gemm::Plan& Fp8Gemm::PlanOf(const Shape& shape) {
  const auto found = plans_.find(shape);
  if (found != plans_.end()) return found->second;
  const auto [out, in, T, stride, f32] = shape;
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
  const Plan& plan = PlanOf({weight.rows, in, x.rows, y_stride, y_f32});
  Set(plan.product.get(), CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight.scale);
  Set(plan.product.get(), CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.scale);
  const float one = 1, zero = 0;
  CheckCublas(
      cublasLtMatmul(handle_, plan.product.get(), &one, weight.data, plan.weight.get(), x.data,
                     plan.x.get(), &zero, y, plan.y.get(), y, plan.y.get(), &plan.algorithm,
                     workspace_.as(), static_cast<size_t>(workspace_.bytes()), stream_),
      "a product in fp8");
}

}  // namespace dsla::cuda
