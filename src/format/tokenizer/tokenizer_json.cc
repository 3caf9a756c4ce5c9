#include <array>
#include <utility>

#include "format/tokenizer/json_reader.h"
#include "format/tokenizer/known_patterns.h"
#include "format/tokenizer/tokenizer_data.h"
#include "format/tokenizer/utf8.h"
#include "format/tokenizer/vocabulary.h"

namespace dsla {
namespace {

using nlohmann::json;
using Step = PreTokenizerStep;

class Reader {
 public:
  Reader(TokenizerJson file, const std::string& path) : file_(std::move(file)), path_(path) {}

  Expected<TokenizerData> Run() {
    const JsonObject root(file_.rest, path_, &status_);
    data_.source = path_;
    ReadModel(root.Object("model"));
    ReadTokens();
    ReadAdded(root.Items("added_tokens"));
    if (root.Has("normalizer")) ReadNormalizer(root.Object("normalizer"));
    if (root.Has("pre_tokenizer")) ReadPreTokenizer(root.Object("pre_tokenizer"));
    data_.kind = byte_level_ ? TokenizerKind::kByteLevelBpe : TokenizerKind::kSentencePieceBpe;
    if (root.Has("post_processor")) ReadPostProcessor(root.Object("post_processor"));
    ReadDecoder(root);
    if (!byte_level_ && data_.byte_fallback) MarkBytes();
    if (!status_.ok()) return status_;
    return std::move(data_);
  }

 private:
  void ReadModel(const JsonObject& model) {
    const std::string type = model.String("type", "BPE");
    if (type != "BPE")
      return Refuse(Unsupported("{}: model type '{}' is not supported, only BPE", path_, type));
    if (model.Has("dropout") && model.Raw("dropout") != 0) {
      return Refuse(Unsupported("{}: model.dropout is not supported", path_));
    }
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!model.String(affix, "").empty())
        return Refuse(Unsupported("{}: model.{} is not supported", path_, affix));
    }
    if (!file_.has_vocab) return model.Fail("vocab", "an object");
    if (model.Has("merges")) return model.Fail("merges", "an array");
    data_.byte_fallback = model.Bool("byte_fallback", false);
    data_.fuse_unk = model.Bool("fuse_unk", false);
    data_.ignore_merges = model.Bool("ignore_merges", false);
    unk_ = model.String("unk_token", "");
    data_.merges = std::move(file_.merges);
  }

  // Lays the vocabulary and the added tokens out by id; every id must be there once.
  void ReadTokens() {
    std::vector<std::pair<std::string, int64_t>> all = std::move(file_.vocab);
    const size_t model_tokens = all.size();
    const json& added = file_.rest.contains("added_tokens") ? file_.rest["added_tokens"] : json();
    if (added.is_array()) {
      for (const json& token : added) {
        if (!token.is_object() || !token.contains("content") || !token["content"].is_string())
          continue;
        const bool has_id = token.contains("id") && token["id"].is_number_integer();
        all.emplace_back(token["content"].get<std::string>(),
                         has_id ? token["id"].get<int64_t>() : -1);
      }
    }
    int64_t highest = -1;
    for (const auto& [text, id] : all) highest = std::max(highest, id);
    // A gap shows before memory is spent on it: n entries cannot fill more than n ids.
    if (highest >= static_cast<int64_t>(all.size())) {
      return Refuse(DataLoss("{}: the vocabulary has gaps: {} tokens, but id {}", path_, all.size(),
                             highest));
    }
    data_.tokens.resize(static_cast<size_t>(highest + 1));
    data_.types.assign(data_.tokens.size(), TokenType::kNormal);
    std::vector<bool> taken(data_.tokens.size(), false);
    for (size_t i = 0; i < all.size(); ++i) {
      auto& [text, id] = all[i];
      if (id < 0) return Refuse(DataLoss("{}: token {} has no valid id", path_, Quoted(text)));
      const auto slot = static_cast<size_t>(id);
      if (i >= model_tokens && taken[slot] && data_.tokens[slot] == text) continue;
      if (taken[slot]) {
        return Refuse(DataLoss("{}: tokens {} and {} both have id {}", path_,
                               Quoted(data_.tokens[slot]), Quoted(text), id));
      }
      taken[slot] = true;
      data_.tokens[slot] = std::move(text);
      if (i >= model_tokens) data_.types[slot] = TokenType::kUserDefined;  // no merge makes it
    }
    for (size_t id = 0; id < taken.size(); ++id) {
      if (!taken[id])
        return Refuse(DataLoss("{}: the vocabulary has gaps: no token has id {}", path_, id));
    }
    FindUnknown();
  }

