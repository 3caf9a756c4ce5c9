#include "server/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace dsla {
namespace {

using ::testing::HasSubstr;

struct Settings {
  std::string config, host = "127.0.0.1";
  std::vector<std::string> api_keys;
  int port = 8080;
  bool flag = false;
};

class ConfigTest : public ::testing::Test {
 protected:
  ConfigTest() {
    app.add_option("--config", settings.config, "");
    app.add_option("--host", settings.host, "")->capture_default_str();
    app.add_option("-p,--port", settings.port, "")
        ->check(CLI::Range(0, 65535))
        ->capture_default_str();
    app.add_option("--api-key", settings.api_keys, "");
    app.add_flag("--no-ui", settings.flag, "");
  }

  std::string WriteFile(const std::string& text) {
    const std::string path = ::testing::TempDir() + "dsla_config_" +
                             ::testing::UnitTest::GetInstance()->current_test_info()->name() +
                             ".toml";
    std::ofstream(path) << text;
    return path;
  }

  Expected<std::vector<ConfigValue>> Resolve(std::vector<std::string> arguments,
                                             const Environment& environment = {}) {
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants it
    app.parse(arguments);
    return ResolveConfig(app, environment, {"api-key"});
  }

  std::string Message(std::vector<std::string> arguments, const Environment& environment = {}) {
    const auto resolved = Resolve(std::move(arguments), environment);
    return resolved.ok() ? "ok" : resolved.status().message();
  }

