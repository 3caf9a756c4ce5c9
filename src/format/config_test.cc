#include "format/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "format/gguf.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using nlohmann::json;

// The published config.json files' fields, where they matter.
json Llama3() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": false, "vocab_size": 128256})");
}
json Mistral() {
  return json::parse(R"({"architectures": ["MistralForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000})");
}
json Qwen2() {
  return json::parse(R"({"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
    "use_sliding_window": false, "vocab_size": 151936})");
}
json Qwen3() {
  return json::parse(R"({"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
    "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
    "use_sliding_window": false, "vocab_size": 151936})");
}

Expected<ModelConfig> Parse(const json& object) { return ParseHfConfig(object.dump(), "c.json"); }

ModelConfig Good(const json& object) {
  auto config = Parse(object);
  EXPECT_TRUE(config.ok()) << config.status().message();
  return config.ok() ? *config : ModelConfig();
}

TEST(HfConfig, Llama) {
  const ModelConfig c = Good(Llama3());
  EXPECT_EQ(c.L, 32);
  EXPECT_EQ(c.C, 4096);
  EXPECT_EQ(c.H, 32);
  EXPECT_EQ(c.Hkv, 8);
  EXPECT_EQ(c.G(), 4);
  EXPECT_EQ(c.D, 128);
  EXPECT_EQ(c.ffn, 14336);
  EXPECT_EQ(c.V, 128256);
  EXPECT_EQ(c.max_position, 131072);
  EXPECT_EQ(c.norm_eps, 1e-5f);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(c.rope.original_max_position, 8192);
  EXPECT_FALSE(c.tied_embeddings || c.qkv_bias || c.o_bias || c.qk_norm);
  EXPECT_EQ(c.sliding_window, 0);
  EXPECT_EQ(c.eos_ids, (std::vector<int32_t>{128001, 128008, 128009}));
  EXPECT_EQ(c.bos_id, 128000);
  json bias = Llama3();
  bias["attention_bias"] = true;
  EXPECT_TRUE(Good(bias).qkv_bias && Good(bias).o_bias);
  json defaults = Llama3();
  for (const char* key : {"num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps"}) {
    defaults.erase(key);
  }
  EXPECT_EQ(Good(defaults).Hkv, 32);
  EXPECT_EQ(Good(defaults).rope.theta, 10000.0);
  EXPECT_EQ(Good(defaults).norm_eps, 1e-6f);
}

TEST(HfConfig, SlidingWindow) {
  EXPECT_EQ(Good(Mistral()).sliding_window, 4096);
  json c = Mistral();
  c.erase("sliding_window");  // the class's default
  EXPECT_EQ(Good(c).sliding_window, 4096);
  c["sliding_window"] = nullptr;
  EXPECT_EQ(Good(c).sliding_window, 0);
  c["sliding_window"] = 32768;  // the whole context
  EXPECT_EQ(Good(c).sliding_window, 0);

  EXPECT_EQ(Good(Qwen2()).sliding_window, 0);
  c = Qwen2();
  c["sliding_window"] = 1024;
  c["use_sliding_window"] = true;
  c["max_window_layers"] = 24;
  EXPECT_EQ(Good(c).sliding_window, 0);
  c["max_window_layers"] = 0;
  EXPECT_EQ(Good(c).sliding_window, 1024);
  c["max_window_layers"] = 21;
  EXPECT_EQ(Parse(c).status().message(),
            "'c.json': sliding window in some layers only (max_window_layers 21 of 24)");
  c["layer_types"] = std::vector<std::string>(24, "full_attention");
  EXPECT_EQ(Good(c).sliding_window, 0);
  c["layer_types"] = std::vector<std::string>(24, "sliding_attention");
  EXPECT_EQ(Good(c).sliding_window, 1024);
  c["layer_types"][3] = "full_attention";
  EXPECT_EQ(Parse(c).status().message(),
            "'c.json': sliding window in some layers only (layer_types)");
  c["layer_types"][3] = "linear_attention";
  EXPECT_EQ(Parse(c).status().message(),
            "'c.json': layer_types other than full_attention and sliding_attention");
  c["layer_types"] = {"full_attention"};
  EXPECT_EQ(Parse(c).status().message(), "'c.json': layer_types is not a list of 24 names");
  c = Llama3();
  c["sliding_window"] = 1024;
  EXPECT_EQ(Parse(c).status().message(),
            "'c.json': sliding_window for LlamaForCausalLM (not supported)");
}

