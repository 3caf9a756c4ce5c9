#include "format/model_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/testing/default_model.h"
#include "format/adapter.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using testing::GgufBuilder;
using testing::TempDir;
using testing::Weights;

constexpr uint64_t kSeed = 7;

// The four families by GGUF's and Hugging Face's names of their architecture.
struct Family {
  const char* gguf;
  const char* hf;
  bool tied, qkv_bias, qk_norm;
};
const Family kFamilies[] = {
    {"llama", "LlamaForCausalLM", true, false, false},
    {"llama", "MistralForCausalLM", false, false, false},
    {"qwen2", "Qwen2ForCausalLM", true, true, false},
    {"qwen3", "Qwen3ForCausalLM", false, false, true},
};

ModelConfig FamilyConfig(const Family& family, const char* architecture) {
  ModelConfig config = testing::TinyConfig(architecture);
  config.tied_embeddings = family.tied;
  config.qkv_bias = family.qkv_bias;
  config.qk_norm = family.qk_norm;
  return config;
}

void WriteHf(const TempDir& dir, const ModelConfig& config, const Weights& weights) {
  dir.Write("config.json", testing::TinyConfigJson(config));
  dir.Write("model.safetensors", testing::TinySafetensors(config, weights));
}

void ExpectHolds(const ModelFile& model, const Weights& weights) {
  ASSERT_EQ(model.tensors().size(), weights.size());
  for (const TensorInfo& info : model.tensors()) {
    const std::vector<float>& expected = weights.at(info.name);
    std::vector<float> values(expected.size(), std::nanf(""));
    const Status status = model.Read(info.name, values);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(values, expected) << info.name;
    EXPECT_EQ(model.FindTensor(info.name), &info);
    if (info.shape.size() < 2) continue;
    // The same rows one at a time.
    const auto columns = static_cast<size_t>(info.shape[1]);
    for (int64_t row = 0; row < info.shape[0]; ++row) {
      std::vector<float> one(columns);
      ASSERT_TRUE(model.ReadRows(info.name, row, row + 1, one).ok());
      EXPECT_TRUE(std::equal(one.begin(), one.end(),
                             expected.begin() + row * static_cast<int64_t>(columns)));
    }
  }
}

TEST(ModelFile, EveryFamilyReadsTheSameFromBothFormats) {
  for (const Family& family : kFamilies) {
    const ModelConfig config = FamilyConfig(family, family.hf);
    const Weights weights = testing::RandomWeights(config, kSeed);
    const TempDir dir;
    WriteHf(dir, config, weights);
    const auto hf = ModelFile::Open(dir.path());
    ASSERT_TRUE(hf.ok()) << hf.status().message();
    EXPECT_STREQ((*hf)->format(), "safetensors");
    ExpectHolds(**hf, weights);

    const std::string path = dir.Write(
        "tiny.gguf", testing::TinyGguf(FamilyConfig(family, family.gguf), weights).Build());
    const auto gguf = ModelFile::Open(path);
    ASSERT_TRUE(gguf.ok()) << gguf.status().message();
    EXPECT_STREQ((*gguf)->format(), "GGUF v3");
    ExpectHolds(**gguf, weights);
    EXPECT_EQ((*gguf)->config().tied_embeddings, family.tied);
  }
}

TEST(ModelFile, BiasesOfLlamaArePermutedToo) {
  ModelConfig config = testing::TinyConfig("llama");
  config.qkv_bias = config.o_bias = true;
  const Weights weights = testing::RandomWeights(config, kSeed);
  const TempDir dir;
  const auto model =
      ModelFile::Open(dir.Write("tiny.gguf", testing::TinyGguf(config, weights).Build()));
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_TRUE((*model)->config().qkv_bias && (*model)->config().o_bias);
  ExpectHolds(**model, weights);
}

