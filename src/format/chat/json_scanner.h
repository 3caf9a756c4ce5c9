// JsonScanner: whether bytes that come one by one are one JSON value (RFC 8259), and where it ends.
#pragma once

#include <string>
#include <string_view>

namespace dsla {

class JsonScanner {
 public:
  enum class Result {
    kMore,        // goes on
    kDone,        // ends with this byte
    kDoneBefore,  // ended before this byte (numbers, true, false, null)
    kBad,         // is no JSON, or nested over 64 deep
  };
  // White space before the value is part of it. Nothing may follow kDone, kDoneBefore and kBad.
  Result Next(char c);

 private:
  enum class State {
    kValue,
    kFirstItem,
    kFirstKey,
    kKey,
    kColon,
    kAfter,
    kString,
    kEscape,
    kHex,
    kWord
  };
  Result Begin(char c);
  Result After(char c);
  Result Open(char c, State next);
  Result End();  // of a value whose last byte has come

  State state_ = State::kValue;
  std::string open_;  // '{' and '[' that are open
  bool in_key_ = false;
  int hex_ = 0;       // digits of \u that are missing
  std::string word_;  // a number or literal so far
};

// Whether all of the text is one JSON value, or one object, white space around it allowed.
bool IsJson(std::string_view text);
bool IsJsonObject(std::string_view text);

}  // namespace dsla
