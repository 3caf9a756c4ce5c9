// Signals as values that one thread waits for, instead of handlers.
#pragma once

#include <csignal>

namespace dsla {

// To be made before any other thread, which then inherit that these signals are blocked: SIGTERM,
// SIGINT, SIGHUP and SIGUSR1. SIGPIPE is ignored: a client that left is an error of its socket.
class SignalQueue {
 public:
  SignalQueue();
  // The next signal, or 0 when none came in time.
  int Wait(double seconds);

 private:
  sigset_t set_;
};

// As many open files as the system lets this process have, for many connections.
void RaiseFileLimit();

}  // namespace dsla