TEST(ModelFile, NameAndTokens) {
  const ModelConfig config = testing::TinyConfig("LlamaForCausalLM");
  const TempDir dir;
  WriteHf(dir, config, testing::RandomWeights(config, kSeed));
  dir.Write("generation_config.json", R"({"eos_token_id": [3, 4], "bos_token_id": 1})");
  dir.Write("tokenizer_config.json",
            R"({"chat_template": [{"name": "tools", "template": "t"},
                                  {"name": "default", "template": "d"},
                                  {"name": "tool_use", "template": "u"}]})");
  auto model = ModelFile::Open(dir.path() + "/");
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ((*model)->config().eos_ids, (std::vector<int32_t>{3, 4}));
  EXPECT_EQ((*model)->config().bos_id, 1);
  EXPECT_EQ((*model)->config().name, dir.path().substr(dir.path().find_last_of('/') + 1));
  EXPECT_EQ((*model)->chat_template(), "d");
  EXPECT_EQ((*model)->tool_chat_template(), "u");
  dir.Write("tokenizer_config.json", R"({"chat_template": "s"})");
  EXPECT_EQ((*ModelFile::Open(dir.path()))->chat_template(), "s");
  EXPECT_EQ((*ModelFile::Open(dir.path()))->tool_chat_template(), "s") << "there is no other";
  dir.Write("chat_template.jinja", "{{ j }}");
  EXPECT_EQ((*ModelFile::Open(dir.path()))->chat_template(), "{{ j }}");
}

TEST(ModelFile, GgufChatTemplateAndVocabulary) {
  const ModelConfig config = testing::TinyConfig("llama");
  GgufBuilder builder = testing::TinyGguf(config, testing::RandomWeights(config, kSeed));
  builder.String("tokenizer.chat_template", "{{ x }}");
  builder.String("tokenizer.chat_template.tool_use", "{{ u }}");
  const TempDir dir;
  const auto model = ModelFile::Open(dir.Write("tiny.gguf", builder.Build()));
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ((*model)->chat_template(), "{{ x }}");
  EXPECT_EQ((*model)->tool_chat_template(), "{{ u }}");
  const auto data = (*model)->ReadTokenizer();
  ASSERT_TRUE(data.ok()) << data.status().message();
  ASSERT_EQ(data->tokens.size(), 16u);
  EXPECT_EQ(data->tokens[2], "ab");
  ASSERT_EQ(data->merges.size(), 1u);
  EXPECT_EQ(data->merges[0].second, "b");
}

TEST(ModelFile, TokenizerLargerThanTheVocabularyIsRefused) {
  const ModelConfig config = testing::TinyConfig("llama");
  GgufBuilder builder = testing::TinyGguf(config, testing::RandomWeights(config, kSeed));
  builder.Remove("tokenizer.ggml.tokens");
  builder.Remove("tokenizer.ggml.token_type");
  std::vector<std::string> tokens = {"a", "b", "ab"};
  while (tokens.size() < 17) tokens.push_back(std::string(tokens.size(), 'c'));
  builder.Strings("tokenizer.ggml.tokens", tokens);
  const TempDir dir;
  const std::string path = dir.Write("tiny.gguf", builder.Build());
  const auto model = ModelFile::Open(path);
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ((*model)->ReadTokenizer().status().message(),
            "'" + path + "': the tokenizer has 17 tokens, the model's vocabulary 16");
}

