// Any text as config.json and generation_config.json.
#include <cmath>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "format/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsla;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  auto config = ParseHfConfig(text, "fuzz");
  if (!config.ok()) {
    DSLA_CHECK(config.status().message().find('\n') == std::string::npos);
    return 0;
  }
  DSLA_CHECK(ValidateConfig(*config, "fuzz").ok());
  for (const double frequency : config->rope.Frequencies(config->D)) {
    DSLA_CHECK(std::isfinite(frequency) && frequency >= 0);
  }
  const Status status = MergeGenerationConfig(text, "fuzz", &*config);
  if (!status.ok()) DSLA_CHECK(status.message().find('\n') == std::string::npos);
  return 0;
}
