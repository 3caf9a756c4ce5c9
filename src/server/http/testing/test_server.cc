#include "server/http/testing/test_server.h"

#include <chrono>
#include <new>
#include <stdexcept>

namespace dsla::testing {
namespace {

constexpr auto kPatience = std::chrono::seconds(60);

}  // namespace

HttpServerOptions TestServer::DefaultOptions() {
  HttpServerOptions options;
  options.port = 0;
  return options;
}

TestServer::TestServer(HttpServerOptions options, KeyRing keys) {
  auto router = std::make_shared<Router>();
  const auto say = [](std::string text) {
    return [text](auto, auto responder) { responder->Respond(TextResponse(200, text)); };
  };
  router->Add("GET", "/open", say("open"), {.access = Access::kOpen});
  router->Add("GET", "/probe", say("well"), {.access = Access::kOpen, .while_draining = true});
  router->Add("GET", "/again", say("again"), {.while_draining = true});
  router->Add("GET", "/items/{id}", [](auto request, auto responder) {
    responder->Respond(TextResponse(200, std::string(request->PathParam("id"))));
  });
  router->Add("POST", "/echo", [](auto request, auto responder) {
    responder->Respond(JsonResponse(200, request->body));
  });
  const auto hold = [this](auto request, auto responder) {
    const std::lock_guard lock(mutex_);
    held_.push_back({std::move(request), std::move(responder)});
    changed_.notify_all();
  };
  router->Add("POST", "/hold", hold);
  router->Add("POST", "/stream", [hold](auto request, auto responder) {
    responder->ExpectStream(SseHead());
    hold(std::move(request), std::move(responder));
  });
  router->Add("POST", "/throw", [](auto, auto) { throw std::runtime_error("as asked"); });
  router->Add("POST", "/admin", say("{}"), {.access = Access::kAdmin});
  auto server = HttpServer::Start(options, std::move(router), std::move(keys), this);
  DSLA_CHECK(server.ok());
  server_ = std::move(*server);
  server_->SetPhase(Phase::kServing);
}

TestServer::~TestServer() {
  std::deque<Held> held;
  {
    const std::lock_guard lock(mutex_);
    held.swap(held_);
  }
  held.clear();
  server_.reset();
}

TestServer::Held TestServer::TakeHeld() {
  std::unique_lock lock(mutex_);
  DSLA_CHECK(changed_.wait_for(lock, kPatience, [&] { return !held_.empty(); }));
  Held held = std::move(held_.front());
  held_.pop_front();
  return held;
}

std::vector<AccessRecord> TestServer::WaitFinished(size_t n) {
  std::unique_lock lock(mutex_);
  DSLA_CHECK(changed_.wait_for(lock, kPatience, [&] { return finished_.size() >= n; }));
  return finished_;
}

std::string TestServer::WaitTrouble() {
  std::unique_lock lock(mutex_);
  DSLA_CHECK(changed_.wait_for(lock, kPatience, [&] { return !troubles_.empty(); }));
  return troubles_.front();
}

void TestServer::OnConnections(int delta) {
  if (delta > 0 && fail_connection_.exchange(false)) throw std::bad_alloc();
}

void TestServer::OnRequestFinished(const AccessRecord& record) {
  if (fail_finish_.exchange(false)) throw std::bad_alloc();
  const std::lock_guard lock(mutex_);
  finished_.push_back(record);
  changed_.notify_all();
}

void TestServer::OnTrouble(const std::string& message) {
  const std::lock_guard lock(mutex_);
  troubles_.push_back(message);
  changed_.notify_all();
}

}  // namespace dsla::testing
