// Operators, filters, methods and tests on Jinja values, with Python's meaning. Internal to the
// Jinja evaluator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "format/chat/jinja.h"

namespace dsla::jinja {

// What a text may be searched for.
inline constexpr size_t kMaxPattern = 256;

// Arguments by name of a filter or method.
using Named = std::map<std::string, Value>;

bool Truth(const Value& value);
Expected<Text> ToText(const Value& value, const Bounds& bounds);  // as printed by {{ }}
Expected<List> ToList(const Value& value);                        // as iterated by {% for %}

Expected<Value> Item(const Value& base, const Value& key);
Expected<Value> Slice(const Value& base, std::optional<int64_t> begin, std::optional<int64_t> end,
                      std::optional<int64_t> step);
Expected<Value> Range(const List& args, const Bounds& bounds);
Expected<Value> Binary(std::string_view op, const Value& a, const Value& b, const Bounds& bounds);

Expected<Value> CallMethod(const Value& self, std::string_view name, const List& args,
                           const Bounds& bounds);
Expected<Value> CallFilter(const Value& self, std::string_view name, const List& args,
                           const Named& named, const Bounds& bounds);
Expected<Value> CallTest(const Value& value, std::string_view name);

}  // namespace dsla::jinja