TEST(ModelFile, Shards) {
  const ModelConfig config = testing::TinyConfig("LlamaForCausalLM");
  const Weights weights = testing::RandomWeights(config, kSeed);
  std::vector<std::string> names[2];
  nlohmann::json map;
  for (const auto& [name, shape] : RequiredTensors(config)) {
    const size_t shard = names[0].size() <= names[1].size() ? 0 : 1;
    names[shard].push_back(name);
    map[name] = shard == 0 ? "a.safetensors" : "b.safetensors";
  }
  const TempDir dir;
  dir.Write("config.json", testing::TinyConfigJson(config));
  dir.Write("a.safetensors", testing::TinySafetensors(config, weights, &names[0]));
  dir.Write("b.safetensors", testing::TinySafetensors(config, weights, &names[1]));
  const auto index = [&](const nlohmann::json& weight_map) {
    return dir.Write("model.safetensors.index.json",
                     nlohmann::json{{"metadata", {}}, {"weight_map", weight_map}}.dump());
  };
  const std::string path = index(map);
  const auto model = ModelFile::Open(dir.path());
  ASSERT_TRUE(model.ok()) << model.status().message();
  ExpectHolds(**model, weights);
  const auto message = [&] { return ModelFile::Open(dir.path()).status().message(); };

  for (const char* bad : {"../a.safetensors", "/etc/passwd", "", ".hidden", "sub/a.safetensors"}) {
    nlohmann::json lying = map;
    lying["lm_head.weight"] = bad;
    index(lying);
    EXPECT_EQ(message(), "'" + path + "': tensor 'lm_head.weight' is in '" + bad +
                             "', which is not the name of a file beside it");
  }
  nlohmann::json lying = map;
  lying.erase("model.norm.weight");
  index(lying);
  const std::string file = map["model.norm.weight"].get<std::string>();
  EXPECT_EQ(message(),
            "'" + dir.path() + "/" + file +
                "': tensor 'model.norm.weight' is not listed in the index for this file");
  lying = map;
  lying["x"] = "a.safetensors";
  index(lying);
  EXPECT_EQ(message(), "'" + dir.path() + "/a.safetensors': tensor 'x' of the index is missing");
  lying["x"] = "c.safetensors";
  index(lying);
  EXPECT_EQ(message(), "cannot open '" + dir.path() + "/c.safetensors': No such file or directory");
  dir.Write("model.safetensors.index.json", "{}");
  EXPECT_EQ(message(), "'" + path + "': no weight_map");
}

TEST(ModelFile, BadGguf) {
  struct Case {
    void (*spoil)(GgufBuilder*);
    const char* message;
  };
  const Case cases[] = {
      {[](GgufBuilder* b) { b->Find("blk.1.attn_k.weight")->name = "blk.1.attn_kk.weight"; },
       "tensor 'blk.1.attn_k.weight' is missing"},
      {[](GgufBuilder* b) {
         b->tensors.push_back({"blk.2.attn_norm.weight", {8}, 0, std::string(32, '\0'), {}});
       },
       "unexpected tensor 'blk.2.attn_norm.weight' for architecture llama"},
      {[](GgufBuilder* b) {
         b->Find("blk.0.ffn_up.weight")->shape = {8, 12};
       },
       "tensor 'blk.0.ffn_up.weight' has shape [8, 12], expected [12, 8]"},
      {[](GgufBuilder* b) {
         b->Find("token_embd.weight")->shape = {8, 16};
       },
       "tensor 'token_embd.weight' has shape [8, 16], expected [8, 8]"},
      {[](GgufBuilder* b) {
         b->Find("output_norm.weight")->shape = {8, 1};
       },
       "tensor 'output_norm.weight' has shape [8, 1], expected [8]"},
      {[](GgufBuilder* b) { b->U32("llama.vocab_size", 17); },
       "tensor 'token_embd.weight' has shape [16, 8], expected [17, 8]"},
  };
  const ModelConfig config = testing::TinyConfig("llama");
  const Weights weights = testing::RandomWeights(config, kSeed);
  for (const Case& c : cases) {
    GgufBuilder builder = testing::TinyGguf(config, weights);
    c.spoil(&builder);
    const TempDir dir;
    const std::string path = dir.Write("tiny.gguf", builder.Build());
    const auto model = ModelFile::Open(path);
    ASSERT_FALSE(model.ok()) << c.message;
    EXPECT_EQ(model.status().message(), "'" + path + "': " + c.message);
  }
}

