// The sub-commands: each adds itself to the application and says what runs when it is chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

namespace dsla {

// For a number that must not be negative; CLI11's own check answers with 309 digits.
inline CLI::Validator NotNegative() {
  return CLI::Validator(
      [](const std::string& text) {
        return text.starts_with('-') ? text + " is negative" : std::string();
      },
      "");
}

// Runs the command; the process's exit code.
using Command = std::function<int()>;

// Adds the sub-command to `app`. `chosen` receives the command to run if the user names it.
void AddRun(CLI::App& app, Command& chosen);
void AddServe(CLI::App& app, Command& chosen);
void AddInspect(CLI::App& app, Command& chosen);
void AddEval(CLI::App& app, Command& chosen);
void AddDistill(CLI::App& app, Command& chosen);
void AddBench(CLI::App& app, Command& chosen);

}  // namespace dsla