TEST(HfConfig, Qwen) {
  const ModelConfig two = Good(Qwen2());
  EXPECT_TRUE(two.qkv_bias && two.tied_embeddings);
  EXPECT_FALSE(two.o_bias || two.qk_norm);
  EXPECT_EQ(two.D, 64);
  const ModelConfig three = Good(Qwen3());
  EXPECT_TRUE(three.qk_norm && three.tied_embeddings);
  EXPECT_FALSE(three.qkv_bias || three.o_bias);
  EXPECT_EQ(three.D, 128);  // H D = 2048, C = 1024
  EXPECT_EQ(three.rope.theta, 1e6);
  json c = Qwen3();
  c.erase("head_dim");
  EXPECT_EQ(Good(c).D, 128);
}

TEST(HfConfig, RopeSpellings) {
  json c = Llama3();
  c["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  EXPECT_EQ(Good(c).rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(Good(c).rope.factor, 4.0);
  c["rope_scaling"] = {
      {"type", "llama3"}, {"factor", 32.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}};
  EXPECT_EQ(Good(c).rope.original_max_position, 131072);  // falls back to the context
  c["rope_scaling"] = {{"rope_type", "default"}};
  EXPECT_EQ(Good(c).rope.scaling, RopeScaling::kNone);
  c.erase("rope_scaling");
  c.erase("rope_theta");
  c["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 20000.0}, {"factor", 2.0}};
  EXPECT_EQ(Good(c).rope.theta, 20000.0);
  EXPECT_EQ(Good(c).rope.factor, 2.0);
  c["rope_parameters"] = {{"full_attention", {{"rope_type", "default"}}}};
  EXPECT_EQ(Parse(c).status().message(),
            "'c.json': rope_parameters that differ between layers (not supported)");
}

TEST(HfConfig, Refused) {
  struct Case {
    const char* key;
    json value;
    const char* message;
  };
  const Case cases[] = {
      {"auto_map",
       {{"AutoModelForCausalLM", "modeling_x.X"}},
       "the model brings its own code (auto_map), which is never run"},
      {"architectures",
       {"MambaForCausalLM"},
       "unknown architecture 'MambaForCausalLM' (known: LlamaForCausalLM, MistralForCausalLM, "
       "Qwen2ForCausalLM, Qwen3ForCausalLM)"},
      {"architectures", nullptr, "architectures is not a list of one name"},
      {"architectures", json::array(), "architectures is not a list of one name"},
      {"hidden_act", "gelu", "hidden_act 'gelu' (known: silu)"},
      {"mlp_bias", true, "mlp_bias (not supported)"},
      {"mlp_bias", 1, "mlp_bias is neither true nor false"},
      {"quantization_config",
       {{"quant_method", "gptq"}},
       "quantization_config (weights must be F32, F16 or BF16)"},
      {"partial_rotary_factor", 0.5, "partial_rotary_factor 0.5 (not supported)"},
      {"rope_scaling",
       {{"rope_type", "yarn"}, {"factor", 2.0}},
       "RoPE scaling 'yarn' (known: default, linear, llama3)"},
      {"rope_scaling", {{"rope_type", "linear"}}, "no factor"},
      {"rope_scaling",
       {{"rope_type", "linear"}, {"factor", 0.0}},
       "RoPE scaling factor 0 is not a number of at least 1"},
      {"rope_scaling", 8, "rope_scaling is not an object"},
      {"rope_scaling",
       {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}},
       "RoPE scaling needs 0 < low_freq_factor < high_freq_factor, not 4, 4"},
      {"rope_theta", -1, "RoPE base -1 is not a number of at least 1"},
      {"rope_theta", "10000", "rope_theta is not a number"},
      {"num_hidden_layers", 0, "layers is 0, allowed are 1 to 1024"},
      {"num_hidden_layers", 2000, "layers is 2000, allowed are 1 to 1024"},
      {"num_hidden_layers", nullptr, "no num_hidden_layers"},
      {"num_hidden_layers", 1.5,
       "num_hidden_layers is not a whole number between 0 and 1073741824"},
      {"num_hidden_layers", -3, "num_hidden_layers is not a whole number between 0 and 1073741824"},
      {"vocab_size", 1ull << 63, "vocab_size is not a whole number between 0 and 1073741824"},
      {"num_attention_heads", 0, "num_attention_heads is 0"},
      {"num_attention_heads", 31, "hidden_size 4096 is not a multiple of 31 heads"},
      {"num_key_value_heads", 7, "32 attention heads are not a multiple of 7 key-value heads"},
      {"head_dim", 127, "head size 127 is odd"},
      {"rms_norm_eps", 0, "RMS norm epsilon 0 is not between 0 and 1"},
      {"eos_token_id", 128256, "end token 128256 is outside the vocabulary of 128256"},
      {"eos_token_id", "</s>", "eos_token_id is neither a token id nor a list of them"},
      {"bos_token_id", 200000, "start token 200000 is outside the vocabulary of 128256"},
  };
  for (const Case& c : cases) {
    json object = Llama3();
    object[c.key] = c.value;
    const auto config = Parse(object);
    ASSERT_FALSE(config.ok()) << c.message;
    EXPECT_EQ(config.status().message(), std::string("'c.json': ") + c.message);
  }
  EXPECT_EQ(ParseHfConfig("", "c.json").status().message(), "'c.json': malformed JSON at byte 1");
  EXPECT_EQ(ParseHfConfig("[]", "c.json").status().message(), "'c.json': not a JSON object");
  EXPECT_EQ(ParseHfConfig("3", "c.json").status().message(), "'c.json': not a JSON object");
  EXPECT_EQ(ParseHfConfig("{\"a\":1e999}", "c.json").status().message(),
            "'c.json': number out of range at byte 10");
}

TEST(HfConfig, GenerationConfigAddsEndTokens) {
  ModelConfig c = Good(Qwen2());
  ASSERT_TRUE(MergeGenerationConfig(R"({"eos_token_id": [151645, 151643]})", "g.json", &c).ok());
  EXPECT_EQ(c.eos_ids, (std::vector<int32_t>{151645, 151643}));
  EXPECT_EQ(MergeGenerationConfig(R"({"eos_token_id": 151936})", "g.json", &c).message(),
            "'g.json': end token 151936 is outside the vocabulary of 151936");
}

TEST(HfConfig, GenerationConfigAdvisesSampling) {
  const auto given = [](const char* text) {
    ModelConfig c = Good(Qwen2());
    const Status status = MergeGenerationConfig(text, "g.json", &c);
    EXPECT_TRUE(status.ok()) << status.message();
    std::string joined;
    for (const auto& [name, value] : c.sampling.Given())
      joined += fmt::format("{} {} ", name, value);
    return joined;
  };
  EXPECT_EQ(given("{}"), "");
  EXPECT_EQ(given(R"({"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
                      "min_p": null, "repetition_penalty": 1.1, "max_new_tokens": 2048})"),
            "temperature 0.7 top_k 20 top_p 0.8 repetition_penalty 1.1 ");
  EXPECT_EQ(given(R"({"temperature": 0, "min_p": 0.05, "top_k": -1})"),
            "temperature 0 top_k 0 min_p 0.05 ");
  EXPECT_EQ(given(R"({"do_sample": true})"), "temperature 1 ") << "transformers' default";
  EXPECT_EQ(given(R"({"do_sample": false, "temperature": 0.7})"), "temperature 0 ") << "greedy";
}

