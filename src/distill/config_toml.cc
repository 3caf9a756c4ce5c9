#include <toml++/toml.h>

#include <algorithm>

#include "base/mapped_file.h"
#include "distill/config.h"

namespace dsla {
namespace {

template <typename T>
bool Take(const toml::node& node, T* value) {
  if constexpr (std::is_same_v<T, double>) {
    const auto number = node.value<double>();  // a whole number is one too
    if (!node.is_number() || !number) return false;
    *value = *number;
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (!node.is_string()) return false;
    *value = node.as_string()->get();
  } else {
    if (!node.is_integer()) return false;
    const int64_t number = node.as_integer()->get();
    if (number != static_cast<T>(number)) return false;
    *value = static_cast<T>(number);
  }
  return true;
}

template <typename T>
bool Take(const toml::node& node, std::vector<T>* values) {
  const toml::array* const array = node.as_array();
  if (array == nullptr) return false;
  values->clear();
  for (const toml::node& item : *array) {
    T value;
    if (!Take(item, &value)) return false;
    values->push_back(value);
  }
  return true;
}

}  // namespace

Status ReadToml(const std::string& path, DistillConfig* config) {
  constexpr size_t kMaxBytes = 1 << 20;
  DSLA_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxBytes));
  toml::table root;
  try {
    root = toml::parse(text, path);
  } catch (const toml::parse_error& error) {
    return InvalidArgument("'{}' line {}: {}", path, error.source().begin.line,
                           std::string(error.description()));
  }
  const std::vector<ConfigKey> keys = ConfigKeys(*config);
  for (const auto& [table_name, node] : root) {
    const std::string table(table_name.str());
    if (!node.is_table())
      return InvalidArgument("'{}' line {}: '{}' stands outside a table", path,
                             node.source().begin.line, table);
    for (const auto& [key_name, value] : *node.as_table()) {
      const std::string name = table + "." + std::string(key_name.str());
      const auto key = std::find_if(keys.begin(), keys.end(),
                                    [&](const ConfigKey& k) { return k.name == name; });
      const auto line = value.source().begin.line;
      if (key == keys.end())
        return InvalidArgument("'{}' line {}: unknown key '{}'", path, line, name);
      const bool ok =
          std::visit([&, &value = value](auto* to) { return Take(value, to); }, key->value);
      if (!ok) return InvalidArgument("'{}' line {}: '{}' has the wrong type", path, line, name);
    }
  }
  return Status::Ok();
}

}  // namespace dsla
