#include "server/ui_assets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "server/http/testing/raw_client.h"
#include "server/http/testing/test_server.h"

namespace dsla {
namespace {

using testing::Get;
using testing::RawClient;
using testing::RawResponse;
using testing::TestServer;

TEST(UiAssetsTest, ThePageIsServedByteForByte) {
  TestServer server;
  auto router = std::make_shared<Router>();
  AddUiRoutes(*router);
  server.server().SetRouter(router);
  RawClient client(server.port());
  size_t total = 0;
  ASSERT_GT(UiAssets().size(), 1u);
  for (const UiAsset& asset : UiAssets()) {
    const std::string name = asset.path == "/" ? "/index.html" : std::string(asset.path);
    std::ifstream file(std::string(DSLA_SOURCE_DIR) + "/ui" + name, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), {});
    ASSERT_FALSE(bytes.empty()) << name;
    if (!name.ends_with(".json")) total += bytes.size();  // the page does not load openapi.json
    const RawResponse response = client.Call(Get(asset.path));
    EXPECT_EQ(response.status, 200) << name;
    EXPECT_EQ(response.body, bytes) << name;
    EXPECT_EQ(response.headers.Get("Content-Type"), asset.content_type);
    const std::string etag(response.headers.Get("ETag"));
    const RawResponse again = client.Call(Get(asset.path, "If-None-Match: " + etag + "\r\n"));
    EXPECT_EQ(again.status, 304);
    EXPECT_EQ(again.headers.Get("ETag"), etag);
  }
  EXPECT_LT(total, 100u << 10);  // the page must load fast on a phone
}

}  // namespace
}  // namespace dsla