  CLI::App app;
  Settings settings;
};

TEST_F(ConfigTest, PrecedenceIsCommandLineEnvironmentFileDefault) {
  const std::string path =
      WriteFile("host = \"file\"\nport = 1\nno-ui = true\napi-key = [\"a\", \"b\"]\n");
  const auto resolved = Resolve({"--config", path, "--port", "3"},
                                {{"DSLA_PORT", "2"}, {"DSLA_HOST", "environment"}, {"HOME", "x"}});
  ASSERT_TRUE(resolved.ok()) << resolved.status().message();
  EXPECT_EQ(settings.port, 3);
  EXPECT_EQ(settings.host, "environment");
  EXPECT_TRUE(settings.flag);
  EXPECT_THAT(settings.api_keys, ::testing::ElementsAre("a", "b"));
  const auto of = [&](const std::string& name) {
    for (const ConfigValue& value : *resolved) {
      if (value.name == name) return value.value + " from " + value.source;
    }
    return std::string("nothing");
  };
  EXPECT_EQ(of("port"), "3 from command line");
  EXPECT_EQ(of("host"), "environment from DSLA_HOST");
  EXPECT_EQ(of("no-ui"), "true from " + path);
  EXPECT_EQ(of("api-key"), "*** from " + path);
}

TEST_F(ConfigTest, DefaultsAreShown) {
  const auto resolved = Resolve({});
  ASSERT_TRUE(resolved.ok());
  EXPECT_EQ(resolved->at(1).value, "127.0.0.1");
  EXPECT_EQ(resolved->at(1).source, "default");
  EXPECT_EQ(settings.port, 8080);
}

TEST_F(ConfigTest, TheFileMayBeNamedByTheEnvironment) {
  const std::string path = WriteFile("port = 7\n");
  ASSERT_TRUE(Resolve({}, {{"DSLA_CONFIG", path}}).ok());
  EXPECT_EQ(settings.port, 7);
}

TEST_F(ConfigTest, UnknownKeysAreRefusedWithANearMatch) {
  const std::string path = WriteFile("host = \"a\"\nprot = 1\n");
  const std::string message = Message({"--config", path});
  EXPECT_THAT(message, HasSubstr(path + ", line 2"));
  EXPECT_THAT(message, HasSubstr("'prot' (did you mean 'port'?)"));
}

TEST_F(ConfigTest, UnknownEnvironmentVariablesAreRefused) {
  EXPECT_THAT(Message({}, {{"DSLA_APIKEY", "x"}}),
              HasSubstr("DSLA_APIKEY belongs to no option (did you mean 'DSLA_API_KEY'?)"));
  EXPECT_EQ(Message({}, {{"DSLA_FOO", "x"}}),
            "the environment variable DSLA_FOO belongs to no option");
}

TEST_F(ConfigTest, WhatKubernetesSaysOfServicesIsLeftOut) {
  Environment environment = {
      // Of a Service named dsla,
      {"DSLA_SERVICE_HOST", "10.0.0.1"},
      {"DSLA_SERVICE_PORT", "8080"},
      {"DSLA_SERVICE_PORT_HTTP", "8080"},
      {"DSLA_PORT", "tcp://10.0.0.1:8080"},
      {"DSLA_PORT_8080_TCP", "tcp://10.0.0.1:8080"},
      {"DSLA_PORT_8080_TCP_PROTO", "tcp"},
      {"DSLA_PORT_8080_TCP_PORT", "8080"},
      {"DSLA_PORT_8080_TCP_ADDR", "10.0.0.1"},
      // and of one named dsla-serve.
      {"DSLA_SERVE_SERVICE_HOST", "10.0.0.2"},
      {"DSLA_SERVE_PORT", "udp://10.0.0.2:53"},
      {"DSLA_SERVE_PORT_53_UDP_ADDR", "10.0.0.2"},
  };
  EXPECT_FALSE(Resolve({}, environment).ok());
  EXPECT_EQ(DropServiceVariables(app, environment), std::vector<std::string>{"DSLA_PORT"});
  EXPECT_TRUE(environment.empty());

  environment = {{"DSLA_PORT", "7"}, {"DSLA_PROT", "7"}, {"DSLA_HTTP_PORT", "7"}, {"HOME", "x"}};
  const Environment all = environment;
  EXPECT_TRUE(DropServiceVariables(app, environment).empty());
  EXPECT_EQ(environment, all);
}

TEST_F(ConfigTest, TablesAndUnrelatedKeysAreRefused) {
  EXPECT_THAT(Message({"--config", WriteFile("[server]\nport = 1\n")}), HasSubstr("'server'"));
  EXPECT_THAT(Message({"--config", WriteFile("config = \"other\"\n")}), HasSubstr("'config'"));
  EXPECT_THAT(Message({"--config", WriteFile("host = [[1]]\n")}), HasSubstr("a list within"));
  EXPECT_THAT(Message({"--config", WriteFile("host = 1979-05-27\n")}), HasSubstr("only text"));
}

TEST_F(ConfigTest, BadFilesAndValuesAreNamed) {
  EXPECT_THAT(Message({"--config", "/no/such.toml"}), HasSubstr("'/no/such.toml'"));
  EXPECT_EQ(Message({"--config", "/tmp"}), "--config: '/tmp' is a directory");
  EXPECT_THAT(Message({"--config", WriteFile("port = \n")}), HasSubstr(", line 1"));
}

TEST_F(ConfigTest, ValuesAreCheckedAsOnTheCommandLine) {
  EXPECT_THAT(Message({}, {{"DSLA_PORT", "70000"}}), HasSubstr("DSLA_PORT"));
}

TEST_F(ConfigTest, WordsForNumbersAreRefused) {
  EXPECT_THAT(Message({"--config", WriteFile("port = \"many\"\n")}), HasSubstr("port"));
}

TEST_F(ConfigTest, FlagsTakeTrueAndFalse) {
  EXPECT_THAT(Message({}, {{"DSLA_NO_UI", "perhaps"}}), HasSubstr("neither true nor false"));
}

TEST_F(ConfigTest, FlagsMayBeFalse) {
  ASSERT_TRUE(Resolve({}, {{"DSLA_NO_UI", "false"}}).ok());
  EXPECT_FALSE(settings.flag);
}

TEST(NearMatchTest, OnlyCloseOnes) {
  EXPECT_EQ(NearMatch("slo-tfft", {"host", "slo-ttft"}), "slo-ttft");
  EXPECT_EQ(NearMatch("temperature", {"host", "port"}), "");
  EXPECT_EQ(NearMatch("temp", {"help", "temperature"}), "temperature");
}

}  // namespace
}  // namespace dsla