  void FindUnknown() {
    if (unk_.empty()) return;
    for (size_t id = 0; id < data_.tokens.size(); ++id) {
      if (data_.tokens[id] == unk_) data_.unk_id = static_cast<int32_t>(id);
    }
    if (!data_.unk_id)
      Refuse(DataLoss("{}: unknown token {} is not in the vocabulary", path_, Quoted(unk_)));
  }

  void ReadAdded(const std::vector<JsonObject>& tokens) {
    for (const JsonObject& token : tokens) {
      AddedToken added;
      added.id = token.Id("id");
      added.text = token.String("content");
      added.special = token.Bool("special", false);
      added.lstrip = token.Bool("lstrip", false);
      added.rstrip = token.Bool("rstrip", false);
      added.single_word = token.Bool("single_word", false);
      added.normalized = token.Bool("normalized", !added.special);
      data_.added.push_back(std::move(added));
    }
  }

  void ReadNormalizer(const JsonObject& n) {
    const std::string type = n.String("type");
    NormalizerStep step;
    if (type == "Sequence") {
      for (const JsonObject& item : n.Items("normalizers")) ReadNormalizer(item);
      return;
    }
    if (type == "NFC") {
      step.kind = NormalizerStep::Kind::kNfc;
    } else if (type == "NFD") {
      step.kind = NormalizerStep::Kind::kNfd;
    } else if (type == "NFKC") {
      step.kind = NormalizerStep::Kind::kNfkc;
    } else if (type == "NFKD") {
      step.kind = NormalizerStep::Kind::kNfkd;
    } else if (type == "Prepend") {
      step.kind = NormalizerStep::Kind::kPrepend;
      step.content = n.String("prepend");
    } else if (type == "Replace") {
      step.kind = NormalizerStep::Kind::kReplace;
      step.pattern = LiteralPattern(n);
      step.content = n.String("content");
    } else {
      return RefuseStep(n, "normalizer", type);
    }
    data_.normalizer.push_back(std::move(step));
  }

  // {"pattern": {"String": ...}}; an expression is refused.
  std::string LiteralPattern(const JsonObject& parent) {
    const JsonObject pattern = parent.Object("pattern");
    if (pattern.Has("Regex"))
      Refuse(Unsupported("{}.Regex is not supported, only String", pattern.where()));
    return pattern.String("String");
  }

  void ReadPreTokenizer(const JsonObject& p) {
    const std::string type = p.String("type");
    if (type == "Sequence") {
      for (const JsonObject& item : p.Items("pretokenizers")) ReadPreTokenizer(item);
      return;
    }
    if (byte_level_) {
      return Refuse(
          Unsupported("{}: pre-tokenizer '{}' after ByteLevel is not supported", p.where(), type));
    }
    if (type == "ByteLevel") {
      ReadByteLevel(p);
    } else if (type == "Digits") {
      Step step{.kind = Step::Kind::kDigits};
      step.individual = p.Bool("individual_digits", false);
      data_.pre_tokenizer.push_back(step);
    } else if (type == "Split") {
      ReadSplit(p);
    } else if (type == "Metaspace") {
      ReadMetaspace(p);
    } else {
      RefuseStep(p, "pre-tokenizer", type);
    }
  }

  void ReadByteLevel(const JsonObject& p) {
    byte_level_ = true;
    if (p.Bool("add_prefix_space", true))
      data_.pre_tokenizer.push_back({.kind = Step::Kind::kPrefixSpace});
    if (!p.Bool("use_regex", true)) return;
    Step step{.kind = Step::Kind::kSplit};
    step.pattern = known_patterns::kGpt2;
    data_.pre_tokenizer.push_back(step);
  }

  void ReadSplit(const JsonObject& p) {
    constexpr std::array<std::pair<std::string_view, Step::Behavior>, 5> kBehaviors = {
        {{"Removed", Step::Behavior::kRemoved},
         {"Isolated", Step::Behavior::kIsolated},
         {"MergedWithPrevious", Step::Behavior::kMergedWithPrevious},
         {"MergedWithNext", Step::Behavior::kMergedWithNext},
         {"Contiguous", Step::Behavior::kContiguous}}};
    Step step{.kind = Step::Kind::kSplit};
    const JsonObject pattern = p.Object("pattern");
    step.literal = pattern.Has("String");
    step.pattern = pattern.String(step.literal ? "String" : "Regex");
    step.invert = p.Bool("invert", false);
    const std::string behavior = p.String("behavior");
    bool known = false;
    for (const auto& [name, value] : kBehaviors) {
      if (behavior == name) {
        step.behavior = value;
        known = true;
      }
    }
    if (!known) Refuse(Unsupported("{}: behavior '{}' is not supported", p.where(), behavior));
    data_.pre_tokenizer.push_back(step);
  }

