// The sub-commands: each adds itself to the application and says what runs when it is chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace dsla {

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
