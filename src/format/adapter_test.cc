#include "format/adapter.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "base/half.h"
#include "format/adapter_layout.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using nlohmann::json;
using testing::TempDir;

constexpr uint64_t kSeed = 11;

AdapterLayer RandomLayer(const ModelConfig& base, AdapterLayer layer, std::mt19937_64* random) {
  std::normal_distribution<float> normal;
  for (const AdapterTensor& tensor : AdapterTensors(layer, {base.C, base.H, base.Hkv, base.D})) {
    size_t n = 1;
    for (const int64_t size : tensor.shape) n *= static_cast<size_t>(size);
    std::vector<float>& values = layer.*tensor.values;
    values.resize(n);
    for (float& value : values) value = normal(*random);
  }
  return layer;
}

AdapterLayer Settings(int features, int states, int window, int sinks, int rank, float floor) {
  AdapterLayer layer;
  layer.features = features;
  layer.states = states;
  layer.window = window;
  layer.sinks = sinks;
  layer.rank = rank;
  layer.gate_floor = floor;
  return layer;
}

Adapter RandomAdapter(const ModelConfig& base, const std::vector<AdapterLayer>& settings) {
  std::mt19937_64 random(kSeed);
  Adapter adapter;
  adapter.base_fingerprint = std::string(64, 'a');
  adapter.base_name = "tiny";
  for (int l = base.L - 1; l >= 0; --l) adapter.ladder.push_back(l);
  adapter.top_level = 1;
  for (const AdapterLayer& layer : settings) {
    adapter.layers.push_back(RandomLayer(base, layer, &random));
  }
  return adapter;
}

Adapter Plain(const ModelConfig& base) {
  const AdapterLayer layer = Settings(8, 2, 16, 4, 2, -2.25f);
  return RandomAdapter(base, {layer, layer});
}

void ExpectSame(const Adapter& a, const Adapter& b) {
  EXPECT_EQ(a.base_fingerprint, b.base_fingerprint);
  EXPECT_EQ(a.base_name, b.base_name);
  EXPECT_EQ(a.ladder, b.ladder);
  EXPECT_EQ(a.top_level, b.top_level);
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t l = 0; l < a.layers.size(); ++l) {
    const AdapterLayer &x = a.layers[l], &y = b.layers[l];
    EXPECT_EQ(x.features, y.features);
    EXPECT_EQ(x.states, y.states);
    EXPECT_EQ(x.window, y.window);
    EXPECT_EQ(x.sinks, y.sinks);
    EXPECT_EQ(x.rank, y.rank);
    EXPECT_EQ(x.gate_floor, y.gate_floor);
    EXPECT_EQ(x.q_a, y.q_a);
    EXPECT_EQ(x.q_b, y.q_b);
    EXPECT_EQ(x.o_a, y.o_a);
    EXPECT_EQ(x.o_b, y.o_b);
    EXPECT_EQ(x.phi_q, y.phi_q);
    EXPECT_EQ(x.phi_k, y.phi_k);
    EXPECT_EQ(x.gate_weight, y.gate_weight);
    EXPECT_EQ(x.gate_bias, y.gate_bias);
    EXPECT_EQ(x.mix, y.mix);
    EXPECT_EQ(x.claim, y.claim);
    EXPECT_EQ(x.claim_bias, y.claim_bias);
  }
}

