// dsla: the command line.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "cli/commands.h"

namespace {

bool HasCommand(const CLI::App& app, const std::string& name) {
  const auto commands =
      app.get_subcommands([&](const CLI::App* command) { return command->get_name() == name; });
  return !commands.empty();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "dsla runs Llama-family language models over long contexts, and replaces attention layers "
      "by\n"
      "dual-state linear attention (DSLA) while a request is running, so that it gets cheaper.\n",
      "dsla"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "dsla 0.1.0");
  app.footer(
      "Start with:\n"
      "  dsla run \"What is linear attention?\"\n"
      "  dsla run --file report.txt --level 22 --stats \"Summarise this.\"\n"
      "  dsla serve\n"
      "  dsla COMMAND --help");
  dsla::Command chosen;
  dsla::AddRun(app, chosen);
  dsla::AddServe(app, chosen);
  dsla::AddInspect(app, chosen);
  dsla::AddEval(app, chosen);
  dsla::AddDistill(app, chosen);
  dsla::AddBench(app, chosen);
  if (argc > 1 && argv[1][0] != '-' && !HasCommand(app, argv[1])) {
    std::fprintf(stderr, "dsla: no command '%s' (see dsla --help)\n", argv[1]);
    return 2;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Help and version are answers; anything else is a usage error in one line.
    if (error.get_exit_code() == 0) return app.exit(error);
    std::fprintf(stderr, "dsla: %s (see dsla --help)\n", error.what());
    return 2;
  }
  try {
    return chosen();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dsla: out of memory\n");
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dsla: internal error: %s\n", error.what());
    return 1;
  }
}
