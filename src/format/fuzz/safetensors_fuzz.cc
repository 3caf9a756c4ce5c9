// Any bytes as a safetensors file, and as an adapter for a tiny model.
#include <cstdint>
#include <string>

#include "base/check.h"
#include "format/adapter_layout.h"
#include "format/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsla;
  const auto bytes = std::as_bytes(std::span(data, size));
  const auto file = SafetensorsFile::Parse(bytes, "fuzz");
  if (file.ok()) {
    size_t total = 0;
    for (const SafetensorsTensor& tensor : file->tensors()) {
      DSLA_CHECK(tensor.data.empty() ||
                 (tensor.data.data() >= bytes.data() &&
                  tensor.data.data() + tensor.data.size() <= bytes.data() + bytes.size()));
      total += tensor.data.size();
    }
    DSLA_CHECK(total < size);
  } else {
    DSLA_CHECK(file.status().message().find('\n') == std::string::npos);
  }
  ModelConfig base;
  base.L = 1;
  base.C = base.H = base.Hkv = 1;
  base.D = 2;
  const auto adapter = ParseAdapter(bytes, "fuzz", base);
  if (!adapter.ok()) DSLA_CHECK(adapter.status().message().find('\n') == std::string::npos);
  return 0;
}
