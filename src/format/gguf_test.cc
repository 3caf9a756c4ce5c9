#include "format/gguf.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using testing::AppendBytes;
using testing::FloatBytes;
using testing::GgufBuilder;

GgufBuilder Small() {
  GgufBuilder builder;
  builder.String("general.architecture", "llama");
  builder.U32("u32", 7);
  builder.F32("f32", 0.5f);
  builder.Bool("bool", true);
  builder.Strings("strings", {"a", "", "ccc"});
  builder.I32s("i32s", {1, -2, 3});
  builder.F32s("f32s", {0.25f, -1.f});
  builder.tensors.push_back({"a", {2, 3}, 0, FloatBytes({1, 2, 3, 4, 5, 6}), {}});
  builder.tensors.push_back({"b", {4}, 0, FloatBytes({7, 8, 9, 10}), {}});
  return builder;
}

Expected<GgufFile> Parse(const std::string& bytes) {
  return GgufFile::Parse(std::as_bytes(std::span(bytes)), "x.gguf");
}

TEST(Gguf, ReadsBothVersions) {
  for (const uint32_t version : {2u, 3u}) {
    GgufBuilder builder = Small();
    builder.version = version;
    const std::string bytes = builder.Build();
    const auto file = Parse(bytes);
    ASSERT_TRUE(file.ok()) << file.status().message();
    EXPECT_EQ(file->version(), version);
    EXPECT_EQ(**file->Integer("u32"), 7);
    EXPECT_EQ(**file->Number("f32"), 0.5);
    EXPECT_EQ(**file->Number("u32"), 7.0);
    EXPECT_EQ(**file->Bool("bool"), true);
    EXPECT_EQ(**file->String("general.architecture"), "llama");
    EXPECT_EQ(*file->Strings("strings"), (std::vector<std::string_view>{"a", "", "ccc"}));
    EXPECT_EQ(*file->Integers("i32s"), (std::vector<int64_t>{1, -2, 3}));
    EXPECT_EQ(*file->Numbers("f32s"), (std::vector<float>{0.25f, -1.f}));
    EXPECT_EQ(*file->Integer("absent"), std::nullopt);
    EXPECT_TRUE(file->Strings("absent")->empty());
    EXPECT_EQ(file->Integer("f32").status().message(),
              "'x.gguf': metadata 'f32' is not an integer");
    EXPECT_EQ(file->String("u32").status().message(), "'x.gguf': metadata 'u32' is not a string");
    EXPECT_EQ(file->Strings("i32s").status().message(),
              "'x.gguf': metadata 'i32s' is not an array of strings");
    ASSERT_EQ(file->tensors().size(), 2u);
    EXPECT_EQ(file->tensors()[0].shape, (std::vector<int64_t>{2, 3}));
    std::vector<float> values(4);
    Dequantize(file->tensors()[1].type, file->tensors()[1].data, values);
    EXPECT_EQ(values, (std::vector<float>{7, 8, 9, 10}));
  }
}

TEST(Gguf, EveryMetadataType) {
  GgufBuilder builder;
  const auto scalar = [&](const char* key, uint32_t type, auto value) {
    std::string payload;
    AppendBytes(&payload, value);
    builder.Raw(key, type, payload);
  };
  scalar("u8", 0, uint8_t{200});
  scalar("i8", 1, int8_t{-100});
  scalar("u16", 2, uint16_t{60000});
  scalar("i16", 3, int16_t{-30000});
  scalar("u32", 4, uint32_t{4000000000});
  scalar("i32", 5, int32_t{-2000000000});
  scalar("u64", 10, uint64_t{1} << 62);
  scalar("i64", 11, -(int64_t{1} << 62));
  scalar("f64", 12, 0.1);
  scalar("huge", 10, std::numeric_limits<uint64_t>::max());
  const std::string bytes = builder.Build();
  const auto file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(**file->Integer("u8"), 200);
  EXPECT_EQ(**file->Integer("i8"), -100);
  EXPECT_EQ(**file->Integer("u16"), 60000);
  EXPECT_EQ(**file->Integer("i16"), -30000);
  EXPECT_EQ(**file->Integer("u32"), 4000000000);
  EXPECT_EQ(**file->Integer("i32"), -2000000000);
  EXPECT_EQ(**file->Integer("u64"), int64_t{1} << 62);
  EXPECT_EQ(**file->Integer("i64"), -(int64_t{1} << 62));
  EXPECT_EQ(**file->Number("f64"), 0.1);
  EXPECT_FALSE(file->Integer("huge").ok());  // no int64
}

TEST(Gguf, Alignment) {
  GgufBuilder builder = Small();
  builder.U32("general.alignment", 128);
  builder.alignment = 128;
  const std::string bytes = builder.Build();
  const auto file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status().message();
  std::vector<float> values(6);
  Dequantize(file->tensors()[0].type, file->tensors()[0].data, values);
  EXPECT_EQ(values, (std::vector<float>{1, 2, 3, 4, 5, 6}));
}

std::string Array(uint32_t type, uint64_t count, std::string_view elements = "") {
  std::string out;
  AppendBytes(&out, type);
  AppendBytes(&out, count);
  out += elements;
  return out;
}

