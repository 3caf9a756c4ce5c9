// Any bytes as a GGUF file: refused with one line, or a model whose every part can be read.
#include <cstdint>
#include <string>
#include <vector>

#include "base/check.h"
#include "format/model_file_impl.h"

namespace {

void CheckOneLine(const dsla::Status& status) {
  DSLA_CHECK(!status.ok() && !status.message().empty());
  DSLA_CHECK(status.message().find('\n') == std::string::npos);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsla;
  auto file = GgufFile::Parse(std::as_bytes(std::span(data, size)), "fuzz.gguf");
  if (!file.ok()) {
    CheckOneLine(file.status());
    return 0;
  }
  const auto model = MakeGgufModel(std::move(*file));
  if (!model.ok()) {
    CheckOneLine(model.status());
    return 0;
  }
  DSLA_CHECK((*model)->Fingerprint().ok());
  if (const auto tokenizer = (*model)->ReadTokenizer(); !tokenizer.ok()) {
    CheckOneLine(tokenizer.status());
  }
  for (const TensorInfo& info : (*model)->tensors()) {
    // As large as the file at most: no type stores more than two elements in a byte.
    size_t elements = 1;
    for (const int64_t n : info.shape) elements *= static_cast<size_t>(n);
    DSLA_CHECK(elements <= 2 * size);
    std::vector<float> values(elements);
    if (const Status status = (*model)->Read(info.name, values); !status.ok()) {
      CheckOneLine(status);
    }
  }
  return 0;
}