TEST(HfConfig, BadAdviceIsRefused) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"temperature": -1})", "temperature is -1, not in [0, 100]"},
      {R"({"temperature": "hot"})", "temperature is not a number"},
      {R"({"top_k": 2.5})", "top_k is 2.5, not a whole number"},
      {R"({"top_k": -2})", "top_k is -2, not in [-1, 1073741824]"},
      {R"({"top_p": 0})", "top_p is 0, not in (0, 1]"},
      {R"({"top_p": 1e-60})", "top_p is 1e-60, not in (0, 1]"},
      {R"({"min_p": 1.5})", "min_p is 1.5, not in [0, 1]"},
      {R"({"repetition_penalty": 0})", "repetition_penalty is 0, not in (0, 100]"},
      {R"({"do_sample": 1})", "do_sample is neither true nor false"},
  };
  for (const auto& [text, message] : cases) {
    ModelConfig c = Good(Qwen2());
    EXPECT_EQ(MergeGenerationConfig(text, "g.json", &c).message(),
              std::string("'g.json': ") + message);
  }
}

// What transformers 5 computes in fp32 (theta 500000, D 64, Llama 3.1's scaling).
TEST(Rope, Llama3Frequencies) {
  RopeConfig rope;
  rope.theta = 500000;
  rope.scaling = RopeScaling::kLlama3;
  rope.factor = 8;
  rope.low_freq_factor = 1;
  rope.high_freq_factor = 4;
  rope.original_max_position = 8192;
  const double expected[] = {1.0,
                             0.663601279258728,
                             0.44036662578582764,
                             0.2922278344631195,
                             0.193922758102417,
                             0.12868738174438477,
                             0.08539710193872452,
                             0.05666961893439293,
                             0.03760603070259094,
                             0.02495540864765644,
                             0.016560440883040428,
                             0.010989529080688953,
                             0.00729266507551074,
                             0.00483942124992609,
                             0.0032114461064338684,
                             0.0013718936825171113,
                             0.0005248460220173001,
                             0.0001785077911335975,
                             7.784655463183299e-05,
                             5.165906986803748e-05,
                             3.428102354519069e-05,
                             2.2748929040972143e-05,
                             1.5096217794052791e-05,
                             1.0017868589784484e-05,
                             6.647869668086059e-06,
                             4.411534519022098e-06,
                             2.927499735960737e-06,
                             1.9426925064180978e-06,
                             1.289173155782919e-06,
                             8.554969213037111e-07,
                             5.677088097399974e-07,
                             3.76732259610435e-07};
  const auto frequencies = rope.Frequencies(64);
  ASSERT_EQ(frequencies.size(), std::size(expected));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    EXPECT_NEAR(frequencies[i] / expected[i], 1.0, 5e-7) << i;  // a few roundings of fp32
  }
}

