// Where an option's value comes from: the command line, else the environment (DSLA_ and the
// option's name in capitals, '-' as '_'), else the configuration file (TOML; the option's name is
// the key), else its default. Names that no option has are refused, in the file and in the
// environment alike.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"

namespace dsla {

struct ConfigValue {
  std::string name;    // of the option, without its dashes
  std::string value;   // as given; masked where it is a secret
  std::string source;  // "command line", "DSLA_PORT", "dsla.toml", "default"
};

using Environment = std::map<std::string, std::string>;
Environment ProcessEnvironment();

// Takes out what Kubernetes tells every pod about a Service whose name begins with "dsla":
// DSLA_SERVICE_HOST, DSLA_PORT=tcp://10.0.0.1:8080, DSLA_PORT_8080_TCP_ADDR and the like. Returns
// those that are variables of options, too.
std::vector<std::string> DropServiceVariables(const CLI::App& app, Environment& environment);

// Gives the options of `app` that the command line left alone their values from `environment` and
// the file, and runs their conversions and checks. The file's name is the value of --config, from
// the command line or the environment; without one there is no file. The resolved configuration, in
// the order of the options. `secrets`: names whose values are masked. kInvalidArgument names the
// key and the place, and for an unknown one the nearest option.
Expected<std::vector<ConfigValue>> ResolveConfig(CLI::App& app, const Environment& environment,
                                                 const std::vector<std::string>& secrets);

// The one of `names` that is most like `name`; empty if none is close.
std::string NearMatch(const std::string& name, const std::vector<std::string>& names);
// What is put behind a message about `name`; nothing where `near` is empty.
std::string DidYouMean(const std::string& near);

}  // namespace dsla
