// Token for token, what the `tokenizers` and `sentencepiece` libraries give: see
// tools/tokenizer_oracle.py, which makes the files that this reads.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/mapped_file.h"
#include "format/tokenizer/tokenizer.h"

namespace dsla {
namespace {

const std::string kFolder = DSLA_BINARY_DIR "/tokenizer_oracle/";

std::string Read(const std::string& name) {
  auto text = ReadTextFile(kFolder + name, size_t{1} << 30);
  EXPECT_TRUE(text.ok()) << text.status().message();
  return text.ok() ? std::move(text).value() : std::string();
}

// Little-endian numbers and byte strings, one after another.
class Stream {
 public:
  explicit Stream(std::string data) : data_(std::move(data)) {}
  uint32_t Number(size_t width = 4) {
    uint32_t value = 0;
    std::memcpy(&value, Bytes(width).data(), width);
    return value;
  }
  std::string_view Bytes(size_t n) {
    DSLA_CHECK(n <= data_.size() - pos_);
    pos_ += n;
    return std::string_view(data_).substr(pos_ - n, n);
  }

 private:
  std::string data_;
  size_t pos_ = 0;
};

std::vector<std::string> ReadCorpus(const std::string& name) {
  Stream in(Read(name));
  std::vector<std::string> documents(in.Number());
  for (std::string& document : documents) document = in.Bytes(in.Number());
  return documents;
}

GgufVocab ReadVocab(const std::string& name) {
  const auto j = nlohmann::json::parse(Read(name));
  GgufVocab v;
  v.source = name;
  v.model = j["model"];
  v.pre = j["pre"];
  j["tokens"].get_to(v.tokens);
  if (j.contains("scores")) j["scores"].get_to(v.scores);
  if (j.contains("types")) j["types"].get_to(v.types);
  if (j.contains("merges")) j["merges"].get_to(v.merges);
  const auto set = [&](const char* key, auto* out) {
    if (j.contains(key))
      *out = j[key].get<typename std::remove_pointer_t<decltype(out)>::value_type>();
  };
  set("bos", &v.bos_id);
  set("eos", &v.eos_id);
  set("unk", &v.unk_id);
  set("add_bos", &v.add_bos);
  set("add_space_prefix", &v.add_space_prefix);
  return v;
}

std::string Shown(const Tokenizer& tokenizer, std::span<const int32_t> ids, size_t from) {
  std::string out;
  for (size_t i = from < 3 ? 0 : from - 3; i < std::min(ids.size(), from + 6); ++i) {
    out += fmt::format("{}'{}' ({})", out.empty() ? "" : " ", tokenizer.TokenText(ids[i]), ids[i]);
  }
  return out;
}

struct Case {
  std::string name, kind, vocab, corpus, ids, parse, bos;
};

void Check(const Case& c, const std::vector<std::string>& documents) {
  SCOPED_TRACE(c.name + " from " + c.vocab);
  auto data = c.kind == "json" ? ParseTokenizerJson(Read(c.vocab), c.vocab)
                               : FromGgufVocab(ReadVocab(c.vocab));
  ASSERT_TRUE(data.ok()) << data.status().message();
  auto created = Tokenizer::Create(std::move(data).value());
  ASSERT_TRUE(created.ok()) << created.status().message();
  const Tokenizer& tokenizer = **created;
  EncodeOptions options;
  options.parse_special = c.parse == "1";
  if (c.bos == "none") options.add_bos = false;

  Stream in(Read(c.ids));
  const uint32_t width = in.Number();
  for (size_t d = 0; d < documents.size(); ++d) {
    std::vector<int32_t> want(in.Number());
    for (int32_t& id : want) id = static_cast<int32_t>(in.Number(width));
    const auto got = tokenizer.Encode(documents[d], options);
    ASSERT_TRUE(got.ok()) << got.status().message();
    const auto [a, b] = std::mismatch(got->begin(), got->end(), want.begin(), want.end());
    const auto at = static_cast<size_t>(a - got->begin());
    ASSERT_TRUE(a == got->end() && b == want.end())
        << "document " << d << " of " << documents[d].size() << " bytes differs at token " << at
        << "\n  got  " << Shown(tokenizer, *got, at) << "\n  want " << Shown(tokenizer, want, at);
  }
}

TEST(TokenizerOracleTest, EqualsTheLibraries) {
  std::map<std::string, std::vector<std::string>> corpora;
  for (const char* name : {"corpus.bin", "special.bin"}) corpora[name] = ReadCorpus(name);
  size_t bytes = 0;
  for (const std::string& document : corpora["corpus.bin"]) bytes += document.size();
  EXPECT_GE(bytes, 5'500'000u);

  std::istringstream manifest(Read("manifest.txt"));
  int cases = 0;
  for (Case c; manifest >> c.name >> c.kind >> c.vocab >> c.corpus >> c.ids >> c.parse >> c.bos;
       ++cases) {
    Check(c, corpora[c.corpus]);
  }
  EXPECT_GE(cases, 50);
}

}  // namespace
}  // namespace dsla