TEST(Rope, OtherFrequencies) {
  RopeConfig rope;
  const auto plain = rope.Frequencies(8);
  ASSERT_EQ(plain.size(), 4u);
  EXPECT_DOUBLE_EQ(plain[0], 1.0);
  EXPECT_DOUBLE_EQ(plain[2], 0.01);
  rope.scaling = RopeScaling::kLinear;
  rope.factor = 4;
  EXPECT_DOUBLE_EQ(rope.Frequencies(8)[2], 0.0025);
  rope.scaling = RopeScaling::kTable;
  rope.divisors = {1, 1, 2, 8};
  EXPECT_DOUBLE_EQ(rope.Frequencies(8)[0], 1.0);
  EXPECT_DOUBLE_EQ(rope.Frequencies(8)[2], 0.005);
}

testing::GgufBuilder TinyGguf(const std::string& architecture) {
  ModelConfig config = testing::TinyConfig(architecture);
  config.qkv_bias = architecture == "qwen2";
  config.qk_norm = architecture == "qwen3";
  return testing::TinyGguf(config, testing::RandomWeights(config, 1));
}

Expected<ModelConfig> ParseBuilder(const testing::GgufBuilder& builder) {
  const std::string bytes = builder.Build();
  const auto file = GgufFile::Parse(std::as_bytes(std::span(bytes)), "x.gguf");
  if (!file.ok()) return file.status();
  return ParseGgufConfig(*file);
}

