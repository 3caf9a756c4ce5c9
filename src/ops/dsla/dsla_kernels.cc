// Compiles the kernels for every target and picks one at run time.
#include "ops/dsla/cpu_decode.h"
#include "ops/dsla/cpu_wave.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dsla/dsla_kernels.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// After foreach_target.h.
#include "hwy/highway.h"
#include "ops/dsla/chunk-inl.h"
#include "ops/dsla/decode-inl.h"
#include "ops/dsla/query-inl.h"

#if HWY_ONCE
namespace dsla {

HWY_EXPORT(HasBf16Window);
HWY_EXPORT(PrepareChunk);
HWY_EXPORT(ScanStates);
HWY_EXPORT(QueryBlock);
HWY_EXPORT(DecodeKeys);
HWY_EXPORT(DecodeQueries);
HWY_EXPORT(DecodeStates);
HWY_EXPORT(DecodeWindow);
HWY_EXPORT(DecodeMerge);

int64_t DslaPrepareScratch(const DslaShape& shape) {
  return static_cast<int64_t>(kCpuChunk) * (2 * shape.D + 2 * shape.SF() + shape.F);
}
int64_t DslaQueryScratch(const DslaShape& shape, int heads) {
  const int64_t lanes = int64_t{heads} * kQueryBlock;
  return lanes * (4 * shape.D + shape.SF() + DslaBlockKeys(shape) + 5);
}
int64_t DslaDecodeScratch(const DslaShape& shape) {
  const int64_t project = int64_t{kDecodeRows} * (3 * shape.D + shape.SF());
  const int64_t keys = shape.window + shape.sinks, score_row = (keys + 15) / 16 * 16;
  return std::max(project, keys * shape.D + shape.G() * (score_row + shape.D));
}

bool DslaBf16Window(const DslaShape& shape) {
  return shape.window > 0 && shape.kv_dtype == DType::kBF16 &&
         HWY_DYNAMIC_DISPATCH(HasBf16Window)();
}
void DslaPrepareChunk(const DslaWave& wave, int chunk, int h, float* scratch) {
  HWY_DYNAMIC_DISPATCH(PrepareChunk)(wave, chunk, h, scratch);
}
void DslaScanStates(const DslaWave& wave, int segment, int h, int begin, int end) {
  HWY_DYNAMIC_DISPATCH(ScanStates)(wave, segment, h, begin, end);
}
void DslaQueryBlock(const DslaWave& wave, int chunk, int first, int first_head, int heads,
                    float* scratch) {
  HWY_DYNAMIC_DISPATCH(QueryBlock)(wave, chunk, first, first_head, heads, scratch);
}
void DslaDecodeKeys(const DslaDecode& batch, int h, int begin, int end, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DecodeKeys)(batch, h, begin, end, scratch);
}
void DslaDecodeQueries(const DslaDecode& batch, int h, int begin, int end, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DecodeQueries)(batch, h, begin, end, scratch);
}
void DslaDecodeStates(const DslaDecode& batch, int row, int h, int block) {
  HWY_DYNAMIC_DISPATCH(DecodeStates)(batch, row, h, block);
}
void DslaDecodeWindow(const DslaDecode& batch, int row, int h, float* scratch) {
  HWY_DYNAMIC_DISPATCH(DecodeWindow)(batch, row, h, scratch);
}
void DslaDecodeMerge(const DslaDecode& batch, int row) {
  HWY_DYNAMIC_DISPATCH(DecodeMerge)(batch, row);
}

}  // namespace dsla
#endif  // HWY_ONCE