TEST(Adapter, RoundTrip) {
  const ModelConfig base = testing::TinyConfig("llama");
  const std::vector<std::vector<AdapterLayer>> settings = {
      {Settings(8, 2, 16, 4, 2, -2.25f), Settings(8, 2, 16, 4, 2, -2.25f)},
      // W = 0, a single state, F = D, no low-rank deltas, a floor that fp32 rounds.
      {Settings(4, 1, 0, 0, 0, -2.3f), Settings(4, 1, 0, 0, 0, -2.3f)},
      // Every setting of its own in the second layer.
      {Settings(8, 2, 16, 4, 2, -2.25f), Settings(4, 1, 32, 0, 3, -2.1f)},
      {Settings(4, 2, 0, 0, 0, -2.25f), Settings(4, 2, 8, 0, 0, -2.25f)},
  };
  const TempDir dir;
  const std::string path = dir.path() + "/a.dsla.safetensors";
  for (const auto& layers : settings) {
    const Adapter adapter = RandomAdapter(base, layers);
    const Status saved = SaveAdapter(adapter, path);
    ASSERT_TRUE(saved.ok()) << saved.message();
    const auto loaded = Adapter::Open(path, base);
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    ExpectSame(adapter, **loaded);
    EXPECT_EQ((*loaded)->id.size(), 16u);
    // bf16 loses what it must, once.
    ASSERT_TRUE(SaveAdapter(adapter, path, DType::kBF16).ok());
    const auto rounded = Adapter::Open(path, base);
    ASSERT_TRUE(rounded.ok()) << rounded.status().message();
    EXPECT_EQ((*rounded)->layers[1].phi_q[3], ToFloat(ToBf16(adapter.layers[1].phi_q[3])));
    EXPECT_NE((*rounded)->id, (*loaded)->id);
  }
  // Nothing but the adapter is left in the directory.
  const auto files = std::filesystem::directory_iterator(dir.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
}

TEST(Adapter, BelongsToOneModel) {
  Adapter adapter;
  adapter.base_name = "tiny";
  adapter.base_fingerprint = std::string(64, 'a');
  EXPECT_TRUE(adapter.CheckBase(std::string(64, 'a'), "m.gguf").ok());
  const Status status = adapter.CheckBase("0123456789abcdef" + std::string(48, 'a'), "m.gguf");
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "the adapter belongs to another model: tiny (fingerprint aaaaaaaaaaaaaaaa), not "
            "'m.gguf' (fingerprint 0123456789abcdef)");
}

// A file in parts: metadata, and tensors by name.
struct Parts {
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::pair<std::vector<int64_t>, std::vector<float>>> tensors;
  std::string dtype = "F32";

  std::string Build() const {
    json header = json::object();
    header["__metadata__"] = metadata;
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      const size_t begin = data.size();
      data += testing::FloatBytes(tensor.second);
      header[name] = {
          {"dtype", dtype}, {"shape", tensor.first}, {"data_offsets", {begin, data.size()}}};
    }
    return testing::SafetensorsBytes(header.dump(), data);
  }
};

Parts PlainParts(const ModelConfig& base) {
  const Adapter adapter = Plain(base);
  Parts parts;
  parts.metadata = {{"format", "dsla-adapter"},
                    {"version", "1"},
                    {"base_fingerprint", std::string(64, 'a')},
                    {"base_name", "tiny"},
                    {"ladder", "[1,0]"},
                    {"top_level", "1"},
                    {"window", "16"},
                    {"sinks", "4"},
                    {"states", "2"},
                    {"features", "8"},
                    {"rank", "2"},
                    {"gate_floor", "-2.25"},
                    {"gate_divisor", "16"},
                    {"feature_map", "softmax-pair"}};
  for (int l = 0; l < base.L; ++l) {
    const AdapterLayer& layer = adapter.layers[static_cast<size_t>(l)];
    for (const AdapterTensor& tensor : AdapterTensors(layer, {base.C, base.H, base.Hkv, base.D})) {
      parts.tensors["layers." + std::to_string(l) + "." + tensor.suffix] = {tensor.shape,
                                                                            layer.*tensor.values};
    }
  }
  return parts;
}

TEST(Adapter, ReadsWhatTheDocumentSays) {
  const ModelConfig base = testing::TinyConfig("llama");
  const std::string bytes = PlainParts(base).Build();
  const auto adapter = ParseAdapter(std::as_bytes(std::span(bytes)), "a", base);
  ASSERT_TRUE(adapter.ok()) << adapter.status().message();
  ExpectSame(Plain(base), **adapter);
}

