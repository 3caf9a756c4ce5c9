// Reads a tokenizer.json: the vocabulary and the merges, which are nearly all of it, straight into
// arrays, the rest into a tree. Nesting is bounded, and a token that is there twice is noticed,
// which a tree would hide.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace dsla {

struct TokenizerJson {
  nlohmann::json rest;  // without model.vocab and model.merges
  std::vector<std::pair<std::string, int64_t>> vocab;
  std::vector<std::pair<std::string, std::string>> merges;
  bool has_vocab = false;
};

// `what` names the file. Errors: kDataLoss.
Expected<TokenizerJson> ReadTokenizerJson(std::string_view json, const std::string& what);

// Any other JSON file, as a tree of bounded nesting.
Expected<nlohmann::json> ReadJson(std::string_view json, const std::string& what);

// Access to an object's fields that keeps the first error, so that a run of reads needs one check
// at its end.
class JsonObject {
 public:
  // `where` is the object's name in messages: "tokenizer.json: model".
  JsonObject(const nlohmann::json& value, std::string where, Status* status);

  // False too where the field is null.
  bool Has(const char* key) const;
  bool Bool(const char* key, bool fallback) const;
  std::string String(const char* key) const;  // an error if it is not there
  std::string String(const char* key, const std::string& fallback) const;
  int32_t Id(const char* key) const;  // a token id
  // The items of an array; none where it is absent.
  std::vector<JsonObject> Items(const char* key) const;
  JsonObject Object(const char* key) const;
  const nlohmann::json& Raw(const char* key) const;

  const std::string& where() const { return where_; }
  const nlohmann::json& value() const { return *value_; }
  void Fail(const char* key, const char* expected) const;

 private:
  const nlohmann::json* value_;
  std::string where_;
  Status* status_;
};

}  // namespace dsla
