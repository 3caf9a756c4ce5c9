// dsla: the command line.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>

#include "cli/commands.h"
#include "server/config.h"

namespace {

std::vector<std::string> CommandNames(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(command->get_name());
  return names;
}

// The command that is asked for, as far as the arguments were read.
const CLI::App* CommandOf(const CLI::App& app) {
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
  return command;
}

std::string NameOf(const CLI::App& command) {
  const std::string name = command.get_name();
  return command.get_parent() ? NameOf(*command.get_parent()) + " " + name : name;
}

// Names the first option that the command does not have, else says what CLI11 says.
std::string MessageOf(const CLI::ParseError& error, const CLI::App& app) {
  const std::vector<std::string> rest = app.remaining(/*recurse=*/true);
  const auto option = std::find_if(rest.begin(), rest.end(),
                                   [](const std::string& text) { return text.starts_with('-'); });
  if (option == rest.end()) {
    if (rest.empty()) return error.what();
    const bool has_model = CommandOf(app)->get_option_no_throw("--model") != nullptr;
    return fmt::format("unexpected argument '{}'{}", rest.front(),
                       has_model ? " (a model is named by --model)" : "");
  }
  const std::string name = option->substr(0, option->find('='));
  std::vector<std::string> names;
  for (const CLI::Option* known : CommandOf(app)->get_options()) {
    names.insert(names.end(), known->get_lnames().begin(), known->get_lnames().end());
  }
  const std::string word = name.substr(std::min(name.find_first_not_of('-'), name.size()));
  const std::string near = dsla::NearMatch(word, names);
  return fmt::format("there is no option '{}'{}", name,
                     dsla::DidYouMean(near.empty() ? "" : "--" + near));
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
  const std::vector<std::string> commands = CommandNames(app);
  if (argc > 1 && argv[1][0] != '-' &&
      std::find(commands.begin(), commands.end(), argv[1]) == commands.end()) {
    fmt::print(stderr, "dsla: no command '{}'{} (see dsla --help)\n", argv[1],
               dsla::DidYouMean(dsla::NearMatch(argv[1], commands)));
    return 2;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Help and version are answers; anything else is a usage error in one line.
    if (error.get_exit_code() == 0) return app.exit(error);
    fmt::print(stderr, "dsla: {} (see {} --help)\n", MessageOf(error, app),
               NameOf(*CommandOf(app)));
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