TEST(ModelFile, NanAndInfWeightsAreRefusedWhenRead) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const ModelConfig config = testing::TinyConfig("llama");
    Weights weights = testing::RandomWeights(config, kSeed);
    weights["model.layers.1.self_attn.q_proj.weight"].back() = bad;
    const TempDir dir;
    const std::string path = dir.Write("tiny.gguf", testing::TinyGguf(config, weights).Build());
    const auto model = ModelFile::Open(path);
    ASSERT_TRUE(model.ok()) << model.status().message();
    std::vector<float> values(64);
    EXPECT_EQ((*model)->Read("model.layers.1.self_attn.q_proj.weight", values).message(),
              "'" + path + "': tensor 'blk.1.attn_q.weight' holds NaN or Inf");
    EXPECT_TRUE((*model)->Read("model.layers.0.self_attn.q_proj.weight", values).ok());
    EXPECT_EQ((*model)->Read("model.layers.9.x", values).message(),
              "'" + path + "': no tensor 'model.layers.9.x'");
  }
}

TEST(ModelFile, BadHfDirectories) {
  const ModelConfig config = testing::TinyConfig("LlamaForCausalLM");
  const Weights weights = testing::RandomWeights(config, kSeed);
  const TempDir dir;
  const auto message = [&] { return ModelFile::Open(dir.path()).status().message(); };
  const std::string at = "'" + dir.path();
  EXPECT_EQ(message(), at + "': no config.json in the directory");
  dir.Write("config.json", testing::TinyConfigJson(config));
  EXPECT_EQ(message(), at + "': no model.safetensors and no model.safetensors.index.json");
  dir.Write("model.safetensors", "");
  EXPECT_EQ(message(), at + "/model.safetensors': 0 bytes are too few for a safetensors file");
  dir.Write(
      "model.safetensors",
      testing::SafetensorsBytes(
          R"({"model.norm.weight":{"dtype":"I8","shape":[8],"data_offsets":[0,8]}})", "12345678"));
  EXPECT_EQ(message(), at +
                           "/model.safetensors': tensor 'model.norm.weight' is I8 (supported: F32, "
                           "F16, BF16)");
  const std::vector<std::string> some = {"model.embed_tokens.weight"};
  dir.Write("model.safetensors", testing::TinySafetensors(config, weights, &some));
  EXPECT_EQ(message(), at + "': tensor 'model.layers.0.input_layernorm.weight' is missing");
  ModelConfig tied = config;
  tied.tied_embeddings = true;  // a copy of the embedding as lm_head.weight does no harm
  WriteHf(dir, config, weights);
  dir.Write("config.json", testing::TinyConfigJson(tied));
  EXPECT_EQ(message(), "");
  ModelConfig shallow = config;
  shallow.L = 1;
  dir.Write("config.json", testing::TinyConfigJson(shallow));
  EXPECT_EQ(message(), at + "': unexpected tensor 'model.layers.1.input_layernorm.weight' for "
                            "architecture LlamaForCausalLM");
  dir.Write("config.json", testing::TinyConfigJson(config));
  dir.Write("generation_config.json", "{");
  EXPECT_EQ(message(), at + "/generation_config.json': malformed JSON at byte 2");
  std::filesystem::remove(dir.path() + "/generation_config.json");
  EXPECT_EQ((*ModelFile::Open(dir.path()))->ReadTokenizer().status().message(),
            "cannot open '" + dir.path() + "/tokenizer.json': No such file or directory");
  dir.Write("tokenizer_config.json", R"({"chat_template": 3})");
  EXPECT_EQ(message(), at + "/tokenizer_config.json': chat_template is not a string");
}

