// Several engines behind the interface of one: replicas of a model, each on a device of its own or
// with its share of the CPU. A request goes to one of them (ReplicaRouter); what is asked of the
// engine as such, of all. An engine whose device has failed gets no more requests while others
// work; its own end as those of a single engine do.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/queue_bound.h"
#include "engine/replica_router.h"

namespace dsla {

struct Replica {
  std::unique_ptr<Engine> engine;
  std::string device;  // EngineState::device
};

// `queue`: EngineOptions::queue of each of them. They must have equal cache memory, models and
// limits, so that what one accepts any other would. At least two, at most
// ReplicaRouter::kMostReplicas; router.replicas is set here. SubmitAll places each request of a
// group for itself; RequestSink::OnPlaced, RequestResult::replica and LevelEvent::replica say
// where.
std::unique_ptr<Engine> JoinReplicas(std::vector<Replica> replicas,
                                     std::shared_ptr<QueueBound> queue, RouterOptions router);

// What they look like together: sums of what can be summed; idle or draining where all are; the
// highest target level; the longest wait; the progress of whichever with work has made none for
// longest; the last changes of all; a device error where no device works.
EngineState Together(std::vector<EngineState> replicas);

}  // namespace dsla
