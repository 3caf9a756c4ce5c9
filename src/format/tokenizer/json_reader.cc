#include "format/tokenizer/json_reader.h"

#include <utility>

namespace dsla {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 32;

// Builds a tree, but hands what is under model.vocab and model.merges to arrays.
class Handler {
 public:
  Handler(const std::string& what, bool is_tokenizer, TokenizerJson* out)
      : what_(what), is_tokenizer_(is_tokenizer), out_(*out) {}

  Status status() const { return status_; }

  bool null() { return Value(nullptr); }
  bool boolean(bool v) { return Value(v); }
  bool number_integer(int64_t v) { return in_ == kVocab ? Id(v) : Value(v); }
  bool number_unsigned(uint64_t v) {
    return in_ == kVocab ? Id(v > INT64_MAX ? INT64_MAX : static_cast<int64_t>(v)) : Value(v);
  }
  bool number_float(double v, const std::string&) { return Value(v); }
  bool binary(json::binary_t&) { return false; }
  bool string(std::string& v) {
    if (in_ == kMerges) return MergeLine(v);
    if (in_ == kPair) {
      pair_.push_back(std::move(v));
      return pair_.size() <= 2 || FailMerge();
    }
    return Value(std::move(v));
  }

  bool key(std::string& k) {
    if (in_ == kVocab)
      out_.vocab.emplace_back(std::move(k), -1);
    else
      key_ = std::move(k);
    return true;
  }
  bool start_object(size_t) {
    if (in_ != kTree) return Misplaced();
    if (AtModelField("vocab")) {
      in_ = kVocab;
      out_.has_vocab = true;
      return out_.vocab.empty() || Fail("model.vocab is there twice");
    }
    return Open(json::object());
  }
  bool end_object() { return Close(kVocab); }
  bool start_array(size_t) {
    if (in_ == kMerges) {
      in_ = kPair;
      pair_.clear();
      return true;
    }
    if (in_ != kTree) return Misplaced();
    if (AtModelField("merges")) {
      in_ = kMerges;
      return out_.merges.empty() || Fail("model.merges is there twice");
    }
    return Open(json::array());
  }
  bool end_array() {
    if (in_ == kPair) {
      if (pair_.size() != 2) return FailMerge();
      out_.merges.emplace_back(std::move(pair_[0]), std::move(pair_[1]));
      in_ = kMerges;
      return true;
    }
    return Close(kMerges);
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) {
    status_ = DataLoss("{}: malformed JSON at byte {}", what_, position);
    return false;
  }

 private:
  enum Place { kTree, kVocab, kMerges, kPair };

  bool AtModelField(const char* field) const {
    return is_tokenizer_ && open_.size() == 2 && open_keys_[1] == "model" &&
           open_[1]->is_object() && key_ == field;
  }
  json* Insert(json value) {
    if (open_.empty()) {
      out_.rest = std::move(value);
      return &out_.rest;
    }
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    json& slot = parent[key_];
    slot = std::move(value);
    return &slot;
  }
  bool Value(json value) {
    if (in_ != kTree) return Misplaced();
    Insert(std::move(value));
    return true;
  }
  bool Open(json empty) {
    if (open_.size() == kMaxDepth) return Fail("nested too deeply");
    open_keys_.push_back(key_);
    open_.push_back(Insert(std::move(empty)));
    return true;
  }
  bool Close(Place place) {
    if (in_ == place) {
      in_ = kTree;
    } else {
      open_.pop_back();
      open_keys_.pop_back();
    }
    return true;
  }
  bool Id(int64_t id) {
    out_.vocab.back().second = id;
    return true;
  }
  // "left right", as old files write merges.
  bool MergeLine(const std::string& line) {
    const size_t space = line.find(' ');
    if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
      return FailMerge();
    out_.merges.emplace_back(line.substr(0, space), line.substr(space + 1));
    return true;
  }
  bool Fail(std::string_view why) {
    status_ = DataLoss("{}: {}", what_, why);
    return false;
  }
  bool FailMerge() {
    status_ = DataLoss("{}: model.merges[{}] is not a pair of tokens", what_, out_.merges.size());
    return false;
  }
  bool Misplaced() {
    if (in_ != kVocab) return FailMerge();
    return Fail("model.vocab holds a value that is not a token id");
  }