  void ReadMetaspace(const JsonObject& p) {
    Step step{.kind = Step::Kind::kMetaspace};
    step.replacement = p.String("replacement");
    if (step.replacement != kSpaceMark) {
      Refuse(Unsupported("{}: replacement {} is not supported, only U+2581", p.where(),
                         Quoted(step.replacement)));
    }
    const std::string scheme =
        p.String("prepend_scheme", p.Bool("add_prefix_space", true) ? "always" : "never");
    if (scheme == "first") {
      step.prepend = Step::Prepend::kFirst;
    } else if (scheme == "never") {
      step.prepend = Step::Prepend::kNever;
    } else if (scheme != "always") {
      Refuse(Unsupported("{}: prepend_scheme '{}' is not supported", p.where(), scheme));
    }
    step.split = p.Bool("split", true);
    data_.pre_tokenizer.push_back(step);
  }

  void ReadPostProcessor(const JsonObject& p) {
    const std::string type = p.String("type");
    if (type == "Sequence") {
      for (const JsonObject& item : p.Items("processors")) ReadPostProcessor(item);
    } else if (type == "TemplateProcessing") {
      ReadTemplate(p);
    } else if (type != "ByteLevel") {  // which only moves offsets
      RefuseStep(p, "post-processor", type);
    }
  }

  void ReadTemplate(const JsonObject& p) {
    bool after_text = false;
    const json& special = p.Raw("special_tokens");
    for (const JsonObject& item : p.Items("single")) {
      if (item.Has("Sequence")) {
        if (after_text) return Refuse(Unsupported("{}: the text is there twice", item.where()));
        after_text = true;
        continue;
      }
      const std::string name = item.Object("SpecialToken").String("id");
      if (!status_.ok()) return;
      if (!special.is_object() || !special.contains(name)) {
        return Refuse(
            DataLoss("{}: special token {} is not described", item.where(), Quoted(name)));
      }
      const JsonObject described(special[name], p.where() + ".special_tokens." + name, &status_);
      const json& ids = described.Raw("ids");
      for (const json& id : ids) {
        if (!ids.is_array() || !id.is_number_unsigned() || id.get<uint64_t>() > INT32_MAX) {
          return described.Fail("ids", "an array of token ids");
        }
        (after_text ? data_.suffix : data_.prefix).push_back(id.get<int32_t>());
      }
    }
    if (!after_text) p.Fail("single", "a template with the text in it");
  }

  void ReadDecoder(const JsonObject& root) {
    if (!root.Has("decoder")) {
      return Refuse(Unsupported("{}: a tokenizer without a decoder is not supported", path_));
    }
    ReadDecoderStep(root.Object("decoder"));
    if (byte_level_ != byte_decoder_) {
      Refuse(Unsupported(
          "{}: the decoder does not undo the pre-tokenizer: only one of them is ByteLevel", path_));
    }
  }

  void ReadDecoderStep(const JsonObject& d) {
    const std::string type = d.String("type");
    if (type == "Sequence") {
      for (const JsonObject& item : d.Items("decoders")) ReadDecoderStep(item);
    } else if (type == "ByteLevel") {
      byte_decoder_ = true;
    } else if (type == "Replace") {
      if (LiteralPattern(d) != kSpaceMark || d.String("content") != " ") {
        Refuse(Unsupported("{}: only U+2581 to a space can be replaced", d.where()));
      }
    } else if (type == "Strip") {
      if (d.String("content") != " " || d.Raw("start") != 1 || d.Raw("stop") != 0) {
        Refuse(Unsupported("{}: only one space at the start can be stripped", d.where()));
      }
      data_.strip_leading_space = true;
    } else if (type == "Metaspace") {
      const bool prefix = d.Bool("add_prefix_space", true);
      data_.strip_leading_space =
          d.String("prepend_scheme", prefix ? "always" : "never") != "never";
    } else if (type != "ByteFallback" && type != "Fuse") {
      RefuseStep(d, "decoder", type);
    }
  }

  void MarkBytes() {
    for (size_t id = 0; id < data_.tokens.size(); ++id) {
      if (data_.types[id] == TokenType::kNormal && ByteOfToken(data_.tokens[id]))
        data_.types[id] = TokenType::kByte;
    }
  }

  void RefuseStep(const JsonObject& at, const char* what, const std::string& type) {
    Refuse(Unsupported("{}: {} '{}' is not supported", at.where(), what, type));
  }
  void Refuse(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  TokenizerJson file_;
  const std::string& path_;
  Status status_;
  TokenizerData data_;
  std::string unk_;
  bool byte_level_ = false, byte_decoder_ = false;
};

}  // namespace

Expected<TokenizerData> ParseTokenizerJson(std::string_view text,
                                           const std::string& path_for_messages) {
  DSLA_ASSIGN_OR_RETURN(TokenizerJson file, ReadTokenizerJson(text, path_for_messages));
  return Reader(std::move(file), path_for_messages).Run();
}

}  // namespace dsla
