// The smallest user of the installed library: asks for a workspace size, then for something wrong. Needs no GPU.
#include <fpsattn/launch.h>
#include <fpsattn/status.h>

#include <cstdio>

int main() {
  fpsattn::QuantizeParams params;
  params.size = {1, 2, 128, 200, 2, 1};
  if (fpsattn::quantize_workspace_bytes(params) == 0) {
    std::printf("no workspace for the statistics\n");
    return 1;
  }
  try {
    fpsattn::quantize(params, nullptr);  // no tensors
  } catch (const fpsattn::Error& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  std::printf("null pointers were accepted\n");
  return 1;
}
