// The names of gloo that libtorch's ProcessGroupGloo.hpp mentions. The wheels hold gloo inside
// libtorch_cpu.so but carry none of its headers; the build puts this file in their place
// (CMakeLists.txt). Only pointers to these types lie in libtorch's classes, and nothing here is
// ever made, called or derived from, so declaring the names is enough. Should libtorch ever hold
// one of them by value or call more of it, the including file no longer compiles.
#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

namespace rendezvous {
class Store {
 public:
  virtual ~Store();
  virtual void set(const std::string& key, const std::vector<char>& value) = 0;
  virtual std::vector<char> get(const std::string& key) = 0;
  virtual void wait(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys,
                    const std::chrono::milliseconds& timeout) = 0;
};
}  // namespace rendezvous

namespace transport {
class Device;
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};
}  // namespace transport

}  // namespace gloo
