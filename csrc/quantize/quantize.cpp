// fpsattn::quantize: checks its parameters and picks the kernels of the device.
#include "fpsattn/launch.h"
#include "quantize/check.h"
#include "quantize/sm90/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "quantize";

}  // namespace

size_t quantize_workspace_bytes(const QuantizeParams& params) {
  check_quantize_sizes(kOp, params);
  return sm90::quantize::workspace_bytes(params);
}

void quantize(const QuantizeParams& params, cudaStream_t stream) {
  check_quantize(kOp, params, quantize_workspace_bytes(params));
  switch (device_architecture(kOp)) {
    case Architecture::kSm90:
      return sm90::quantize::launch(params, stream);
  }
}

}  // namespace fpsattn