TEST(ModelFile, UnreadablePaths) {
  EXPECT_EQ(ModelFile::Open("/nonexistent").status().message(),
            "cannot open '/nonexistent': No such file or directory");
  EXPECT_EQ(ModelFile::Open("/dev/null").status().message(),
            "'/dev/null' is neither a file nor a directory");
  EXPECT_EQ(ModelFile::Open("").status().message(), "cannot open '': No such file or directory");
  EXPECT_EQ(
      ModelFile::Open("meta-llama/Llama-3.2-1B").status().message(),
      "cannot open 'meta-llama/Llama-3.2-1B': No such file or directory (models are read from "
      "files, none is downloaded)");
  const TempDir model;
  model.Write("config.json", "{}");
  for (const std::string name : {"config.json", "model-00001-of-00002.safetensors"}) {
    const std::string part = model.Write(name, "{}");
    EXPECT_EQ(ModelFile::Open(part).status().message(),
              "'" + part + "' is one file of a Hugging Face model: its directory is the model");
  }
  const TempDir dir;
  const std::string path = dir.Write("text.gguf", "hello, this is no model");
  EXPECT_EQ(ModelFile::Open(path).status().message(),
            "'" + path + "': not a GGUF file (it does not begin with 'GGUF')");
  EXPECT_EQ(ModelFile::Open(dir.Write("empty.gguf", "")).status().message(),
            "'" + dir.path() + "/empty.gguf': not a GGUF file (it does not begin with 'GGUF')");
  if (::geteuid() != 0) {  // root may read everything
    std::filesystem::permissions(path, std::filesystem::perms::none);
    EXPECT_EQ(ModelFile::Open(path).status().message(),
              "cannot open '" + path + "': Permission denied");
  }
}

TEST(ModelFile, FingerprintSeesConfigAndWeights) {
  const ModelConfig config = testing::TinyConfig("llama");
  const Weights weights = testing::RandomWeights(config, kSeed);
  const auto fingerprint = [&](const GgufBuilder& builder) {
    const TempDir dir;
    const auto model = ModelFile::Open(dir.Write("tiny.gguf", builder.Build()));
    EXPECT_TRUE(model.ok()) << model.status().message();
    return *(*model)->Fingerprint();
  };
  const GgufBuilder builder = testing::TinyGguf(config, weights);
  const std::string base = fingerprint(builder);
  EXPECT_EQ(base.size(), 64u);
  EXPECT_EQ(fingerprint(builder), base);

  GgufBuilder same = builder;  // neither name, tokens nor order change the computation
  same.Remove("general.name");
  same.U32("tokenizer.ggml.eos_token_id", 3);
  std::reverse(same.tensors.begin(), same.tensors.end());
  EXPECT_EQ(fingerprint(same), base);

  GgufBuilder theta = builder;
  theta.Remove("llama.rope.freq_base");
  theta.F32("llama.rope.freq_base", 20000.f);
  EXPECT_NE(fingerprint(theta), base);
  for (const auto& tensor : builder.tensors) {
    GgufBuilder changed = builder;
    changed.Find(tensor.name)->data.back() ^= 1;
    EXPECT_NE(fingerprint(changed), base) << tensor.name;
  }
}

TEST(ModelFile, FingerprintSamplesLargeTensors) {
  ModelConfig config = testing::TinyConfig("llama");
  config.tied_embeddings = true;
  config.V = 4096;  // the embedding has 128 KiB: 16 blocks of 4 KiB are looked at
  const Weights weights = testing::RandomWeights(config, kSeed);
  GgufBuilder builder = testing::TinyGguf(config, weights);
  const auto fingerprint = [&] {
    const TempDir dir;
    return *(*ModelFile::Open(dir.Write("tiny.gguf", builder.Build())))->Fingerprint();
  };
  const std::string base = fingerprint();
  std::string& data = builder.Find("token_embd.weight")->data;
  ASSERT_EQ(data.size(), 131072u);
  const size_t second = (131072 - 4096) / 15;
  for (const size_t at :
       {size_t{0}, size_t{4095}, second, second + 4095, data.size() - 4096, data.size() - 1}) {
    data[at] ^= 1;
    EXPECT_NE(fingerprint(), base) << at;
    data[at] ^= 1;
  }
  for (const size_t at : {size_t{4096}, second - 1, second + 4096, data.size() - 4097}) {
    data[at] ^= 1;
    EXPECT_EQ(fingerprint(), base) << at;
    data[at] ^= 1;
  }
}

