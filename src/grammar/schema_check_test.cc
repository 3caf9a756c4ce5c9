#include "grammar/schema_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace dsla {
namespace {

using ::testing::HasSubstr;

TEST(SchemaCheckTest, NamesWhatWouldBeLeftOut) {
  for (const char* schema :
       {R"({"not":{"type":"string"}})", R"({"items":{"not":{}}})", R"({"anyOf":[{},{"not":{}}]})",
        R"({"properties":{"a":{"not":{}}}})", R"({"$defs":{"a":{"allOf":[{"not":{}}]}}})"}) {
    const Status status = CheckSchema(schema);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << schema;
    EXPECT_THAT(status.message(), HasSubstr("'not'"));
  }
}

TEST(SchemaCheckTest, NamesOfPropertiesAndDataAreNoKeywords) {
  for (const char* schema :
       {R"({"type":"object","properties":{"not":{"type":"string"},"if":{}}})",
        R"({"enum":[{"not":1}],"default":{"if":2},"const":{"then":3},"examples":[{"else":4}]})",
        R"({"$defs":{"not":{"type":"integer"}},"$ref":"#/$defs/not"})",
        R"({"type":"array","uniqueItems":false})"}) {
    EXPECT_TRUE(CheckSchema(schema).ok()) << CheckSchema(schema).message();
  }
}

TEST(SchemaCheckTest, SchemasOfStructuralTags) {
  const auto message = [](const std::string& text) { return CheckStructuralTag(text).message(); };
  const std::string in_tag =
      R"({"type":"structural_tag","format":{"type":"triggered_tags","triggers":["<f>"],"tags":[)"
      R"({"begin":"<f>","content":{"type":"json_schema","json_schema":)";
  EXPECT_THAT(message(in_tag + R"({"properties":{"a":{"uniqueItems":true}}}}}]}})"),
              HasSubstr("'uniqueItems'"));
  EXPECT_EQ(message(in_tag + R"({"properties":{"not":{"type":"string"}}}}}]}})"), "");
  EXPECT_THAT(message(R"({"structures":[{"begin":"<f>","schema":{"not":{}},"end":"</f>"}]})"),
              HasSubstr("'not'"));
  EXPECT_EQ(message(R"({"format":{"not":{}}})"), "") << "this is no schema";
  EXPECT_EQ(CheckStructuralTag("{").code(), StatusCode::kInvalidArgument);
}

TEST(SchemaCheckTest, IsOneJsonObject) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("true"),
        std::string(R"({"a":1,"a":2})"), std::string(100, '[') + std::string(100, ']')}) {
    EXPECT_EQ(CheckSchema(text).code(), StatusCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace dsla
