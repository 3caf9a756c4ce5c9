#include "server/ui_assets.h"

namespace dsla {

void AddUiRoutes(Router& router) {
  for (const UiAsset& asset : UiAssets()) {
    const auto handler = [asset](auto request, auto responder) {
      HttpResponse response;
      response.headers = {
          {"ETag", std::string(asset.etag)},
          {"Cache-Control", "no-cache"},  // to be asked for each time, with the ETag
          // Nothing from elsewhere, and in no other page's frame.
          {"Content-Security-Policy",
           "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
           "'self' "
           "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
           "'none'"},
          {"X-Content-Type-Options", "nosniff"},
          {"Referrer-Policy", "no-referrer"}};
      if (request->headers.Get("If-None-Match") == asset.etag) {
        response.status = 304;
      } else {
        response.headers.Add("Content-Type", std::string(asset.content_type));
        response.body = asset.bytes;
      }
      responder->Respond(std::move(response));
    };
    router.Add("GET", asset.path, handler, {.access = Access::kOpen, .while_draining = true});
  }
}

}  // namespace dsla
