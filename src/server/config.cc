#include "server/config.h"

#include <toml++/toml.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <regex>

extern char** environ;

namespace dsla {
namespace {

constexpr std::string_view kPrefix = "DSLA_";

std::string EnvironmentName(const std::string& option) {
  std::string name(kPrefix);
  for (const char c : option)
    name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

// Of an option that may stand in a file: its long name.
std::string NameOf(const CLI::Option& option) {
  const auto& names = option.get_lnames();
  return names.empty() || names[0] == "help" ? "" : names[0];
}

// A TOML value as it would stand on the command line.
Expected<std::vector<std::string>> Texts(const toml::node& node, const std::string& where) {
  std::vector<std::string> texts;
  if (const toml::array* array = node.as_array()) {
    for (const toml::node& element : *array) {
      if (element.is_array()) return InvalidArgument("{}: a list within a list", where);
      DSLA_ASSIGN_OR_RETURN(const std::vector<std::string> inner, Texts(element, where));
      texts.insert(texts.end(), inner.begin(), inner.end());
    }
    return texts;
  }
  if (const auto* text = node.as_string()) {
    texts.push_back(text->get());
  } else if (const auto* integer = node.as_integer()) {
    texts.push_back(std::to_string(integer->get()));
  } else if (const auto* number = node.as_floating_point()) {
    texts.push_back(fmt::format("{}", number->get()));
  } else if (const auto* flag = node.as_boolean()) {
    texts.push_back(flag->get() ? "true" : "false");
  } else {
    return InvalidArgument("{}: only text, numbers, true, false and lists of them", where);
  }
  return texts;
}

// Sets the option and runs its checks, as the command line would.
Status Set(CLI::Option& option, const std::vector<std::string>& texts, const std::string& where) {
  try {
    for (const std::string& text : texts) {
      if (option.get_expected_max() == 0 && text != "true" && text != "false" && text != "1" &&
          text != "0")
        return InvalidArgument("{}: '{}' is neither true nor false", where, text);
      option.add_result(text);
    }
    option.run_callback();
  } catch (const CLI::Error& error) {
    return InvalidArgument("{}: {}", where, error.what());
  }
  return Status::Ok();
}

struct File {
  std::string path;
  toml::table table;
};

Expected<File> ReadFile(const std::string& path, const std::vector<std::string>& names) {
  File file;
  file.path = path;
  if (path.empty()) return file;
  if (access(path.c_str(), R_OK) != 0) return NotFound("--config: cannot read '{}'", path);
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    return InvalidArgument("--config: '{}' is a directory", path);
  try {
    file.table = toml::parse_file(path);
  } catch (const toml::parse_error& error) {
    return InvalidArgument("{}, line {}: {}", path, error.source().begin.line, error.description());
  }
  for (const auto& [key, value] : file.table) {
    const std::string name(key.str());
    if (name == "config" || std::find(names.begin(), names.end(), name) == names.end())
      return InvalidArgument("{}, line {}: there is no option '{}'{}", path,
                             value.source().begin.line, name, DidYouMean(NearMatch(name, names)));
  }
  return file;
}

// Of the options that may stand in a file.
std::vector<std::string> NamesOf(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    if (std::string name = NameOf(*option); !name.empty()) names.push_back(std::move(name));
  }
  return names;
}

std::vector<std::string> EnvironmentNames(const std::vector<std::string>& names) {
  std::vector<std::string> variables;
  for (const std::string& name : names) variables.push_back(EnvironmentName(name));
  return variables;
}

// The variable that is most like `name` in what follows the prefix, which all have in common.
std::string NearVariable(const std::string& name, const std::vector<std::string>& known) {
  std::vector<std::string> rests;
  for (const std::string& other : known) rests.push_back(other.substr(kPrefix.size()));
  const std::string near = NearMatch(name.substr(kPrefix.size()), rests);
  return near.empty() ? "" : std::string(kPrefix) + near;
}

bool IsServiceVariable(const std::string& name, const std::string& value) {
  static const std::regex kNames(
      "DSLA_(.*_)?(SERVICE_(HOST|PORT(_.*)?)|PORT_\\d+_(TCP|UDP|SCTP)(_.*)?)");
  static const std::regex kLinkNames("DSLA_(.*_)?PORT"), kLinks("(tcp|udp|sctp)://.*");
  return std::regex_match(name, kNames) ||
         (std::regex_match(name, kLinkNames) && std::regex_match(value, kLinks));
}

Status CheckEnvironment(const Environment& environment, const std::vector<std::string>& names) {
  const std::vector<std::string> known = EnvironmentNames(names);
  for (const auto& [name, value] : environment) {
    if (!name.starts_with(kPrefix)) continue;
    if (std::find(known.begin(), known.end(), name) == known.end())
      return InvalidArgument("the environment variable {} belongs to no option{}", name,
                             DidYouMean(NearVariable(name, known)));
  }
  return Status::Ok();
}

std::string Joined(const std::vector<std::string>& texts) {
  std::string joined;
  for (const std::string& text : texts) joined += (joined.empty() ? "" : ",") + text;
  return joined;
}

}  // namespace

Environment ProcessEnvironment() {
  Environment environment;
  for (char** entry = environ; entry && *entry; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string_view::npos)
      environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

std::vector<std::string> DropServiceVariables(const CLI::App& app, Environment& environment) {
  const std::vector<std::string> known = EnvironmentNames(NamesOf(app));
  std::vector<std::string> dropped;
  std::erase_if(environment, [&](const auto& variable) {
    const auto& [name, value] = variable;
    if (!IsServiceVariable(name, value)) return false;
    if (std::find(known.begin(), known.end(), name) != known.end()) dropped.push_back(name);
    return true;
  });
  return dropped;
}

Expected<std::vector<ConfigValue>> ResolveConfig(CLI::App& app, const Environment& environment,
                                                 const std::vector<std::string>& secrets) {
  const std::vector<CLI::Option*> options =
      app.get_options([](const CLI::Option* option) { return !NameOf(*option).empty(); });
  const std::vector<std::string> names = NamesOf(app);
  DSLA_RETURN_IF_ERROR(CheckEnvironment(environment, names));

  std::string config_path;
  if (const CLI::Option* config = app.get_option_no_throw("--config")) {
    const auto given = environment.find("DSLA_CONFIG");
    if (config->count() > 0) {
      config_path = config->results().back();
    } else if (given != environment.end()) {
      config_path = given->second;
    }
  }
  DSLA_ASSIGN_OR_RETURN(const File file, ReadFile(config_path, names));

  std::vector<ConfigValue> resolved;
  for (CLI::Option* option : options) {
    const std::string name = NameOf(*option);
    std::string source = "default";
    const auto variable = environment.find(EnvironmentName(name));
    const toml::node* node = file.table.get(name);
    if (option->count() > 0) {
      source = "command line";
    } else if (variable != environment.end()) {
      source = variable->first;
      DSLA_RETURN_IF_ERROR(Set(*option, {variable->second}, source));
    } else if (node) {
      source = file.path;
      const std::string where =
          fmt::format("{}, line {}: {}", file.path, node->source().begin.line, name);
      DSLA_ASSIGN_OR_RETURN(const std::vector<std::string> texts, Texts(*node, where));
      DSLA_RETURN_IF_ERROR(Set(*option, texts, where));
    }
    std::string value = option->count() > 0 ? Joined(option->results()) : option->get_default_str();
    const bool secret = std::find(secrets.begin(), secrets.end(), name) != secrets.end();
    if (secret && !value.empty()) value = "***";
    resolved.push_back({name, value, source});
  }
  return resolved;
}

std::string DidYouMean(const std::string& near) {
  return near.empty() ? "" : fmt::format(" (did you mean '{}'?)", near);
}

std::string NearMatch(const std::string& name, const std::vector<std::string>& names) {
  constexpr size_t kAbbreviation = 3;  // characters that tell enough of a word
  for (const std::string& other : names) {
    if (name.size() >= kAbbreviation && other.starts_with(name)) return other;
  }
  std::string best;
  size_t best_distance = 1 + name.size() / 3;  // more edits than that are another word
  for (const std::string& other : names) {
    std::vector<size_t> row(other.size() + 1);
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 1; i <= name.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j <= other.size(); ++j) {
        const size_t substituted = diagonal + (name[i - 1] == other[j - 1] ? 0 : 1);
        diagonal = row[j];
        row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
      }
    }
    if (row.back() <= best_distance && (best.empty() || row.back() < best_distance)) {
      best_distance = row.back();
      best = other;
    }
  }
  return best;
}

}  // namespace dsla
