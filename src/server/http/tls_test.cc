// HTTPS with a certificate made here.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <future>
#include <memory>

#include "server/http/testing/raw_client.h"
#include "server/http/testing/test_server.h"

namespace dsla {
namespace {

using testing::Get;
using ::testing::HasSubstr;
using testing::PostJson;
using testing::RawClient;
using ::testing::StartsWith;
using testing::TestServer;

template <auto free>
struct Free {
  template <typename T>
  void operator()(T* value) const {
    free(value);
  }
};
using Key = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY_free>>;
using Certificate = std::unique_ptr<X509, Free<X509_free>>;

// Writes a key and a certificate of it, signed with itself.
void MakeCertificate(const std::string& cert_path, const std::string& key_path) {
  const Key key(EVP_EC_gen("P-256"));
  ASSERT_TRUE(key);
  const Certificate cert(X509_new());
  X509_set_version(cert.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(cert.get()), 1);
  X509_gmtime_adj(X509_getm_notBefore(cert.get()), -3600);
  X509_gmtime_adj(X509_getm_notAfter(cert.get()), 3600);
  X509_set_pubkey(cert.get(), key.get());
  X509_NAME* name = X509_get_subject_name(cert.get());
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>("localhost"), -1, -1, 0);
  X509_set_issuer_name(cert.get(), name);
  ASSERT_GT(X509_sign(cert.get(), key.get(), EVP_sha256()), 0);
  FILE* file = std::fopen(cert_path.c_str(), "w");
  ASSERT_NE(file, nullptr);
  PEM_write_X509(file, cert.get());
  std::fclose(file);
  file = std::fopen(key_path.c_str(), "w");
  ASSERT_NE(file, nullptr);
  PEM_write_PrivateKey(file, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
  std::fclose(file);
}

class TlsClient {
 public:
  explicit TlsClient(int port) {
    context_.reset(SSL_CTX_new(TLS_client_method()));
    ssl_.reset(SSL_new(context_.get()));
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    DSLA_CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
    SSL_set_fd(ssl_.get(), fd_);
    DSLA_CHECK(SSL_connect(ssl_.get()) == 1);
  }
  ~TlsClient() { Close(); }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  void Send(const std::string& bytes) {
    DSLA_CHECK(SSL_write(ssl_.get(), bytes.data(), static_cast<int>(bytes.size())) > 0);
  }
  // Until `end` has come or the server closes.
  std::string ReadTo(const std::string& end) {
    std::string text;
    char chunk[4096];
    while (text.find(end) == std::string::npos) {
      const int got = SSL_read(ssl_.get(), chunk, sizeof(chunk));
      if (got <= 0) break;
      text.append(chunk, static_cast<size_t>(got));
    }
    return text;
  }

 private:
  std::unique_ptr<SSL_CTX, Free<SSL_CTX_free>> context_;
  std::unique_ptr<SSL, Free<SSL_free>> ssl_;
  int fd_ = -1;
};

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    options.tls_cert = ::testing::TempDir() + "dsla_tls_cert.pem";
    options.tls_key = ::testing::TempDir() + "dsla_tls_key.pem";
    MakeCertificate(options.tls_cert, options.tls_key);
  }
  HttpServerOptions options = TestServer::DefaultOptions();
};

TEST_F(TlsTest, KeepAliveStreamAndDisconnect) {
  TestServer server(options);
  TlsClient client(server.port());
  client.Send(Get("/open"));
  EXPECT_THAT(client.ReadTo("open"), StartsWith("HTTP/1.1 200"));
  client.Send(PostJson("/echo", "[" + std::string(100000, ' ') + "1]"));
  EXPECT_THAT(client.ReadTo("1]"), StartsWith("HTTP/1.1 200"));

  client.Send(PostJson("/hold", "{}"));
  TestServer::Held held = server.TakeHeld();
  std::promise<void> left;
  held.responder->OnDisconnect([&left] { left.set_value(); });
  held.responder->StartStream(SseHead());
  held.responder->Write(SseEvent("one"));
  EXPECT_THAT(client.ReadTo("one"), HasSubstr("text/event-stream"));
  client.Close();
  EXPECT_EQ(left.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
}

TEST_F(TlsTest, ConnectionCloseIsClosed) {
  TestServer server(options);
  TlsClient client(server.port());
  client.Send(Get("/open", "Connection: close\r\n"));
  EXPECT_THAT(client.ReadTo("never comes"), HasSubstr("Connection: close"));
}

TEST_F(TlsTest, PlainHttpToTheTlsPortIsClosed) {
  TestServer server(options);
  RawClient client(server.port());
  client.Send(Get("/open"));
  EXPECT_TRUE(client.ClosedWithin(5));
  TlsClient other(server.port());
  other.Send(Get("/open"));
  EXPECT_THAT(other.ReadTo("open"), StartsWith("HTTP/1.1 200"));
}

TEST_F(TlsTest, BadFilesAreNamed) {
  TestServer server(options);
  const auto message = [&](const HttpServerOptions& bad) {
    const auto started = HttpServer::Start(bad, std::make_shared<Router>(), {}, &server);
    return started.ok() ? "ok" : started.status().message();
  };
  HttpServerOptions bad = options;
  bad.tls_cert = "/no/such/cert.pem";
  EXPECT_THAT(message(bad), HasSubstr("--tls-cert: cannot use '/no/such/cert.pem'"));
  bad = options;
  bad.tls_key = options.tls_cert;  // no key in it
  EXPECT_THAT(message(bad), HasSubstr("--tls-key"));
  bad = options;
  bad.tls_key.clear();
  EXPECT_THAT(message(bad), HasSubstr("go together"));
}

}  // namespace
}  // namespace dsla