TEST(Adapter, BadFiles) {
  struct Case {
    std::function<void(Parts*)> spoil;
    const char* message;
    StatusCode code = StatusCode::kDataLoss;
  };
  const auto set = [](const char* key, const char* value) {
    return [=](Parts* p) { p->metadata[key] = value; };
  };
  const auto layers = [](const char* value) {
    return [=](Parts* p) { p->metadata["layers"] = value; };
  };
  const Case cases[] = {
      {[](Parts* p) { p->metadata.erase("format"); },
       "not an adapter (its metadata has no format 'dsla-adapter')"},
      {set("version", "2"), "adapter format version 2, this build reads 1",
       StatusCode::kUnsupported},
      {set("version", "1.0"), "version '1.0' is not a number"},
      {set("version", ""), "version '' is not a number"},
      {set("gate_divisor", "8"), "gate_divisor 8, known is 16", StatusCode::kUnsupported},
      {set("feature_map", "relu"), "feature_map 'relu', known is 'softmax-pair'",
       StatusCode::kUnsupported},
      {set("base_fingerprint", "abc"), "base_fingerprint is not a SHA-256 digest"},
      {[](Parts* p) { p->metadata.erase("base_name"); }, "no base_name in the metadata"},
      {set("ladder", "[1,0"), "malformed JSON at byte 5"},
      {set("ladder", "{}"), "ladder is not a list"},
      {set("ladder", "[1,-1]"), "ladder is not a list of layer numbers"},
      {set("ladder", "[[1],0]"), "JSON nested deeper than 1 levels"},
      {set("ladder", "[0]"), "a ladder of 1 layers for a model of 2"},
      {set("ladder", "[0,2]"), "the ladder names layer 2 of 2"},
      {set("ladder", "[1,1]"), "the ladder names layer 1 twice"},
      {set("top_level", "3"), "top level 3, allowed are 0 to 2"},
      {set("top_level", "-1"), "top level -1, allowed are 0 to 2"},
      {set("window", "0"), "4 sinks without a window"},
      {set("window", "-1"), "window -1, allowed are 0 to 65536"},
      {set("window", "99999999999999999999"), "window '99999999999999999999' is not a number"},
      {set("sinks", "2000"), "2000 sinks, allowed are 0 to 1024"},
      {set("states", "3"), "3 states, allowed are 1 and 2"},
      {set("features", "6"), "6 features, allowed are 4 and 8 (the head size and twice that)"},
      {set("rank", "-1"), "rank -1, allowed are 0 to 32768"},
      {set("gate_floor", "-2.6"), "gate floor -2.6, allowed are -2.5 to below 0"},
      {set("gate_floor", "0"), "gate floor 0, allowed are -2.5 to below 0"},
      {set("gate_floor", "nan"), "gate floor nan, allowed are -2.5 to below 0"},
      {set("gate_floor", "x"), "gate_floor 'x' is not a number"},
      {layers("[]"), "layers is not an object"},
      {layers(R"({"2":{}})"), "layers names layer '2' of 2"},
      {layers(R"({"x":{}})"), "layers names layer 'x' of 2"},
      {layers(R"({"1":[]})"), "layer 1: not an object"},
      {layers(R"({"1":{"depth":3}})"), "layer 1: unknown setting 'depth'"},
      {layers(R"({"1":{"window":-3}})"), "layer 1: window is not a number that it may be"},
      {layers(R"({"1":{"gate_floor":"x"}})"), "layer 1: gate_floor is not a number that it may be"},
      {layers(R"({"1":{"gate_floor":-3}})"), "layer 1: gate floor -3, allowed are -2.5 to below 0"},
      {layers(R"({"1":{"window":0}})"), "layer 1: 4 sinks without a window"},
      {layers(R"({"1":{"window":0,"sinks":0}})"), "unexpected tensor 'layers.1.claim'"},
      {layers(R"({"1":{"states":1}})"),
       "tensor 'layers.1.gate_weight' has shape [2, 1, 4, 8], the model needs [1, 1, 4, 8]"},
      {set("note", "x"), "unknown key 'note'"},
      {[](Parts* p) { p->tensors.erase("layers.1.mix"); }, "tensor 'layers.1.mix' is missing"},
      {[](Parts* p) { p->tensors["layers.2.mix"] = p->tensors["layers.1.mix"]; },
       "unexpected tensor 'layers.2.mix'"},
      {[](Parts* p) {
         p->tensors["layers.0.q_a"].first = {8, 2};
       },
       "tensor 'layers.0.q_a' has shape [8, 2], the model needs [2, 8]"},
      {[](Parts* p) {
         p->tensors["layers.0.phi_k"].second[3] = std::numeric_limits<float>::quiet_NaN();
       },
       "tensor 'layers.0.phi_k' holds NaN or Inf"},
      {[](Parts* p) { p->dtype = "I32"; }, "tensor 'layers.0.q_a' is I32 (supported: F32, BF16)",
       StatusCode::kUnsupported},
  };
  const ModelConfig base = testing::TinyConfig("llama");
  for (const Case& c : cases) {
    Parts parts = PlainParts(base);
    c.spoil(&parts);
    const std::string bytes = parts.Build();
    const auto adapter = ParseAdapter(std::as_bytes(std::span(bytes)), "a.st", base);
    ASSERT_FALSE(adapter.ok()) << c.message;
    EXPECT_EQ(adapter.status().message(), std::string("'a.st': ") + c.message);
    EXPECT_EQ(adapter.status().code(), c.code) << c.message;
  }
}

