// A connected socket, plain or under TLS, behind one face. Internal to server/http: it includes
// Asio. Completion handlers run on the socket's executor, a strand.
#pragma once

#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <functional>
#include <memory>

namespace dsla {

class Stream {
 public:
  using Done = std::function<void(boost::system::error_code)>;
  using DoneSome = std::function<void(boost::system::error_code, size_t)>;

  virtual ~Stream() = default;
  virtual void Handshake(Done done) = 0;
  virtual void ReadSome(boost::asio::mutable_buffer buffer, DoneSome done) = 0;
  virtual void WriteSome(boost::asio::const_buffer buffer, DoneSome done) = 0;
  // Tells the other side that no more will come.
  virtual void ShutdownSend(Done done) = 0;
  virtual boost::asio::ip::tcp::socket& socket() = 0;
};

std::unique_ptr<Stream> NewPlainStream(boost::asio::ip::tcp::socket socket);
std::unique_ptr<Stream> NewTlsStream(boost::asio::ip::tcp::socket socket,
                                     boost::asio::ssl::context& context);

}  // namespace dsla