TEST(GgufConfig, Fields) {
  auto builder = TinyGguf("llama");
  builder.U32("tokenizer.ggml.eos_token_id", 3);
  builder.U32("tokenizer.ggml.eot_token_id", 5);
  builder.U32("tokenizer.ggml.eom_token_id", 3);
  builder.U32("tokenizer.ggml.bos_token_id", 2);
  auto c = ParseBuilder(builder);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->architecture, "llama");
  EXPECT_EQ(c->name, "Tiny");
  EXPECT_EQ(c->V, 16);
  EXPECT_EQ(c->D, 4);
  EXPECT_EQ(c->eos_ids, (std::vector<int32_t>{3, 5}));
  EXPECT_EQ(c->bos_id, 2);
  EXPECT_FALSE(c->tied_embeddings || c->qkv_bias || c->o_bias || c->qk_norm);
  c = ParseBuilder(TinyGguf("qwen2"));
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_TRUE(c->qkv_bias && !c->qk_norm);
  c = ParseBuilder(TinyGguf("qwen3"));
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_TRUE(c->qk_norm && !c->qkv_bias);
  builder = TinyGguf("llama");
  std::erase_if(builder.tensors, [](const auto& t) { return t.name == "output.weight"; });
  builder.Remove("llama.attention.head_count_kv");
  builder.I32s("llama.attention.head_count_kv", {1, 1});
  c = ParseBuilder(builder);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_TRUE(c->tied_embeddings);
  EXPECT_EQ(c->Hkv, 1);
}

TEST(GgufConfig, SamplingAdvice) {
  auto builder = TinyGguf("llama");
  builder.F32("general.sampling.temp", 0.5f);
  builder.U32("general.sampling.top_k", 40);
  builder.F32("general.sampling.top_p", 0.75f);
  builder.F32("general.sampling.min_p", 0.f);
  builder.F32("general.sampling.penalty_repeat", 1.25f);
  const auto c = ParseBuilder(builder);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->sampling.temperature, 0.5);
  EXPECT_EQ(c->sampling.top_k, 40);
  EXPECT_EQ(c->sampling.top_p, 0.75);
  EXPECT_EQ(c->sampling.min_p, 0.0);
  EXPECT_EQ(c->sampling.repetition_penalty, 1.25);
  EXPECT_TRUE(ParseBuilder(TinyGguf("llama"))->sampling.Given().empty());
  builder = TinyGguf("llama");
  builder.F32("general.sampling.top_p", 7);
  EXPECT_EQ(ParseBuilder(builder).status().message(),
            "'x.gguf': general.sampling.top_p is 7, not in (0, 1]");
}

TEST(GgufConfig, RopeAndWindow) {
  auto builder = TinyGguf("llama");
  builder.String("llama.rope.scaling.type", "linear");
  builder.F32("llama.rope.scaling.factor", 4.f);
  builder.U32("llama.attention.sliding_window", 32);
  auto c = ParseBuilder(builder);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(c->rope.factor, 4.0);
  EXPECT_EQ(c->sliding_window, 32);
  builder = TinyGguf("llama");
  builder.F32("llama.rope.scale_linear", 2.f);
  EXPECT_EQ(ParseBuilder(builder)->rope.factor, 2.0);
  builder = TinyGguf("llama");
  builder.tensors.push_back({"rope_freqs.weight", {2}, 0, testing::FloatBytes({1.f, 8.f}), {}});
  c = ParseBuilder(builder);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->rope.scaling, RopeScaling::kTable);
  EXPECT_DOUBLE_EQ(c->rope.Frequencies(4)[1], 0.01 / 8);
}

