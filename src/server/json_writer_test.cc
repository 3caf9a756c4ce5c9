#include "server/json_writer.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

namespace dsla {
namespace {

TEST(JsonWriter, PutsCommasWhereTheyBelong) {
  JsonWriter out;
  out.BeginObject().Field("a", 1).Key("b").BeginArray().Int(1).BeginArray().EndArray();
  out.BeginObject().EndObject().String("[").Null().Bool(false).EndArray();
  out.Key("c").BeginObject().Field("d", "{").Field("e", true).EndObject().Key("f").Raw("[2]");
  EXPECT_EQ(out.EndObject().str(),
            R"({"a":1,"b":[1,[],{},"[",null,false],"c":{"d":"{","e":true},"f":[2]})");
}

TEST(JsonWriter, GoesOnBehindAHead) {
  JsonWriter out("data: {\"choices\":[");
  out.BeginObject().EndObject().BeginObject().EndObject().EndArray().Field("n", int64_t{2});
  EXPECT_EQ(out.str(), R"(data: {"choices":[{},{}],"n":2)");
}

TEST(JsonWriter, EscapesEveryByteAsAReaderExpects) {
  std::string all;
  for (int c = 0; c < 128; ++c) all += static_cast<char>(c);
  all += "\u00e9\u20ac\U0001f600\u2028";
  std::string json;
  AppendJsonString(all, &json);
  EXPECT_EQ(nlohmann::json::parse(json).get<std::string>(), all);
  EXPECT_EQ(json.find('\n'), std::string::npos);
  EXPECT_EQ(json.substr(0, 7), "\"\\u0000");
}

TEST(JsonWriter, ReplacesIllFormedText) {
  std::string json;
  AppendJsonString("a\xff\xe2\x82z\xed\xa0\x80", &json);
  EXPECT_EQ(json, "\"a\ufffd\ufffdz\ufffd\ufffd\ufffd\"");
}

TEST(JsonWriter, FloatsReadBackTheSame) {
  std::mt19937 random(20240607);
  for (int i = 0; i < 2000; ++i) {
    const uint32_t bits = random();
    const float value = std::bit_cast<float>(bits);
    if (!std::isfinite(value)) continue;
    EXPECT_EQ(nlohmann::json::parse(JsonWriter().Float(value).str()).get<float>(), value);
  }
  EXPECT_EQ(JsonWriter().Float(-0.1f).str(), "-0.1");
  EXPECT_EQ(JsonWriter().Double(0.1).str(), "0.1");
}

TEST(JsonWriter, WhatJsonCannotHoldIsNull) {
  EXPECT_EQ(JsonWriter().Float(std::numeric_limits<float>::quiet_NaN()).str(), "null");
  EXPECT_EQ(JsonWriter().Double(-std::numeric_limits<double>::infinity()).str(), "null");
}

TEST(JsonWriter, IntegersOfAllSizes) {
  EXPECT_EQ(JsonWriter().Int(std::numeric_limits<int64_t>::min()).str(), "-9223372036854775808");
  EXPECT_EQ(JsonWriter().Int(0).str(), "0");
}

}  // namespace
}  // namespace dsla