TEST(Gguf, BadFiles) {
  struct Case {
    std::function<void(GgufBuilder*)> spoil;
    const char* message;
    StatusCode code = StatusCode::kDataLoss;
  };
  const uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const Case cases[] = {
      {[](GgufBuilder* b) { b->magic = "GGML"; },
       "not a GGUF file (it does not begin with 'GGUF')"},
      {[](GgufBuilder* b) { b->version = 1; }, "GGUF version 1, supported are 2 and 3",
       StatusCode::kUnsupported},
      {[](GgufBuilder* b) { b->version = 4; }, "GGUF version 4, supported are 2 and 3",
       StatusCode::kUnsupported},
      {[](GgufBuilder* b) { b->version = 0x03000000; }, "big-endian GGUF file",
       StatusCode::kUnsupported},
      {[=](GgufBuilder* b) { b->tensor_count = kHuge; },
       "18446744073709551615 tensors cannot fit in 400 bytes"},
      {[=](GgufBuilder* b) { b->value_count = kHuge; },
       "18446744073709551615 metadata entries cannot fit in 400 bytes"},
      {[](GgufBuilder* b) { b->Raw("k", 13, ""); }, "metadata 'k': unknown value type 13"},
      {[](GgufBuilder* b) { b->Raw("k", 7, "\2"); }, "metadata 'k': a bool other than 0 or 1"},
      {[=](GgufBuilder* b) { b->Raw("k", 9, Array(4, kHuge)); },
       "metadata 'k': 18446744073709551615 values at byte 284 run past the end of the file"},
      {[=](GgufBuilder* b) { b->Raw("k", 9, Array(8, kHuge)); },
       "metadata 'k': 18446744073709551615 values at byte 284 run past the end of the file"},
      {[](GgufBuilder* b) {
         std::string nested = Array(4, 0);
         for (int i = 0; i < 6; ++i) nested = Array(9, 1, nested);
         b->Raw("k", 9, nested);
       },
       "metadata 'k': arrays nested deeper than 4 levels"},
      {[](GgufBuilder* b) { b->U32("u32", 8); }, "metadata key 'u32' stands twice"},
      {[](GgufBuilder* b) { b->U32("", 8); }, "empty metadata key before byte 267"},
      {[](GgufBuilder* b) { b->U32(std::string(70000, 'k'), 8); },
       "a metadata key of 70000 bytes, more than the 65535 allowed"},
      {[](GgufBuilder* b) { b->U32("general.alignment", 0); },
       "general.alignment is not a multiple of 8 between 8 and 1048576"},
      {[](GgufBuilder* b) { b->U32("general.alignment", 12); },
       "general.alignment is not a multiple of 8 between 8 and 1048576"},
      {[](GgufBuilder* b) { b->tensors[0].name = std::string(65, 'n'); },
       "a tensor name of 65 bytes, more than the 64 allowed"},
      {[](GgufBuilder* b) { b->tensors[1].name = "a"; }, "tensor 'a' stands twice"},
      {[](GgufBuilder* b) {
         b->tensors[0].name = "a\n\x1b";
         b->tensors[0].shape = {0};
       },
       "tensor 'a\?\?': dimension 0 is 0"},
      {[](GgufBuilder* b) { b->tensors[0].shape = {}; },
       "tensor 'a': 0 dimensions, allowed are 1 to 4"},
      {[](GgufBuilder* b) {
         b->tensors[0].shape = {1, 1, 1, 1, 1};
       },
       "tensor 'a': 5 dimensions, allowed are 1 to 4"},
      {[](GgufBuilder* b) {
         b->tensors[0].shape = {1 << 30, 1 << 30};
       },
       "tensor 'a': dimensions too large"},
      {[](GgufBuilder* b) {
         b->tensors[0].shape = {-1, 1};
       },
       "tensor 'a': dimensions too large"},
      {[](GgufBuilder* b) { b->tensors[0].type = 10; },
       "tensor 'a': type 10 is not supported (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, "
       "Q5_K, Q6_K are)",
       StatusCode::kUnsupported},
      {[](GgufBuilder* b) { b->tensors[0].type = 2; },
       "tensor 'a': rows of 3 elements are not whole blocks of Q4_0"},
      {[](GgufBuilder* b) {
         b->tensors[0].shape = {2, 1000};
       },
       "tensor 'a': 8000 bytes at offset 0 run past the end of the file (400 bytes)"},
      {[](GgufBuilder* b) { b->tensors[1].offset = 0x7fffffffffffffe0; },
       "tensor 'b': 16 bytes at offset 9223372036854775776 run past the end of the file (400 "
       "bytes)"},
      {[](GgufBuilder* b) { b->tensors[1].offset = 0xffffffffffffffe0; },
       "tensor 'b': 16 bytes at offset 18446744073709551584 run past the end of the file (400 "
       "bytes)"},
      {[](GgufBuilder* b) { b->tensors[1].offset = 33; },
       "tensor 'b': offset 33 is not a multiple of 32"},
      {[](GgufBuilder* b) { b->tensors[1].offset = 0; }, "tensors 'a' and 'b' overlap"},
  };
  for (const Case& c : cases) {
    GgufBuilder builder = Small();
    c.spoil(&builder);
    const std::string bytes = builder.Build();
    const auto file = Parse(bytes);
    ASSERT_FALSE(file.ok()) << c.message;
    EXPECT_EQ(file.status().message(), std::string("'x.gguf': ") + c.message);
    EXPECT_EQ(file.status().code(), c.code) << c.message;
  }
}

// Whatever a file is cut down to, it is refused with one line.
TEST(Gguf, TruncatedAnywhere) {
  const std::string bytes = Small().Build();
  ASSERT_TRUE(Parse(bytes).ok());
  for (size_t size = 0; size < bytes.size(); ++size) {
    // In a block of its own size, so that ASan sees a read past the end.
    const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const auto file = GgufFile::Parse(std::as_bytes(std::span(cut)), "x.gguf");
    ASSERT_FALSE(file.ok()) << size;
    EXPECT_EQ(file.status().message().find('\n'), std::string::npos);
  }
}

TEST(Gguf, MissingFile) {
  const auto file = GgufFile::Open("/nonexistent/x.gguf");
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.status().message(),
            "cannot open '/nonexistent/x.gguf': No such file or directory");
}

}  // namespace
}  // namespace dsla