TEST(GgufConfig, Refused) {
  using Builder = testing::GgufBuilder;
  struct Case {
    void (*spoil)(Builder*);
    const char* message;
  };
  const Case cases[] = {
      {[](Builder* b) { b->Remove("general.architecture"); },
       "no general.architecture in the metadata"},
      {[](Builder* b) {
         b->Remove("general.architecture");
         b->String("general.architecture", "mamba");
       },
       "unknown architecture 'mamba' (known: llama, qwen2, qwen3)"},
      {[](Builder* b) { b->U32("split.count", 3); },
       "one of 3 split files; merge them into one first"},
      {[](Builder* b) { b->U32("llama.expert_count", 8); }, "mixture of 8 experts (not supported)"},
      {[](Builder* b) { b->F32("llama.logit_scale", 8); },
       "metadata 'llama.logit_scale' (not supported)"},
      {[](Builder* b) { b->Bool("llama.attention.causal", false); }, "attention is not causal"},
      {[](Builder* b) { b->Remove("llama.block_count"); }, "no llama.block_count in the metadata"},
      {[](Builder* b) {
         b->Remove("llama.block_count");
         b->U32("llama.block_count", 4000000000);
       },
       "metadata 'llama.block_count' is 4000000000"},
      {[](Builder* b) {
         b->Remove("llama.block_count");
         b->F32("llama.block_count", 2);
       },
       "metadata 'llama.block_count' is not an integer"},
      {[](Builder* b) {
         b->Remove("llama.attention.head_count_kv");
         b->I32s("llama.attention.head_count_kv", {1, 2});
       },
       "metadata 'llama.attention.head_count_kv' differs between layers (not supported)"},
      {[](Builder* b) {
         b->Remove("llama.attention.head_count");
         b->U32("llama.attention.head_count", 0);
       },
       "metadata 'llama.attention.head_count' is 0"},
      {[](Builder* b) {
         b->Remove("llama.attention.value_length");
         b->U32("llama.attention.value_length", 8);
       },
       "keys of 4 and values of 8 channels (not supported)"},
      {[](Builder* b) { b->U32("llama.rope.dimension_count", 2); },
       "RoPE over 2 of 4 channels (not supported)"},
      {[](Builder* b) { b->Find("token_embd.weight")->name = "embd"; },
       "no tensor 'token_embd.weight'"},
      {[](Builder* b) { b->String("llama.rope.scaling.type", "yarn"); },
       "RoPE scaling 'yarn' (known: none, linear, rope_freqs.weight)"},
      {[](Builder* b) {
         b->tensors.push_back({"rope_freqs.weight", {3}, 0, std::string(12, '\0'), {}});
       },
       "tensor 'rope_freqs.weight' has shape [3], expected [2]"},
      {[](Builder* b) {
         b->tensors.push_back({"rope_freqs.weight", {2}, 0, testing::FloatBytes({1, NAN}), {}});
       },
       "RoPE divisor nan is not positive"},
      {[](Builder* b) { b->U32("tokenizer.ggml.eos_token_id", 16); },
       "metadata 'tokenizer.ggml.eos_token_id' is 16, outside the vocabulary of 16"},
  };
  for (const Case& c : cases) {
    auto builder = TinyGguf("llama");
    c.spoil(&builder);
    const auto config = ParseBuilder(builder);
    ASSERT_FALSE(config.ok()) << c.message;
    EXPECT_EQ(config.status().message(), std::string("'x.gguf': ") + c.message);
  }
}

}  // namespace
}  // namespace dsla
