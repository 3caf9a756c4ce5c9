#include "format/safetensors.h"

#include <gtest/gtest.h>

#include "format/safetensors_writer.h"
#include "format/testing/file_writers.h"

namespace dsla {
namespace {

using testing::FloatBytes;
using testing::SafetensorsBytes;

Expected<SafetensorsFile> Parse(const std::string& bytes) {
  return SafetensorsFile::Parse(std::as_bytes(std::span(bytes)), "x.safetensors");
}

TEST(Safetensors, Reads) {
  const std::string bytes = SafetensorsBytes(
      R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},"__metadata__":{"k":"v"},)"
      R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
      R"("empty":{"dtype":"F64","shape":[0,3],"data_offsets":[4,4]},)"
      R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}  )",
      std::string("\x80\x3f\x00\x40", 4) + FloatBytes({3, 4}) + "x");
  const auto file = Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"k", "v"}}));
  ASSERT_EQ(file->tensors().size(), 4u);
  EXPECT_EQ(file->tensors()[0].name, "a");
  EXPECT_EQ(file->tensors()[1].name, "empty");
  EXPECT_EQ(file->tensors()[2].name, "b");
  EXPECT_EQ(file->tensors()[2].shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(file->tensors()[2].dtype, "F32");
  EXPECT_EQ(file->tensors()[2].data.size(), 8u);
  EXPECT_TRUE(file->tensors()[3].shape.empty());
}

TEST(Safetensors, BadHeaders) {
  struct Case {
    const char* header;
    const char* data;
    const char* message;
  };
  const Case cases[] = {
      {"", "", "the header does not begin with '{'"},
      {"[1]", "", "the header does not begin with '{'"},
      {"{", "", "malformed JSON at byte 2"},
      {"{\"a\":\x80}", "", "malformed JSON at byte 6"},
      {R"({"a":{"dtype":{"x":{}},"shape":[],"data_offsets":[0,4]}})", "1234",
       "JSON nested deeper than 3 levels"},
      {R"({"a":1})", "", "tensor 'a': not an object"},
      {R"({"a":{"shape":[1],"data_offsets":[0,4]}})", "1234", "tensor 'a': no dtype"},
      {R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", "1234", "tensor 'a': no shape"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", "1234", "tensor 'a': no pair of data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", "1234",
       "tensor 'a': no pair of data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", "1234",
       "tensor 'a': unknown key 'x'"},
      {R"({"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': unknown dtype 'F3'"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': a dimension is not a whole number"},
      {R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': a dimension is not a whole number"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': dimensions too large"},
      {R"({"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}})", "",
       "tensor 'a': dimensions too large"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': 9 dimensions, allowed are 8"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "1234",
       "tensor 'a': data_offsets are not two ascending whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", "1234",
       "tensor 'a': data_offsets are not two ascending whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551612]}})", "1234",
       "tensor 'a': data_offsets [0, 18446744073709551612] run past the 4 bytes of data"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "1234",
       "tensor 'a': data_offsets [0, 8] run past the 4 bytes of data"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234",
       "tensor 'a': 4 bytes of data for a shape and dtype of 8"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       "123456", "tensors 'a' and 'b' overlap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       "1234", "tensors 'a' and 'b' overlap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}})",
       "1234567890", "2 bytes before tensor 'b' belong to no tensor"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "12345",
       "1 bytes at the end belong to no tensor"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       "1234", "key 'a' stands twice in one object"},
      {R"({"__metadata__":[]})", "", "__metadata__ is not an object"},
      {R"({"__metadata__":{"k":1}})", "", "metadata 'k' is not a string"},
      {R"({"a\n":{}})", "", "tensor 'a?': no dtype"},
  };
  for (const Case& c : cases) {
    const auto file = Parse(SafetensorsBytes(c.header, c.data));
    ASSERT_FALSE(file.ok()) << c.header;
    EXPECT_EQ(file.status().message(), std::string("'x.safetensors': ") + c.message) << c.header;
  }
}

TEST(Safetensors, BadLengths) {
  EXPECT_EQ(Parse("1234567").status().message(),
            "'x.safetensors': 7 bytes are too few for a safetensors file");
  EXPECT_EQ(
      Parse(std::string(7, '\0') + "\x80{}").status().message(),
      "'x.safetensors': header of 9223372036854775808 bytes, more than the 100000000 allowed");
  EXPECT_EQ(Parse(std::string("\x03\0\0\0\0\0\0\0{}", 10)).status().message(),
            "'x.safetensors': header of 3 bytes in a file of 10");
}

TEST(Safetensors, TruncatedAnywhere) {
  const std::string bytes = SafetensorsBytes(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", FloatBytes({1, 2}));
  ASSERT_TRUE(Parse(bytes).ok());
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    const auto file = SafetensorsFile::Parse(std::as_bytes(std::span(cut)), "x");
    ASSERT_FALSE(file.ok()) << size;
    EXPECT_EQ(file.status().message().find('\n'), std::string::npos);
  }
}

TEST(Safetensors, DeepJsonIsRefusedNotRecursedInto) {
  const auto file = Parse(SafetensorsBytes("{\"a\":" + std::string(1000000, '['), ""));
  EXPECT_EQ(file.status().message(), "'x.safetensors': JSON nested deeper than 3 levels");
}

TEST(Safetensors, WriterRoundTrip) {
  const testing::TempDir dir;
  const std::string path = dir.path() + "/w.safetensors";
  const std::vector<float> a = {1.f, -2.5f, 3e-30f}, b = {0.1f};
  const std::vector<TensorToWrite> tensors = {{"z", {3, 1}, a}, {"a", {}, b}};
  ASSERT_TRUE(WriteSafetensors(path, {{"k", "v"}}, tensors, DType::kF32).ok());
  auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata().at("k"), "v");
  ASSERT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->tensors()[0].name, "z");
  EXPECT_EQ(std::memcmp(file->tensors()[0].data.data(), a.data(), 12), 0);
  // Over the first, as bf16: the old file is replaced, nothing else is left.
  ASSERT_TRUE(WriteSafetensors(path, {}, tensors, DType::kBF16).ok());
  file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->tensors()[1].dtype, "BF16");
  EXPECT_EQ(file->tensors()[1].data.size(), 2u);
  const std::string nowhere = dir.path() + "/no/w.safetensors";
  EXPECT_EQ(WriteSafetensors(nowhere, {}, tensors, DType::kF32).message(),
            "cannot write '" + nowhere + "': No such file or directory");
}

}  // namespace
}  // namespace dsla