  const std::string& what_;
  bool is_tokenizer_;
  TokenizerJson& out_;
  Status status_;
  Place in_ = kTree;
  std::string key_;
  std::vector<json*>
      open_;  // containers that are open; stable, as a container changes only while it is the last
  std::vector<std::string> open_keys_;
  std::vector<std::string> pair_;
};

Status Parse(std::string_view text, const std::string& what, bool is_tokenizer,
             TokenizerJson* out) {
  Handler handler(what, is_tokenizer, out);
  if (!json::sax_parse(text.begin(), text.end(), &handler)) {
    return handler.status().ok() ? DataLoss("{}: malformed JSON", what) : handler.status();
  }
  if (!out->rest.is_object()) return DataLoss("{}: not a JSON object", what);
  return Status::Ok();
}

}  // namespace

Expected<TokenizerJson> ReadTokenizerJson(std::string_view text, const std::string& what) {
  TokenizerJson out;
  DSLA_RETURN_IF_ERROR(Parse(text, what, true, &out));
  return out;
}

Expected<json> ReadJson(std::string_view text, const std::string& what) {
  TokenizerJson out;
  DSLA_RETURN_IF_ERROR(Parse(text, what, false, &out));
  return std::move(out.rest);
}

namespace {
const json kNull;
const json kEmptyObject = json::object();
}  // namespace

JsonObject::JsonObject(const json& value, std::string where, Status* status)
    : value_(value.is_object() ? &value : &kEmptyObject),
      where_(std::move(where)),
      status_(status) {
  if (!value.is_object() && status_->ok()) *status_ = DataLoss("{} is not an object", where_);
}

const json& JsonObject::Raw(const char* key) const {
  const auto it = value_->find(key);
  return it == value_->end() ? kNull : *it;
}
bool JsonObject::Has(const char* key) const { return !Raw(key).is_null(); }

void JsonObject::Fail(const char* key, const char* expected) const {
  if (status_->ok()) *status_ = DataLoss("{}.{} is not {}", where_, key, expected);
}

bool JsonObject::Bool(const char* key, bool fallback) const {
  const json& v = Raw(key);
  if (v.is_null()) return fallback;
  if (!v.is_boolean()) {
    Fail(key, "true or false");
    return fallback;
  }
  return v.get<bool>();
}

std::string JsonObject::String(const char* key) const {
  const json& v = Raw(key);
  if (!v.is_string()) {
    Fail(key, "a string");
    return {};
  }
  return v.get<std::string>();
}

std::string JsonObject::String(const char* key, const std::string& fallback) const {
  return Has(key) ? String(key) : fallback;
}

int32_t JsonObject::Id(const char* key) const {
  const json& v = Raw(key);
  if (!v.is_number_unsigned() || v.get<uint64_t>() > INT32_MAX) {
    Fail(key, "a token id");
    return 0;
  }
  return v.get<int32_t>();
}

std::vector<JsonObject> JsonObject::Items(const char* key) const {
  std::vector<JsonObject> items;
  const json& v = Raw(key);
  if (v.is_null()) return items;
  if (!v.is_array()) {
    Fail(key, "an array");
    return items;
  }
  for (size_t i = 0; i < v.size(); ++i)
    items.emplace_back(v[i], fmt::format("{}.{}[{}]", where_, key, i), status_);
  return items;
}

JsonObject JsonObject::Object(const char* key) const {
  return JsonObject(Raw(key), fmt::format("{}.{}", where_, key), status_);
}

}  // namespace dsla
