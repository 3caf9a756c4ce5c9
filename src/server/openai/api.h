// The API: every route but the transport's own (health, version, the page), over an Engine.
#pragma once

#include <memory>

#include "server/http/router.h"
#include "server/openai/service.h"

namespace dsla::openai {

// Adds
//   POST /v1/completions /v1/chat/completions
//   GET  /v1/models /v1/models/{id}
//   POST /tokenize /detokenize, GET /tokenizer_info, the three also under /v1
//   GET  /metrics, GET and POST /v1/dsla (the latter with the admin key)
// The routes share one Service, which lives as long as the router and the requests under way; what
// `context` points to must outlive both.
void RegisterApi(Router& router, ApiContext context);

}  // namespace dsla::openai