TEST(Adapter, MadeForOtherDimensions) {
  const ModelConfig base = testing::TinyConfig("llama");
  const std::string bytes = PlainParts(base).Build();
  ModelConfig wide = base;
  wide.C = 16;
  EXPECT_EQ(ParseAdapter(std::as_bytes(std::span(bytes)), "a.st", wide).status().message(),
            "'a.st': tensor 'layers.0.q_a' has shape [2, 8], the model needs [2, 16]");
  ModelConfig deep = base;
  deep.L = 3;
  EXPECT_EQ(ParseAdapter(std::as_bytes(std::span(bytes)), "a.st", deep).status().message(),
            "'a.st': a ladder of 2 layers for a model of 3");
}

TEST(Adapter, SaveRefusesWhatOpenWould) {
  struct Case {
    void (*spoil)(Adapter*);
    const char* message;
  };
  const Case cases[] = {
      {[](Adapter* a) { a->layers.clear(); }, "no layers"},
      {[](Adapter* a) {
         a->ladder = {0, 0};
       },
       "the ladder names layer 0 twice"},
      {[](Adapter* a) { a->base_fingerprint.clear(); }, "no fingerprint of the base model"},
      {[](Adapter* a) { a->layers[1].gate_floor = -3; },
       "layer 1: gate floor -3, allowed are -2.5 to below 0"},
      {[](Adapter* a) { a->layers[1].q_b.pop_back(); },
       "layer 1: q_b has 15 elements, expected 16"},
      {[](Adapter* a) { a->layers[1].mix[0] = std::numeric_limits<float>::infinity(); },
       "layer 1: mix holds NaN or Inf"},
      {[](Adapter* a) { a->layers[1].rank = 0; },
       "layer 1: has tensors that its settings do not call for"},
  };
  const ModelConfig base = testing::TinyConfig("llama");
  const TempDir dir;
  const std::string path = dir.path() + "/a";
  for (const Case& c : cases) {
    Adapter adapter = Plain(base);
    c.spoil(&adapter);
    const Status status = SaveAdapter(adapter, path);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "adapter for '" + path + "': " + c.message);
    EXPECT_FALSE(std::filesystem::exists(path));
  }
}

TEST(Adapter, MissingFile) {
  EXPECT_EQ(Adapter::Open("/nonexistent/a", testing::TinyConfig("llama")).status().message(),
            "cannot open '/nonexistent/a': No such file or directory");
}

}  // namespace
}  // namespace dsla
