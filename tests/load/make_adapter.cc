// make_adapter MODEL OUT: a random adapter for a model, for tests of what stands around it.
#include <fmt/format.h>

#include <cstdio>

#include "format/adapter.h"
#include "format/model_file.h"
#include "model/testing/small_models.h"

int main(int argc, char** argv) {
  using namespace dsla;
  if (argc != 3) {
    fmt::print(stderr, "usage: make_adapter MODEL OUT\n");
    return 2;
  }
  const auto file = ModelFile::Open(argv[1]);
  if (!file.ok()) {
    fmt::print(stderr, "{}\n", file.status().message());
    return 2;
  }
  Adapter adapter = *testing_models::RandomAdapter((*file)->config(), {}, 5);
  adapter.base_name = "small";
  const auto fingerprint = (*file)->Fingerprint();
  Status status = fingerprint.status();
  if (status.ok()) {
    adapter.base_fingerprint = *fingerprint;
    status = SaveAdapter(adapter, argv[2]);
  }
  if (!status.ok()) fmt::print(stderr, "{}\n", status.message());
  return status.ok() ? 0 : 1;
}
