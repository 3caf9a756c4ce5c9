// Values as text: Python's str() and json.dumps(). Internal to the Jinja evaluator.
#pragma once

#include "base/status.h"
#include "format/chat/jinja.h"
#include "format/chat/jinja_library.h"

namespace dsla::jinja {

// str() of anything but a text; texts within lists and dictionaries as repr() writes them.
Expected<Text> ToPython(const Value& value, const Bounds& bounds);

// transformers' tojson: json.dumps(value, ensure_ascii=False, indent=indent).
Expected<Value> ToJson(const Value& value, const Named& named, const Bounds& bounds);

}  // namespace dsla::jinja
