// Operators, filters, methods and tests on Jinja values, with Python's meaning. Internal to the
// Jinja evaluator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "format/chat/jinja.h"

namespace dsla::jinja {

// Bounds of one text, one list, and of what a text is searched for. Published templates stay far
// below.
inline constexpr size_t kMaxText = 16 << 10;
inline constexpr size_t kMaxItems = 1024;
inline constexpr size_t kMaxPattern = 256;

bool Truth(const Value& value);
Expected<std::string> ToText(const Value& value);  // as printed by {{ }}
Expected<List> ToList(const Value& value);         // as iterated by {% for %}

Expected<Value> Item(const Value& base, const Value& key);
Expected<Value> Slice(const Value& base, std::optional<int64_t> begin, std::optional<int64_t> end,
                      std::optional<int64_t> step);
Expected<Value> Range(const List& args);
Expected<Value> Binary(std::string_view op, const Value& a, const Value& b);

Expected<Value> CallMethod(const Value& self, std::string_view name, const List& args);
Expected<Value> CallFilter(const Value& self, std::string_view name, const List& args);
Expected<Value> CallTest(const Value& value, std::string_view name);

}  // namespace dsla::jinja
