// The web page: the files of ui/, part of the program.
#pragma once

#include <span>
#include <string_view>

#include "server/http/router.h"

namespace dsla {

struct UiAsset {
  std::string_view path;  // "/app.js"; index.html is "/"
  std::string_view content_type;
  std::string_view etag;  // of its bytes, quoted
  std::string_view bytes;
};

std::span<const UiAsset> UiAssets();

// GET routes for all of them, open to everybody: they hold no data, and the page asks for a key
// when the API wants one.
void AddUiRoutes(Router& router);

}  // namespace dsla
