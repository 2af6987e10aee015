#include "forward/sm90/launch_kernel.h"

namespace fpsattn::sm90::forward {
void launch_d64_k_per_token(const Arguments& args, int num_sms, cudaStream_t stream) {
  launch<Config<64, true>>(args, num_sms, stream);
}
}  // namespace fpsattn::sm90::forward
