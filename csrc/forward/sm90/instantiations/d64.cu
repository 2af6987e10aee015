#include "forward/sm90/launch_kernel.h"

namespace fpsattn::sm90::forward {
void launch_d64(const Arguments& args, int num_sms, cudaStream_t stream) {
  launch<Config<64, false>>(args, num_sms, stream);
}
}  // namespace fpsattn::sm90::forward