// The shipped adapter and the default model belong together. Skipped where the model's package is
// not installed.
TEST(ModelFile, ShippedAdapterFitsTheDefaultModel) {
  const std::string path = testing_base::DefaultModelFile(DSLA_SOURCE_DIR);
  if (path.empty()) GTEST_SKIP() << "the default model is not installed";
  const auto model = ModelFile::Open(path);
  ASSERT_TRUE(model.ok()) << model.status().message();
  const ModelConfig& c = (*model)->config();
  EXPECT_EQ(c.L, 30);
  EXPECT_EQ(c.C, 576);
  EXPECT_EQ(c.H, 9);
  EXPECT_EQ(c.Hkv, 3);
  EXPECT_EQ(c.D, 64);
  EXPECT_EQ(c.V, 49152);
  EXPECT_EQ(c.max_position, 8192);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ(c.eos_ids, (std::vector<int32_t>{2}));
  const auto adapter = Adapter::Open(
      std::string(DSLA_SOURCE_DIR) + "/models/smollm2-135m-instruct.dsla.safetensors", c);
  ASSERT_TRUE(adapter.ok()) << adapter.status().message();
  const Status fits = (*adapter)->CheckBase(*(*model)->Fingerprint(), path);
  EXPECT_TRUE(fits.ok()) << fits.message();
  EXPECT_EQ((*adapter)->top_level, 22);
  EXPECT_EQ((*adapter)->ladder[0], 29);
  EXPECT_EQ((*adapter)->layers[29].window, 332);
}

// A config alone gives a model of random numbers: of its shapes, the same each time however it is
// cut, and of a scale that keeps activations in range.
TEST(RandomModelTest, HasTheConfigsShapesAndStaysTheSame) {
  const std::string folder = std::string(DSLA_SOURCE_DIR) + "/tests/data/models/smollm2";
  auto model = ModelFile::OpenRandom(folder);
  ASSERT_TRUE(model.ok()) << model.status().message();
  const ModelConfig& c = (*model)->config();
  for (const auto& [name, shape] : RequiredTensors(c)) {
    const TensorInfo* info = (*model)->FindTensor(name);
    ASSERT_NE(info, nullptr) << name;
    EXPECT_EQ(info->shape, shape) << name;
  }
  const std::string name = LayerTensorName(0, "mlp.gate_proj.weight");
  std::vector<float> whole(static_cast<size_t>(c.ffn) * c.C), part(whole.size() / c.ffn);
  ASSERT_TRUE((*model)->Read(name, whole).ok());
  ASSERT_TRUE((*model)->ReadRows(name, 3, 4, part).ok());
  EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + 3 * c.C));
  double squares = 0;
  for (const float x : whole) squares += double{x} * x;
  EXPECT_NEAR(squares / static_cast<double>(whole.size()) * c.C, 1, 0.1);
  std::vector<float> norm(static_cast<size_t>(c.C));
  ASSERT_TRUE((*model)->Read("model.norm.weight", norm).ok());
  EXPECT_EQ(norm, std::vector<float>(norm.size(), 1.f));
  EXPECT_EQ((*model)->Read("nothing", norm).code(), StatusCode::kNotFound);
  EXPECT_EQ((*model)->ReadTokenizer().status().code(), StatusCode::kNotFound);
  EXPECT_EQ(ModelFile::OpenRandom("/nowhere/config.json").status().code(), StatusCode::kNotFound);
  (*model)->ReleasePages();

  const auto adapter = RandomAdapter(c, {.features = c.D, .window = 16, .sinks = 2, .rank = 4});
  const TempDir folder_of_adapter;
  const std::string path = folder_of_adapter.path() + "/random.dsla.safetensors";
  Adapter bound = *adapter;
  bound.base_fingerprint = *(*model)->Fingerprint();
  ASSERT_TRUE(SaveAdapter(bound, path).ok());
  const auto again = Adapter::Open(path, c);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ((*again)->layers[0].phi_q, adapter->layers[0].phi_q);
}

}  // namespace
}  // namespace dsla
