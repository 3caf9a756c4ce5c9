// The handlers behind RegisterApi. Each answers at once or hands over to a Generation. Those with a
// permit read and tokenise texts; they may run on a thread of the TaskPool.
#pragma once

#include <functional>
#include <memory>

#include "server/http/http.h"
#include "server/openai/generation.h"
#include "server/openai/service.h"

namespace dsla::openai {

using RequestPtr = std::shared_ptr<const HttpRequest>;
using ResponderPtr = std::shared_ptr<Responder>;
using ServicePtr = std::shared_ptr<Service>;
using PermitPtr = std::unique_ptr<Service::Permit>;

// On one of the pool's threads, unless the client has left by then. What the task throws becomes
// the answer, as on an io thread.
void RunInPool(TaskPool& pool, const ResponderPtr& responder, std::function<void()> task);

// generate.cc
void HandleCompletions(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                       ResponderPtr responder);
void HandleChat(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                ResponderPtr responder);
// What a conversation is answered by. Errors name chat's fields.
Parsed<GenerationPlan> PlanChat(const Service& service, ChatRequest chat);
// Compiles the plan's grammar, if there is one, on a thread for that.
void StartGeneration(const ServicePtr& service, PermitPtr permit, GenerationPlan plan,
                     RequestPtr request, ResponderPtr responder);
// The tokens of a conversation; 400 where there is no template or it refuses the messages, or
// where it has no place for tools and there are some.
Parsed<std::vector<int32_t>> EncodeMessages(const Service& service,
                                            const std::vector<ChatMessage>& messages,
                                            const std::vector<Tool>& tools,
                                            const PromptOptions& prompt);
// Refused before it is tokenised if it cannot fit the context.
Parsed<std::vector<int32_t>> EncodeText(const Service& service, const std::string& text,
                                        const EncodeOptions& options);

// responses.cc
void HandleResponses(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                     ResponderPtr responder);

// models.cc
void HandleModels(const ServicePtr& service, RequestPtr request, ResponderPtr responder);
void HandleModel(const ServicePtr& service, RequestPtr request, ResponderPtr responder);

// tokens.cc
void HandleTokenize(const ServicePtr& service, PermitPtr permit, RequestPtr request,
                    ResponderPtr responder);
void HandleDetokenize(const ServicePtr& service, RequestPtr request, ResponderPtr responder);
void HandleTokenizerInfo(const ServicePtr& service, RequestPtr request, ResponderPtr responder);

// operations.cc
void HandleMetrics(const ServicePtr& service, RequestPtr request, ResponderPtr responder);
void HandleDslaState(const ServicePtr& service, RequestPtr request, ResponderPtr responder);
void HandleDslaCommand(const ServicePtr& service, RequestPtr request, ResponderPtr responder);

}  // namespace dsla::openai
